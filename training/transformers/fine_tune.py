"""One fine-tuning run by transformers' own Trainer, from data and backbone to results.json: check, build, train, score."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from clove_hub.evaluation.result import CHANGED, fine_tuning_record, versions, write
from clove_hub.settings import differences, flat
from clove_hub.weights import Weights, load
from clove_hub.weights.transformers import MODELS, open_model, quiet, write_model

from ..finetune.forms import RandomCrops
from ..finetune.settings import (
    DetectionImages,
    DetectionNetwork,
    FinetuneRun,
    FinetuneSettings,
    SegmentationNetwork,
)
from ..finetune.splits import TaskData, load_data, require_sound
from ..run.device import make_accelerator
from ..run.folder import RunFolder
from ..run.loader import explained
from ..run.peers import Peers, named
from ..run.sampler import divide_batch
from ..run.stopping import FINISHED, StopRequests, never
from .card import write_card
from .examples import size_of
from .scoring import evaluate
from .settings import FREE_HERE, ModelImages, ModelSettings, as_sections, is_changed
from .train import train

log = logging.getLogger(__name__)

VERSION = 1
"""Version of the rule, incremented when the same settings no longer give the same figure."""
MODEL = "model"
"""The folder in a run's folder that `from_pretrained` loads."""
SETUP = "setup.json"


def run(settings: ModelSettings, backbone: str, data: Path, out: Path, stop_requests: StopRequests = never) -> int:
    """Fine-tune and score; return the exit code: FINISHED, STOPPED or INTERRUPTED.

    Args:
        stop_requests: `listen` if signals stop the run, as for a command.

    Raises:
        ValueError: wrong input, found before the first step.
        FloatingPointError: a non-finite loss.
        OSError: a file of the run cannot be written, a data-loading worker or another process of the run has ended.
    """
    accelerator = make_accelerator(settings.run.precision, settings.run.timeout)
    peers = Peers(settings.run.timeout)

    # ---- data and backbone -------------------------------------------------------------------------------------
    with peers.together():
        micro = require_batch(settings, peers.world)
        if not data.is_dir():
            raise ValueError(f"--data {data} is not a folder")
        source = load(backbone, seed=settings.run.seed)
        loaded = load_data(_as_finetune(settings), data, source.preprocessing.mean)
        steps = settings.steps(len(loaded.train))
        settings.warmup(steps)
    facts: dict[str, Any] = {
        "settings": json.loads(json.dumps(as_sections(settings))),
        "backbone": source.fingerprint,
        "normalization": source.preprocessing.normalization,
        "data": loaded.fingerprint,
    }
    peers.require_same(flat(facts))
    with RunFolder(out, peers, settings.run.keep, "--out") as folder:
        with peers.together():
            before = _require_same(out, facts)
        if peers.from_main(before and (out / "results.json").is_file()):
            log.info("%s is finished (%d steps); nothing to do", out, steps)
            return FINISHED
        require_sound(folder, loaded, accelerator, settings.data.workers)
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="clove-hub-") as place, peers.together():
            network, processor, prefix = build(source, settings, loaded, Path(place))
        folder.write_text(SETUP, json.dumps(facts, indent=1) + "\n")
        log.info(
            "%s: %s on %s (%s), all tensors of the backbone loaded; %d images, %d steps of %d (%.3g epochs)",
            *(out, settings.model, source.architecture, source.what, len(loaded.train), steps),
            *(settings.batch.total, steps * settings.batch.total / len(loaded.train)),
        )

        # ---- training ------------------------------------------------------------------------------------------
        with quiet(), named(), explained(), stop_requests() as asked_to_stop:
            code = train(
                *(settings, network, prefix, loaded.train, processor),
                *(folder, accelerator, steps, micro, asked_to_stop),
            )
            if code:
                return code

            # ---- the published model and its figures -----------------------------------------------------------
            kind = MODELS[settings.model]
            with peers.together():
                if peers.main:
                    save(network, processor, out / MODEL)
            metrics, items, absent = evaluate(
                *(out / MODEL, kind, loaded, accelerator.device, asked_to_stop, settings.data.absent_as_zero)
            )
        if absent:
            log.warning("classes without a validation image, which the scores do not cover: %s", ", ".join(absent))
        with peers.together():
            if peers.main:
                detectors = [] if loaded.task == "segmentation" else ["pycocotools"]
                record = fine_tuning_record(
                    *(backbone, source, {settings.run.seed: metrics}),
                    protocol=f"transformers-{settings.model.replace('_', '-')}",
                    version=VERSION,
                    rule=CHANGED if is_changed(settings) else "own",
                    split=settings.data.test,
                    data=loaded.scored,
                    settings=facts["settings"] | {"steps": steps, "train_images": len(loaded.train)},
                    versions=versions("transformers", "accelerate", *detectors),
                    # The time before a stop is not known.
                    seconds=None if before else round(time.perf_counter() - began, 3),
                    items=items,
                    absent=absent,
                    preprocessing=facts["normalization"] | {"size": size_of(settings.images)},
                )
                write_card(out / MODEL, kind, record, loaded.names)
                write(record, out / "results.json")
                said = ", ".join(f"{name} {value:.1f}" for name, value in metrics.items())
                log.info("%s on %d images: %s -> %s", settings.model, len(loaded.test), said, out / "results.json")
    return FINISHED


def build(source: Weights, settings: ModelSettings, loaded: TaskData, place: Path) -> tuple[Any, Any, str]:
    """The model on the backbone, with the data's classes; its image processor; and the backbone's path inside.

    Args:
        place: a folder for temporary files.

    Raises:
        ValueError: as `write_model` and `open_model`, or the images are too small for the model's queries.
    """
    written = write_model(source, settings.model, place, place)
    for note in written.notes:
        log.info("%s", note)
    network = open_model(place, settings.model, written.prefix, settings.run.seed, loaded.names, settings.network)
    require_cells(network.config, settings.images)
    processors: Any = transformers.AutoImageProcessor
    processor = processors.from_pretrained(place, size=size_of(settings.images))
    return network, processor, written.prefix


def save(network: Any, processor: Any, folder: Path) -> None:
    """Write the folder that `from_pretrained` loads, atomically.

    Raises:
        ValueError: the loaded model differs from the network, which is a fault in transformers.
    """
    draft = folder.with_name(f".{folder.name}.partial")
    for old in (draft, folder):
        shutil.rmtree(old, ignore_errors=True)
    network.save_pretrained(draft)
    processor.save_pretrained(draft)
    for file in draft.iterdir():
        file.chmod(0o644)  # safetensors writes files that only their owner can read
    opened = type(network).from_pretrained(draft).state_dict()
    held = network.state_dict()
    wrong = list(held.keys() ^ opened.keys())
    wrong += [name for name in held.keys() & opened.keys() if not torch.equal(held[name].cpu(), opened[name])]
    if wrong:
        raise ValueError(
            f"transformers {transformers.__version__} reads {len(wrong)} tensors other than it wrote them, such as "
            f"{min(wrong)}: install another version; the same command then writes {folder}"
        )
    draft.rename(folder)


# ---- pieces ----------------------------------------------------------------------------------------------------------


def require_batch(settings: ModelSettings, world: int) -> int:
    """Images per forward pass of a process.

    Raises:
        ValueError: the batch is not divisible, or too small for the model's batch norm.
    """
    micro, _ = divide_batch(settings.batch.total, settings.batch.per_device or settings.batch.total, world)
    if settings.model == "upernet" and micro < 2:
        raise ValueError(
            f"batch.total={settings.batch.total} gives forward passes of one image, but upernet has a batch norm over one value of "
            f"each image: choose batch.total={2 * world} or more"
            + ("" if settings.batch.per_device is None else ", and batch.per_device of at least 2")
        )
    return micro


def require_cells(config: Any, images: ModelImages) -> None:
    """Raise ValueError if rt_detr_v2 or d_fine has more queries than the smallest images have cells to choose them from."""
    if (strides := getattr(config, "feat_strides", None)) is None:
        return
    side = min(size_of(images, draw)["height"] for draw in (0.0, None))
    cells = sum((side // stride) ** 2 for stride in strides)
    if cells < config.num_queries:
        raise ValueError(
            f"network.num_queries={config.num_queries}: the smallest images, of {side}x{side} pixels, have {cells} cells to "
            f"choose queries from: raise images.size (now {images.size}), or choose network.num_queries={cells} or less"
        )


def _as_finetune(settings: ModelSettings) -> FinetuneSettings:
    """The settings in the form that the data set reader takes."""
    run = FinetuneRun(seed=settings.run.seed)
    if settings.model in ("mask2former", "upernet"):
        images = RandomCrops(settings.images.size)
        return FinetuneSettings("", "segmentation", images, SegmentationNetwork(), data=settings.data, run=run)
    return FinetuneSettings("", "detection", DetectionImages(), DetectionNetwork(), data=settings.data, run=run)


def _require_same(out: Path, facts: Mapping[str, Any]) -> bool:
    """Whether the folder already holds this run.

    Raises:
        ValueError: it holds another one.
    """
    try:
        found = json.loads((out / SETUP).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    changed = differences(found.pop("settings"), facts["settings"], FREE_HERE)
    changed += [f"another {key}" for key in found if found[key] != facts[key]]
    if changed:
        raise ValueError(
            f"{out} holds a run with other settings ({'; '.join(changed)}): start with the old ones to resume, or choose another "
            "--out"
        )
    return True
