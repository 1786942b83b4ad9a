"""Inference with a fine-tuned model: loading it from its folder, and its predictions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from clove_hub.backbones import build_model
from clove_hub.data.coco import Category, CocoSplit
from clove_hub.data.images import read_image
from clove_hub.data.masks import Segmented
from clove_hub.settings import build as build_settings
from clove_hub.settings import nearest as nearest_name
from clove_hub.weights import Weights
from clove_hub.weights.architectures import architecture
from clove_hub.weights.finetuned import FineTuned, make_config, read_finetuned
from clove_hub.weights.weights import told
from clove_hub.zoo.checks import require_names_and_shapes

from .crops import for_testing, nearest
from .networks import build
from .scores import as_results
from .settings import PRESETS, DetectionImages, FinetuneSettings, as_sections

Image = NDArray[np.uint8]
BOX_CLASSIFIER = "roi_heads.box_predictor.cls_score.bias"


@dataclass(frozen=True)
class Found:
    """Predictions for an image: N objects by descending score; for segmentation, a class for each pixel."""

    categories: tuple[Category, ...]
    size: tuple[int, int]
    """Height and width of the image in pixels."""
    tensors: Mapping[str, Tensor]
    """Outputs of torchvision's detectors, labels from 1; for segmentation `classes` (H, W), uint8."""

    @property
    def boxes(self) -> NDArray[np.float32]:
        """(N, 4): x0, y0, x1, y1 in pixels of the image."""
        return np.asarray(self.tensors["boxes"])

    @property
    def scores(self) -> NDArray[np.float32]:
        """(N,), from 0 to 1."""
        return np.asarray(self.tensors["scores"])

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,): indices into `categories`, from 0."""
        return np.asarray(self.tensors["labels"]) - 1

    @property
    def names(self) -> list[str]:
        """The names of the N objects' categories."""
        return [self.categories[label].name for label in self.labels.tolist()]

    @property
    def masks(self) -> NDArray[np.bool_] | None:
        """(N, H, W); None if the task has none."""
        return np.asarray(self.tensors["masks"][:, 0] >= 0.5) if "masks" in self.tensors else None

    @property
    def keypoints(self) -> NDArray[np.float32] | None:
        """(N, K, 3): x, y in pixels, and 1; None if the task has none."""
        return np.asarray(self.tensors["keypoints"]) if "keypoints" in self.tensors else None

    @property
    def classes(self) -> NDArray[np.uint8] | None:
        """(H, W): indices into `categories`; only for segmentation."""
        return np.asarray(self.tensors["classes"]) if "classes" in self.tensors else None

    def coco(self, image: int) -> list[dict[str, Any]]:
        """The predictions in COCO's results format: one row per object or, for segmentation, per class that occurs.

        Args:
            image: the image's id.
        """
        if "classes" not in self.tensors:
            return as_results(image, self.tensors, self.categories)
        from pycocotools import mask

        classes = self.tensors["classes"].numpy()
        rows = []
        for number in np.unique(classes).tolist():
            rle = mask.encode(np.asfortranarray(classes == number, dtype=np.uint8))
            segmentation = {"size": rle["size"], "counts": rle["counts"].decode("ascii")}
            rows.append({"image_id": image, "category_id": self.categories[number].id, "segmentation": segmentation})
        return rows


@dataclass(frozen=True)
class Detector:
    """A fine-tuned model in eval mode."""

    network: nn.Module
    """Takes a list of images (3, H, W) with values from 0 to 1, and normalizes and resizes them itself."""
    settings: FinetuneSettings
    """The fine-tuning settings that define the network: `task`, `network`, `images`."""
    stored: FineTuned
    """The content of its folder."""

    @property
    def categories(self) -> tuple[Category, ...]:
        return self.stored.categories

    @torch.no_grad()
    def find(self, image: Image, threshold: float = 0.0) -> Found:
        """Predict the objects or classes in an image.

        Args:
            image: uint8 RGB (H, W, 3), upright.
            threshold: objects with a lower score are left out.

        Raises:
            ValueError: it is not such an image, or the threshold is not from 0 to 1.
        """
        require_threshold(threshold)
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(
                f"an image {image.shape} of {image.dtype} was given; expected (height, width, 3) of uint8, RGB"
            )
        height, width = image.shape[:2]
        pixels = torch.from_numpy(np.require(image, requirements=("C", "W"))).permute(2, 0, 1).contiguous()
        images = self.settings.images
        if not isinstance(images, DetectionImages):
            pixels = for_testing(pixels, images)
        device = next(self.network.parameters()).device
        found = self.network([pixels.to(device).float() / 255])[0]
        if not isinstance(images, DetectionImages):
            classes = nearest(found.argmax(0).to(torch.uint8), (height, width)).cpu()
            return Found(self.categories, (height, width), {"classes": classes})
        kept = found["scores"] >= threshold
        return Found(self.categories, (height, width), {key: value[kept].cpu() for key, value in found.items()})

    def predict(self, images: Iterable[str | Path | Image], threshold: float = 0.0) -> Iterator[Found]:
        """Predict for images, one after the other.

        Args:
            images: files, or arrays as in `find`.
            threshold: as in `find`.

        Raises:
            ValueError: an image cannot be read, or as `find`.
        """
        for image in images:
            yield self.find(image if isinstance(image, np.ndarray) else read_image(Path(image)), threshold)


def load_detector(source: str | Path, device: str | None = None) -> Detector:
    """Load a detector or segmenter that `clove-hub downstream torchvision` fine-tuned.

    Args:
        source: the folder of a fine-tuning run, of an exported model, or `hf-hub:organization/name[@revision]`.
        device: an accelerator by default if there is one.

    Raises:
        ValueError: it is not a fine-tuned model, a checksum does not match, or its weights do not fit the network that
            its config.json describes.

    Examples:
        >>> import clove_hub
        >>> detector = clove_hub.load_detector(fine_tuned, device="cpu")
        >>> found = next(detector.predict([photo]))
        >>> found.boxes.shape == (len(found.scores), 4), found.names == [detector.categories[n].name for n in found.labels]
        (True, True)
    """
    stored = read_finetuned(source)
    settings = _settings(stored)
    _require_classes(stored)
    architecture(stored.architecture, stored.model_args, stored.what)  # of bounded size
    with torch.random.fork_rng(devices=[]):
        with torch.device("meta"):  # names and shapes first: the configured network may exceed the memory
            expected = _network(stored, settings).state_dict()
        shapes = {name: tensor.shape for name, tensor in expected.items()}
        require_names_and_shapes(stored.tensors, shapes, f"{stored.what}, by its config.json")
        network = _network(stored, settings)
    network.load_state_dict(stored.tensors)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        network.to(device)
    except RuntimeError as error:
        raise ValueError(f"device {device}: {error!s:.200}") from error
    return Detector(network.eval().requires_grad_(False), settings, stored)


def config_of(
    settings: FinetuneSettings, source: Weights, truth: CocoSplit | Segmented, weights: Path
) -> dict[str, Any]:
    """The config that, beside the weights, makes the folder of a run a fine-tuned model.

    Args:
        source: the backbone that training started from.
        truth: the split that was scored, whose classes are those of the network.
        weights: the complete file of weights.
    """
    if isinstance(truth, Segmented):
        classes = [Category(number, name) for number, name in enumerate(truth.classes)]
    else:
        classes = list(truth.categories)
    sections = as_sections(settings)
    kept = {key: sections[key] for key in ("preset", "network", "images")}
    return make_config(settings.task, source, kept, classes, told(source), weights)


def require_threshold(threshold: float) -> None:
    """Raise ValueError unless it is a score."""
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold {threshold:g}: must be a score from 0 to 1, such as 0.5")


# ---- from the config to the network ----------------------------------------------------------------------------------


def _settings(stored: FineTuned) -> FinetuneSettings:
    """The fine-tuning settings that define the network.

    Raises:
        ValueError: config.json has settings that this version does not support.
    """
    said, where = stored.settings, f"the config.json of {stored.what}"
    preset = PRESETS.get(str(said.get("preset")))
    if preset is None or preset.task != stored.task:
        known = [name for name, one in PRESETS.items() if one.task == stored.task] or list(PRESETS)
        near = nearest_name(str(said.get("preset")), known)
        raise ValueError(
            f"{where} has the preset {said.get('preset')!r:.80}{near} for the task {stored.task!r:.80}, which this version "
            "does not have: use the version of clove-hub that wrote it"
        )
    try:
        network, images = (
            build_settings(type(getattr(preset, section)), said.get(section) or {}, section)
            for section in ("network", "images")
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}. Use the version of clove-hub that wrote it") from error
    return FinetuneSettings(preset.preset, preset.task, images, network)


def _require_classes(stored: FineTuned) -> None:
    """Raise ValueError if the number of classes in config.json differs from that of the weights."""
    bias = stored.tensors.get(BOX_CLASSIFIER)
    if stored.task == "segmentation":
        heads = [tensor for name, tensor in stored.tensors.items() if name.startswith("head.") and tensor.ndim == 4]
        held = int(heads[-1].shape[0]) if heads else None
    else:
        held = None if bias is None else len(bias) - 1  # without the background
    if held is not None and held != len(stored.categories):
        raise ValueError(
            f"{stored.what}: its config.json names {len(stored.categories)} classes, but its weights are for {held}: export "
            "or download it again"
        )


def _network(stored: FineTuned, settings: FinetuneSettings) -> nn.Module:
    """The network with random weights, on torch's default device."""
    blank: dict[str, Tensor] = dict(build_model(stored.architecture, stored.model_args).state_dict())
    source = Weights(
        stored.name, stored.what, "file", stored.architecture, blank, stored.preprocessing, stored.model_args
    )
    keypoints = len(stored.categories[0].keypoints) if settings.task == "keypoints" else 0
    return build(source, settings, len(stored.categories), keypoints)
