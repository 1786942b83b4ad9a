"""The page of the demo, as one HTML file beside its pictures: in light and dark, for any width."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

STYLE = """
:root { color-scheme: light dark; --ink: #1d2a2a; --soft: #5b6b6b; --page: #f7f8f6; --card: #fff; --line: #dde3e0; --accent: #00796b }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4ebe8; --soft: #9fb0ab; --page: #121817; --card: #1b2322; --line: #2e3a38; --accent: #4db6a6 }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.6 system-ui, sans-serif }
main { max-width: 64rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem }
h1 { font-size: clamp(1.7rem, 5vw, 2.6rem); line-height: 1.15; margin: 0 0 .5rem; letter-spacing: -.02em }
h2 { font-size: 1.3rem; margin: 0 0 .3rem }
p { margin: .3rem 0 1rem; max-width: 46rem }
.soft, figcaption, td:last-child { color: var(--soft) }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: 1rem; margin: 1.5rem 0 2.5rem }
.number, section { background: var(--card); border: 1px solid var(--line); border-radius: .8rem; padding: 1.1rem 1.3rem }
.number b { display: block; font-size: 1.7rem; line-height: 1.3; color: var(--accent); font-variant-numeric: tabular-nums }
section { margin: 0 0 1.5rem }
figure { margin: .5rem 0 0 }
img { display: block; width: 100%; height: auto; background: #fff; border-radius: .5rem }
figcaption { font-size: .9rem; margin-top: .5rem }
pre { overflow-x: auto; background: var(--page); border: 1px solid var(--line); border-radius: .5rem; padding: .8rem 1rem; font-size: .85rem }
table { border-collapse: collapse; width: 100%; font-size: .9rem }
td { padding: .35rem 1rem .35rem 0; border-top: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere }
td:last-child { text-align: right; white-space: nowrap; padding-right: 0 }
a { color: var(--accent) }
"""


@dataclass(frozen=True)
class Typed:
    """A command that was run."""

    words: Sequence[str]
    """Behind `clove-hub`."""
    seconds: float


@dataclass(frozen=True)
class Demo:
    """The results of the demo."""

    rows: Sequence[Mapping[str, Any]]
    """The run's `metrics.jsonl`."""
    correspond: tuple[float, float]
    """Of random and of pre-trained weights, in percent."""
    found: int
    """Detections in the picture of six coins."""
    picture: Path
    """Of them; relative to the page, as the next."""
    typed: Sequence[Typed]
    folders: Sequence[Path]
    bundle: Path
    seconds: float


def page(demo: Demo) -> str:
    """The whole page."""
    first, last = demo.rows[0], demo.rows[-1]
    before, after = demo.correspond
    numbers = (
        (f"{demo.seconds / 60:.1f} min", "from photos to a detector"),
        (f"{last['step']}", "steps of pre-training, without labels"),
        (
            f"{before:.0f} → {after:.0f} %",
            "of cells matched to their place in another crop, before and after pre-training",
        ),
        (f"{demo.found}", "detections in a row of six coins that the detector was not trained on"),
    )
    cells = "".join(f'<div class="number"><b>{escape(value)}</b>{escape(what)}</div>' for value, what in numbers)
    positive, negative = (
        [round(row[key], 2) + 0 for row in (first, last)]  # + 0, because -0.00 would confuse
        for key in ("positive_cosine", "negative_cosine")
    )
    cosines = (
        f"The cosine similarity of matched cells went from {positive[0]:.2f} to {positive[1]:.2f}, that of the hardest negatives "
        f"from {negative[0]:.2f} to {negative[1]:.2f}. The spread of the teacher's embeddings is "
        f"{last['embedding_spread']:.2f} at the end (1: even, 0: collapsed)."
    )
    sections = (
        _section(
            "Before and after",
            "What resembles the marked point, with random weights and after pre-training? Minutes of training change little.",
            "compare.png",
            "Each photo with the first three principal components of its features as colors, and with the cosine similarity of "
            "every cell to the marked point.",
        ),
        _section(
            "Training",
            cosines,
            "curves.png",
            "The cosines of positives and negatives should separate, and the spread should stay near 1.",
        ),
        _section(
            "What CLoVE compares",
            "Cells of two crops that show the same place have the same color. The student's embedding of one is pulled toward the "
            "teacher's embedding of the other.",
            "matches.png",
            "Equal numbers mark the two cells that are nearest to each other. In a flipped crop, they run the other way.",
        ),
        _section(
            "Attention",
            "CLoVE's student computes the embedding of a cell by attention over all cells of the crop.",
            "attention.png",
            "The attention of each head for the circled cell; brighter is more.",
        ),
        _section(
            "A detector",
            "Faster R-CNN with this backbone, fine-tuned for 30 steps on crops of the lower rows of a photo of coins. The boxes "
            "were not drawn by hand: they come from a threshold, which misses two coins in the bright upper corner. The detector was "
            "not trained on the upper row, shown here.",
            str(demo.picture),
            "Detections with a score of at least 0.5. A useful detector needs more photos and more steps.",
        ),
    )
    rows = "".join(
        f"<tr><td><code>clove-hub {escape(shlex.join(one.words))}</code></td><td>{one.seconds:.0f} s</td></tr>"
        for one in demo.typed
    )
    places = ", ".join(f"<a href='{escape(str(one))}/'>{escape(str(one))}</a>" for one in demo.folders)
    python = escape(
        f"import timm\n\nmodel = timm.create_model('local-dir:{demo.bundle}', pretrained=True, features_only=True)"
    )
    next_steps = escape(
        "clove-hub check PHOTOS                                                        # decodes every image\n"
        "clove-hub pretrain clove_r50_continue data.path=PHOTOS run.output=runs/mine   # continues from trained weights\n"
        "clove-hub evaluate correspond --model runs/mine --data PHOTOS                 # are its features better?\n"
        "clove-hub export runs/mine --out bundles/mine --license mit\n"
        "clove-hub downstream torchvision detection --backbone bundles/mine --data LABELED --out runs/detector"
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>clove-hub: the demo</title>
<style>{STYLE}</style>
</head>
<body><main>
<h1>From photos to a detector</h1>
<p class="soft">A few photos, a small network and minutes of training: this page shows the steps, not what a backbone can do.</p>
<div class="numbers">{cells}</div>
{"".join(sections)}
<section><h2>Next, on your own photos</h2><pre>{next_steps}</pre>
<p class="soft">A few thousand photos and one GPU are a good start. Without a GPU, start with <code>clove-hub pretrain demo</code>.</p></section>
<section><h2>The commands, and how long each took</h2><table>{rows}</table><pre>{python}</pre>
<p>The output: {places}.</p></section>
</main></body>
</html>
"""


def _section(title: str, words: str, picture: str, caption: str) -> str:
    return (
        f"<section><h2>{escape(title)}</h2><p>{escape(words)}</p>"
        f'<figure><img src="{escape(picture)}" alt="{escape(caption)}"><figcaption>{escape(caption)}</figcaption></figure></section>\n'
    )
