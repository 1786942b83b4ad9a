"""The complete config of a task for MMSegmentation 1.x: the protocol, the backbone's settings, the user's changes.

Plain data, written as one file of assignments that MMEngine reads.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from clove_hub.documents import read_document, resolved
from clove_hub.settings import nearest
from clove_hub.weights import Weights

from ..convert import mmseg_model
from .layouts import ROOTS
from .tasks import Normalization, Task

BATCH = 16
"""Images per iteration."""
PARTS = 10
"""Number of checkpoints and evaluations in a run."""
ITERATIONS = "train_cfg.max_iters"
OURS = ("custom_imports", "custom_hooks")
Config = dict[str, Any]


def resolve(
    task: Task,
    backbone: Weights,
    weights: Path,
    data: str,
    gpus: int,
    normalization: Normalization | None = None,
    overrides: Sequence[str] = (),
) -> tuple[Config, tuple[str, ...]]:
    """The config, and its deviations from the protocol, in sentences.

    Args:
        weights: where the converted backbone is, or will be.
        data: the folder of data sets.
        gpus: GPUs that share an iteration's images; 0 for the CPU, which has no SyncBN and uses BN.
        normalization: by default the task's own.
        overrides: `key=value`, with keys as in MMEngine's `--cfg-options`.

    Raises:
        ValueError: MMSegmentation has no such network, a key is unknown, or the GPUs do not divide the images.
    """
    if BATCH % max(gpus, 1):
        raise ValueError(f"{BATCH} images per iteration are not divisible among {gpus} GPUs: choose 1, 2, 4, 8 or 16")
    notes = []
    config = protocol(task, backbone, weights, data, BATCH // max(gpus, 1), gpus > 0)
    if not gpus:
        notes.append("BN in place of SyncBN, which the CPU does not have")
    chosen = normalization or task.normalization
    if chosen == "slotcon":
        seen = backbone.preprocessing
        config["model"]["data_preprocessor"] |= {"mean": list(seen.mean), "std": list(seen.std)}
    if chosen != task.normalization:
        notes.append(f"normalization={chosen} in place of the protocol's {task.normalization}")
    given = dict(_parsed(override) for override in overrides)
    if ITERATIONS in given:
        notes += _shorten(config, given[ITERATIONS], task.iterations, given)
    for key, value in given.items():
        _set(config, key, value)
        notes.append(f"{key}={value}, as given")
    return config, tuple(notes)


def protocol(task: Task, backbone: Weights, weights: Path, data: str, batch: int, sync: bool) -> Config:
    """The protocol on a backbone, with the normalization that the backbone was trained with.

    Args:
        batch: images per iteration on one device.
        sync: whether batch norm is synchronized.
    """
    network = backbone.resnet("MMSegmentation")
    norm = {"type": "SyncBN" if sync else "BN", "requires_grad": True}
    model = mmseg_model(backbone.architecture, backbone.preprocessing, weights)
    loss: Config = {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0}
    head: Config = {
        "type": "FCNHead",
        "in_channels": network.channels,
        "in_index": 3,
        "channels": 256,
        "num_convs": 2,
        "kernel_size": 3,
        "dilation": 6,
        "concat_input": False,
        "dropout_ratio": 0.0,
        "num_classes": task.classes,
        "norm_cfg": norm,
        "align_corners": True,
        "loss_decode": loss,
    } | dict(task.head)
    model["data_preprocessor"] |= {"size": (task.crop, task.crop)}
    model["backbone"] |= {
        "num_stages": 4,
        "out_indices": (0, 1, 2, 3),
        "strides": task.strides,
        "dilations": task.dilations,
        "contract_dilation": True,  # the first block has the finer map as input, and half the dilation
        "norm_cfg": norm,
        "norm_eval": False,
    }
    model |= {"type": "EncoderDecoder", "decode_head": head}
    if task.auxiliary:
        own = {"in_channels": network.channels // 2, "in_index": 2, "channels": 256, "num_convs": 1}
        model["auxiliary_head"] = head | own | {"concat_input": False, "loss_decode": loss | {"loss_weight": 0.4}}
    model |= {"train_cfg": {}, "test_cfg": dict(task.test)}
    train, test = (_datasets(task, data, split) for split in ("train", "test"))
    part = task.iterations // PARTS
    loaders = {"num_workers": 4, "persistent_workers": True}
    testing = loaders | {"batch_size": 1, "sampler": {"type": "DefaultSampler", "shuffle": False}, "dataset": test}
    optimizer = {"type": "SGD", "lr": task.learning_rate, "momentum": 0.9, "weight_decay": task.weight_decay}
    return {
        "default_scope": "mmseg",
        "model": model,
        "train_dataloader": loaders
        | {"batch_size": batch, "sampler": {"type": "InfiniteSampler", "shuffle": True}, "dataset": train},
        "val_dataloader": testing,
        "test_dataloader": copy.deepcopy(testing),
        "val_evaluator": {"type": "IoUMetric", "iou_metrics": ["mIoU"]},
        "test_evaluator": {"type": "IoUMetric", "iou_metrics": ["mIoU"]},
        "optim_wrapper": {"type": "OptimWrapper", "optimizer": optimizer},
        "param_scheduler": [copy.deepcopy(dict(task.scheduler))],
        "train_cfg": {"type": "IterBasedTrainLoop", "max_iters": task.iterations, "val_interval": part},
        "val_cfg": {"type": "ValLoop"},
        "test_cfg": {"type": "TestLoop"},
        "default_hooks": {
            "timer": {"type": "IterTimerHook"},
            "logger": {"type": "LoggerHook", "interval": 50, "log_metric_by_epoch": False},
            "param_scheduler": {"type": "ParamSchedulerHook"},
            "checkpoint": {"type": "CheckpointHook", "by_epoch": False, "interval": part, "max_keep_ckpts": 2},
            "sampler_seed": {"type": "DistSamplerSeedHook"},
        },
        # MMEngine only logs unmatched tensors; RequireBackbone stops a training that would start from other weights.
        "custom_imports": {"imports": [f"{__package__}.hooks"], "allow_failed_imports": False},
        "custom_hooks": [
            {"type": "RequireBackbone", "file": str(weights.resolve())},
            {"type": "PlainCheckpoints"},
            {"type": "StopRequests"},
            {"type": "RequireFinite", "interval": 50},
        ],
        "env_cfg": {
            "cudnn_benchmark": True,
            "mp_cfg": {"mp_start_method": "fork", "opencv_num_threads": 0},
            "dist_cfg": {"backend": "nccl"},
        },
        "log_processor": {"by_epoch": False},
        "log_level": "INFO",
        "load_from": None,
        "resume": False,
    }


# ---- data ------------------------------------------------------------------------------------------------------------


def _datasets(task: Task, data: str, split: str) -> Config:
    """The images of a split, with their pipeline."""
    labels: Config = {"type": "LoadAnnotations"}
    if task.layout == "ade20k":
        labels["reduce_zero_label"] = True  # 0 is not a class
    if split == "train":
        square = (task.crop, task.crop)
        pipeline: list[Config] = [
            {"type": "LoadImageFromFile"},
            labels,
            {"type": "RandomResize", "scale": task.scale, "ratio_range": (0.5, 2.0), "keep_ratio": True},
            {"type": "RandomCrop", "crop_size": square, "cat_max_ratio": task.cat_max_ratio},
            {"type": "RandomFlip", "prob": 0.5},
            *map(dict, task.train_changes),
            {"type": "PackSegInputs"},
        ]
    else:
        # The mask is loaded after resizing: classes are scored at the image's own size.
        resize = {"type": "Resize", "scale": task.scale, "keep_ratio": True}
        pipeline = [{"type": "LoadImageFromFile"}, resize, labels, {"type": "PackSegInputs"}]
    parts = [
        part | {"pipeline": copy.deepcopy(pipeline)}
        for part in _parts(task.layout, f"{data}/{ROOTS[task.layout]}", split)
    ]
    return parts[0] if len(parts) == 1 else {"type": "ConcatDataset", "datasets": parts}


def _parts(layout: str, root: str, split: str) -> list[Config]:
    def part(kind: str, images: str, masks: str, **more: str) -> Config:
        return {"type": kind, "data_root": root, "data_prefix": {"img_path": images, "seg_map_path": masks}} | more

    if layout == "voc":
        lists = {"train": (("SegmentationClass", "train"), ("SegmentationClassAug", "aug"))}
        return [
            part("PascalVOCDataset", "JPEGImages", masks, ann_file=f"ImageSets/Segmentation/{name}.txt")
            for masks, name in lists.get(split, (("SegmentationClass", "val"),))
        ]
    if layout == "cityscapes":
        folder = "train" if split == "train" else "val"
        return [part("CityscapesDataset", f"leftImg8bit/{folder}", f"gtFine/{folder}")]
    folder = "training" if split == "train" else "validation"
    return [part("ADE20KDataset", f"images/{folder}", f"annotations/{folder}")]


# ---- changes ---------------------------------------------------------------------------------------------------------


def _parsed(override: str) -> tuple[str, Any]:
    key, equals, value = override.partition("=")
    if not equals:
        raise ValueError(f"the change {override!r} is not key=value, as in {ITERATIONS}=20000")
    return key, resolved(read_document(value, override))


def _shorten(config: Config, iterations: Any, usual: int, given: Mapping[str, Any]) -> list[str]:
    """Scale the iteration-based settings, unless they are given, to another run length; return the changes."""
    if not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"{ITERATIONS} is {iterations}; expected a whole number from 1")
    keys = ["train_cfg.val_interval", "default_hooks.checkpoint.interval"]
    keys += [f"param_scheduler.0.{name}" for name in ("milestones", "end") if name in config["param_scheduler"][0]]
    notes = []
    for key in keys:
        if key in given:
            continue
        inside, last = _inside(config, key)
        before = inside[last]
        new = [max(round(one * iterations / usual), 1) for one in (before if isinstance(before, list) else [before])]
        inside[last] = new if isinstance(before, list) else new[0]
        notes.append(f"{key} {before} -> {inside[last]}")
    return notes


def _set(config: Config, key: str, value: Any) -> None:
    inside, last = _inside(config, key)
    inside[last] = tuple(value) if isinstance(inside[last], tuple) and isinstance(value, list) else value


def _inside(config: Config, key: str) -> tuple[Any, Any]:
    """The dictionary or list that contains the entry of a dotted key, and the entry's key or index.

    Raises:
        ValueError: there is no such key.
    """
    inside: Any = config
    *folders, last = key.split(".")
    for place, name in enumerate([*folders, last]):
        known = (
            [str(one) for one in (inside if isinstance(inside, MutableMapping) else range(len(inside)))]
            if (isinstance(inside, MutableMapping | list))
            else []
        )
        if name not in known:
            where = ".".join(folders[:place]) or "the config"
            raise ValueError(f"unknown key {key}{nearest(name, known)}: {where} has {', '.join(known) or 'no keys'}")
        if place < len(folders):
            inside = inside[int(name) if isinstance(inside, list) else name]
    return inside, int(last) if isinstance(inside, list) else last


def plain(config: Config) -> Config:
    """The config for MMSegmentation's own tools, also without clove-hub.

    It omits clove-hub's hooks, which only training needs, and contains the image pipeline of `inference_model`.
    """
    kept = {key: value for key, value in config.items() if key not in OURS}
    return kept | {"test_pipeline": config["test_dataloader"]["dataset"]["pipeline"]}
