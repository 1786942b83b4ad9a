"""`clove-hub evaluate --suite`: models and random ones by every protocol that the data folders allow, and a report.

A result that is already in the report's folder is not measured again, so an interrupted suite resumes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clove_hub.data.clips import LISTS as CLIP_LISTS
from clove_hub.data.masks import open_segmented, training_split
from clove_hub.data.voc import has_boxes
from clove_hub.global_state import kept_generators
from clove_hub.settings import plain

from ..weights import load, load_backbone
from ..weights.backbone import Backbone, Precision
from . import PROTOCOLS
from .collected import Row, collect, find
from .processes import gather, process_group, share, world
from .report import write_report
from .result import RANDOM, check_writable, write
from .run import find_protocol, make_settings, run_protocol

log = logging.getLogger(__name__)

Settings = Mapping[str, Any]
_MASKS = {"train_images": 100, "test_images": 50}
SUITES: Mapping[str, Mapping[str, Sequence[Settings]]] = {
    "quick": {
        "correspond": [{"images": 100}],
        "knn": [{}],
        "linear-svm": [{}],
        "dense-probe": [_MASKS | {"height": 240, "width": 320, "epochs": 10, "seeds": 1}],
        "linear-seg": [_MASKS | {"steps": 100, "batch": 4, "crop": 224}],
        "in-context": [_MASKS | {"size": 256, "memory": 20_000, "passes": 1}],
        "cluster": [{"test_images": 100, "size": 224, "clusters": (0, 100), "starts": 2, "seeds": 3}],
        "depth": [_MASKS | {"steps": 200, "batch": 4, "crop": (192, 256), "learning_rate": 0.01}],
        "match": [{"size": 384, "pairs": 100}],
        "discover": [{"images": 100}],
        "retrieve": [_MASKS],
        "propagate": [{"frames": 20}],
    },
    "paper": {name: [{}] for name in PROTOCOLS if name not in ("correspond", "dense-probe")},
    "all": {name: [{}] for name in PROTOCOLS}
    | {
        "linear-svm": [{}, {"rule": "vissl"}],
        "linear-seg": [{}, {"rule": "dinov2"}, {"rule": "dinov2-ms"}],
        "match": [{}, {"rule": "sd-dino"}],
        "discover": [{}, {"rule": "tokencut"}],
        "propagate": [{}, {"rule": "dino"}],
    },
}
"""The protocols of each suite, with the settings that differ from a protocol's own."""
PHOTOS = 4
"""In the picture of the features."""
RANDOM_SEEDS = 3
"""Random weights of each architecture that stand beside the models."""


@dataclass(frozen=True)
class Measurement:
    """One protocol on one folder."""

    protocol: str
    data: Path
    settings: Settings


@kept_generators()
def evaluate_suite(
    suite: str,
    models: Sequence[str | Path],
    data: Sequence[str | Path],
    out: str | Path,
    *,
    seed: int = 0,
    device: str | None = None,
    precision: Precision = "fp32",
) -> list[Row]:
    """Evaluate models, and random weights of their architectures, by the protocols of a suite.

    Writes `out/report.html`, `out/report.md`, their pictures, and each result below `out/results/MODEL/`, from where
    `clove-hub results out/results/MODEL --into BUNDLE` puts them into a card. The report also lists what a model does
    not support, with the reason.

    Args:
        suite: one of `SUITES`: `quick` in minutes on a CPU, `paper` by the rules and settings of papers, `all`.
        models: sources, as in `evaluate`.
        data: folders; each is read by the protocols that support its layout.
        out: a folder. Results that are there from the same suite on the same data are reused.
        seed: random seed.
        device: an accelerator by default if there is one.
        precision: of the forward pass, `fp32` or `bf16`.

    Returns:
        The rows of the report's tables.

    Raises:
        ValueError: there is no such suite, a model cannot be loaded, or no protocol of the suite reads a folder.

    Examples:
        >>> import clove_hub
        >>> rows = clove_hub.evaluate_suite("quick", ["random:test_resnet"], [photos], folder / "report", device="cpu")
        >>> [(row.record.protocol, row.record.model) for row in rows]
        [('correspond', 'random:test_resnet')]
        >>> (folder / "report" / "report.html").is_file()
        True
    """
    planned, unmeasured = plan(suite, [Path(folder).expanduser() for folder in data])
    out = Path(out)
    check_writable(out / "report.html")
    refused: list[str] = []
    with process_group(device) as place:
        for source, number in _sources(models, seed):
            backbone = load_backbone(source, seed=number)
            for measurement in planned:
                file = out / "results" / _file_name(measurement, backbone, number, precision)
                (done,) = gather(file.is_file() for _ in share([None]))
                if not done and (problem := _measure(measurement, backbone, number, place, precision, file)):
                    refused.append(f"{measurement.protocol} of {backbone.name}: {problem}")
        if world()[0]:
            return []
        if not (out / "results").is_dir():
            raise ValueError("nothing could be measured: " + "; ".join(refused))
        rows = collect(find([out / "results"]))
        pictures = _pictures(out / "pictures", [str(model) for model in models], planned, rows, seed, place)
        write_report(out, suite, rows, [*refused, *unmeasured], pictures)
    return rows


def plan(suite: str, folders: Sequence[Path]) -> tuple[list[Measurement], list[str]]:
    """The measurements of a suite on these folders, and sentences about those for which data are missing.

    Raises:
        ValueError: there is no such suite, a folder is absent, or no protocol of the suite reads it.
    """
    if suite not in SUITES:
        raise ValueError(f"there is no suite {suite!r}: choose one of {', '.join(SUITES)}")
    chosen, planned = SUITES[suite], []
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"the data {folder} is not a folder")
        readers = _readers(folder)
        own = [
            Measurement(name, folder, readers[name] | dict(settings))
            for name, variants in chosen.items()
            if name in readers
            for settings in variants
        ]
        if not own:
            raise ValueError(
                f"no protocol of the suite {suite} reads {folder}, whose layout suits "
                f"{', '.join(readers) or 'none'}: the suite has {', '.join(chosen)}; docs/protocols lists what each reads"
            )
        planned += own
    for measurement in planned:
        make_settings(measurement.protocol, measurement.settings)
    known = {measurement.protocol for measurement in planned}
    return planned, [f"{name}: none of the folders has what it reads" for name in chosen if name not in known]


def _readers(folder: Path) -> dict[str, dict[str, Any]]:
    """The protocols that know the layout of a folder, with the names of its splits."""
    found: dict[str, dict[str, Any]] = {}
    if any((folder / name).is_file() for name in CLIP_LISTS) and (folder / "Annotations").is_dir():
        found["propagate"] = {}
    if (folder / "train").is_dir() and (folder / "val").is_dir() and not (folder / "annotations").is_dir():
        found |= {"knn": {}, "linear-svm": {}}
    if list((folder / "ImageSets" / "Main").glob("*_trainval.txt")):
        found["linear-svm"] = {}
    if has_boxes(folder) or list((folder / "annotations").glob("instances_*.json")):
        found["discover"] = {}
    if (folder / "PairAnnotation").is_dir():
        found["match"] = {}
    if (folder / "nyu_train.txt").is_file() or (folder / "depth").is_dir():
        found["depth"] = {}
    elif test := next((name for name in ("val", "test") if _has_masks(folder, name)), None):
        both = {"train": training_split(folder), "test": test}
        found |= dict.fromkeys(("dense-probe", "linear-seg", "in-context", "retrieve"), both) | {
            "cluster": {"test": test}
        }
    return found or {"correspond": {}}


def _has_masks(folder: Path, split: str) -> bool:
    try:
        return bool(open_segmented(folder, split).pairs)
    except ValueError:
        return False


def _sources(models: Sequence[str | Path], seed: int) -> list[tuple[str, int]]:
    """The models, each with the seed, and after them random weights of each of their architectures, with several."""
    given = [str(model) for model in models]
    named = {model for model in given if model.startswith(RANDOM)}
    beside = {f"{RANDOM}{load(model).architecture}" for model in given if model not in named}
    references = [(source, seed + number) for source in sorted(beside - named) for number in range(RANDOM_SEEDS)]
    return [(model, seed) for model in given] + references


def _measure(
    measurement: Measurement, backbone: Backbone, seed: int, place: str, precision: Precision, file: Path
) -> str:
    """Measures and writes the record; why it could not, or nothing."""
    log.info("%s on %s: %s", measurement.protocol, measurement.data, backbone.name)
    args = backbone.weights.model_args if backbone.weights else {}
    try:
        record = run_protocol(
            measurement.protocol,
            backbone.model.to(place),
            backbone.preprocessing,
            measurement.data,
            measurement.settings,
            seed,
            backbone.name,
            args,
            precision,
        )
    except ValueError as error:
        log.warning("%s of %s is not measured: %s", measurement.protocol, backbone.name, error)
        return str(error)
    if not world()[0]:
        write(record, file)
    return ""


def _pictures(
    out: Path, models: Sequence[str], planned: Sequence[Measurement], rows: Sequence[Row], seed: int, place: str
) -> list[tuple[str, str]]:
    """Draws the features of the models beside random ones on a few photos, and the figures as bars.

    Returns:
        The files below the report's folder, and what they show.
    """
    from clove_hub.figures import bars, compare, output, photos  # figures imports evaluation

    out.mkdir(parents=True, exist_ok=True)
    output.save(bars.draw_summary(rows, 14), out / "figures.png")
    shown = [("pictures/figures.png", "The first figure of each protocol; whiskers are deviations over the seeds.")]
    if paths := _photos(planned):
        references = [source for source, number in _sources(models, seed) if source not in models and number == seed]
        loaded = {source: load_backbone(source, seed=seed) for source in dict.fromkeys([*models, *references])}
        backbones = {name: replace(one, model=one.model.to(place)) for name, one in loaded.items()}
        try:
            picture = compare.draw_backbones(backbones, photos.load_photos(paths, PHOTOS))
        except ValueError as error:  # a model that takes images of one size only
            log.warning("the features are not drawn: %s", error)
        else:
            output.save(picture, out / "features.png")
            words = (
                "Principal components of the last feature map, three as colors, and what resembles the marked point."
            )
            shown.insert(0, ("pictures/features.png", words))
    return shown


def _photos(planned: Sequence[Measurement]) -> list[Path]:
    """Where photos to draw are: a folder without labels, or else those that have a mask."""
    for one in planned:
        if one.protocol == "correspond":
            return [one.data]
        if one.protocol == "dense-probe":
            return [photo for photo, _ in open_segmented(one.data, one.settings["test"]).pairs]
    return []


def _file_name(measurement: Measurement, backbone: Backbone, seed: int, precision: Precision) -> str:
    """Differs where any of the model's values, the seed, the settings or the folder does."""
    assert backbone.weights is not None
    settings = plain(make_settings(measurement.protocol, measurement.settings))
    version = find_protocol(measurement.protocol).VERSION
    asked = [
        measurement.protocol,
        version,
        settings,
        str(measurement.data.resolve()),
        backbone.weights.fingerprint,
        seed,
        precision,
    ]
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]
    words = [backbone.name, measurement.protocol, measurement.data.resolve().name]
    model, *rest = (re.sub(r"[^A-Za-z0-9._]+", "_", word).strip("_.")[-60:] for word in words)
    return f"{model}/{'-'.join([*rest, digest])}.json"
