"""`clove-hub demo`: the whole road in a few minutes, by the commands that a user would type.

Photos -> pre-training -> bundle -> timm -> Detectron2, and a page to look at. It starts the commands as processes of
their own, so that what it shows is what they do.
"""

from __future__ import annotations

import argparse
import html
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import timm

from clove_hub.command import Command, user_path
from clove_hub.data.finder import some_images

# The photographs, not the test charts, among the pictures that scikit-image installs.
SCIKIT_IMAGE = """
astronaut.png brick.png camera.png chelsea.png clock_motion.png coffee.png coins.png grass.png gravel.png
hubble_deep_field.jpg moon.png motorcycle_left.png motorcycle_right.png retina.jpg rocket.jpg
"""
SHOWN = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=user_path, default=Path("runs/demo"), help="folder for all that is made")
    parser.add_argument("--data", type=user_path, help="a folder of your own photos instead of scikit-image's")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the recipe")


def run(options: argparse.Namespace) -> int:
    """Makes everything below --out, and the page that shows it.

    Raises:
        ValueError: --data holds no photos, or without it scikit-image is not installed.
        subprocess.CalledProcessError: one of the commands failed; it has said why.
    """
    began, out = time.monotonic(), options.out
    run, bundle, detectron2 = out / "run", out / "bundle", out / "detectron2" / "backbone.pth"
    folder = options.data or example_photos(out / "photos")
    photos = some_images(folder).paths
    shown = [str(photo) for photo in photos if photo.name in SHOWN] or [str(photo) for photo in photos[:5]]
    one = shown[min(1, len(shown) - 1)]
    # Five epochs of many photos would be longer than the run: then a fifth of its 150 steps of 8 photos.
    warmup = f"schedule.warmup_epochs={min(5, 240 / len(photos)):g}"
    commands = [
        ["pretrain", "demo", f"data.path={folder}", f"run.output={run}", warmup, *options.overrides],
        ["export", str(run), "--out", str(bundle)],
        ["convert", str(bundle), "--to", "detectron2", "--out", str(detectron2)],
        ["figures", "curves", str(run), "--out", str(out / "curves.png")],
        ["figures", "matches", str(run), "--data", one, "--out", str(out / "matches.png")],
        ["figures", "attention", str(run), "--data", one, "--out", str(out / "attention.png")],
        ["figures", "pca", "--model", str(bundle), "--data", *shown, "--out", str(out / "pca.png")],
    ]
    detectron2.parent.mkdir(parents=True, exist_ok=True)
    for command in commands:
        print(f"\n$ clove-hub {shlex.join(command)}", flush=True)
        subprocess.run([sys.executable, "-m", "clove_hub.cli", *command], check=True)

    print(f"\n>>> timm.create_model('local-dir:{bundle}', pretrained=True)", flush=True)
    model = timm.create_model(f"local-dir:{bundle}", pretrained=True).eval()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{type(model).__name__}, {parameters / 1e6:.1f} M parameters, {model.num_features} features")

    page = out / "index.html"
    page.write_text(render_page(out, commands, run, bundle, detectron2, time.monotonic() - began))
    print(f"\nLook at {page}")
    return 0


DEMO = Command(__doc__, add_arguments, run)


def example_photos(folder: Path) -> Path:
    """The photographs that come with scikit-image, in a folder of their own, as a user would have them."""
    try:
        import skimage
    except ImportError as error:
        raise ValueError(
            "the demo's photos come with scikit-image, which is not installed: pip install 'clove-hub[demo]', "
            "or give a folder of your own with --data"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    for name in SCIKIT_IMAGE.split():
        if (photo := Path(skimage.__file__).parent / "data" / name).is_file():
            (folder / name).write_bytes(photo.read_bytes())
    return folder


def render_page(out: Path, commands: list[list[str]], run: Path, bundle: Path, detectron2: Path, seconds: float) -> str:
    """What was made, where it lies, and how to go on."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first, last = rows[0], rows[-1]
    made = (
        ("the run", run, "recipe.yaml, metrics.jsonl, checkpoints"),
        ("the bundle", bundle, "model.safetensors, config.json, model card, provenance: what timm loads"),
        ("for Detectron2", detectron2.parent, "backbone.pth and the settings that belong to it"),
    )
    things = "".join(
        f"<tr><td>{name}</td><td><a href='{path.relative_to(out)}/'>{html.escape(str(path))}</a></td><td>{what}</td></tr>"
        for name, path, what in made
        if path.exists()
    )
    typed = html.escape("\n".join(f"clove-hub {shlex.join(command)}" for command in commands))
    python = html.escape(f"import timm\nmodel = timm.create_model('local-dir:{bundle}', pretrained=True)")
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>clove-hub demo</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem}}img{{width:100%}}
pre{{background:#f4f4f4;padding:.8rem;overflow-x:auto}}td{{padding:.2rem 1rem .2rem 0;vertical-align:top}}</style>
<h1>From photos to a backbone in {seconds:.0f} seconds</h1>
<p>{last["step"]} steps. The cosine of matched cells went from {first["positive_cosine"]:.2f} to
{last["positive_cosine"]:.2f}, that of the hardest negatives from {first["negative_cosine"]:.2f} to
{last["negative_cosine"]:.2f}; the teacher's embeddings are spread by {last["embedding_spread"]:.2f} (1 is even, 0
collapsed). So few steps on so few photos show the road and make no useful backbone.</p>
<table>{things}</table>
<h2>The run</h2><img src="curves.png" alt="loss, cosines and signs of collapse over the steps">
<h2>What CLoVE compares</h2>
<p>Cells of two views that show the same place have the same color and number: the student's embedding of one is drawn to the
teacher's of the other. The numbers of a flipped view run the other way.</p>
<img src="matches.png" alt="a photo with two crops, and their matched cells">
<h2>What a cell looks at</h2>
<p>CLoVE's student describes a cell by its context: brighter is what each head takes from where, for the ringed cell.</p>
<img src="attention.png" alt="a photo, and the attention of each head for three of its points">
<h2>What the backbone sees</h2>
<p>The first three principal components of the last feature map, the same for all photos.</p>
<img src="pca.png" alt="photos above their feature maps">
<h2>What was typed</h2><pre>{typed}</pre><pre>{python}</pre>
</html>
"""
