"""Segmentation with a fully convolutional network, fine-tuned whole, by the sources' protocols for VOC and Cityscapes.

MoCo-kNN's (Van Gansbeke et al., NeurIPS 2021), after MoCo (He et al., CVPR 2020): a ResNet whose layer4 keeps the
resolution of layer3, two 3x3 convolutions of dilation 6 with 256 channels, batch norm and ReLU, and a 1x1 classifier.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from clove_hub.data.files import described
from clove_hub.data.images import read_image
from clove_hub.data.masks import VOID
from clove_hub.views import Purpose, stream

from ..data.masks import Pair, Segmented, open_segmented
from ..weights.backbone import PAD, Backbone, padded, with_stride_one
from .batching import batches, in_threads, normalized
from .processes import gather, share, world
from .result import Outcome
from .scores import absent_classes, confusion, segmentation_scores
from .upsample import upsampled

VERSION = 1
RULE = "own"
RANDOMNESS = "fine-tuning"
PREPROCESSING = ("mean", "std")


class Schedule(NamedTuple):
    """How the network is trained."""

    name: str
    epochs: int
    batch: int
    learning_rate: float
    crop: int
    train: str


SCHEDULES = {
    "voc": Schedule("voc", epochs=45, batch=16, learning_rate=0.003, crop=513, train="trainaug"),
    "cityscapes": Schedule("cityscapes", epochs=150, batch=8, learning_rate=1e-4, crop=769, train="train"),
}


@dataclass(frozen=True)
class Settings:
    schedule: str = "voc"
    """`voc` (SGD, a tenth after 2/3 and after 8/9 of the epochs) or `cityscapes` (Adam, polynomial decay); it says
    what the following are where they are null."""
    epochs: int | None = None
    batch: int | None = None
    """Images in a step, over all processes."""
    learning_rate: float | None = None
    crop: int | None = None
    """Pixels a side of the crops that are trained with."""
    train: str | None = None
    test: str = "val"
    train_images: int | None = None
    """At most this many, spread evenly over the list; null for all."""
    test_images: int | None = None

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"fcn's schedule is {self.schedule!r}; expected {' or '.join(SCHEDULES)}")
        for name, value in self.plan._asdict().items():
            if name != "name":
                object.__setattr__(self, name, value)  # so that the record says what was done
        numbers = (self.epochs, self.batch, self.learning_rate, self.crop, self.train_images, self.test_images)
        if any(number is not None and number <= 0 for number in numbers):
            raise ValueError(f"{self}: every number must be positive")

    @property
    def plan(self) -> Schedule:
        """The schedule with what was set instead."""
        known = SCHEDULES[self.schedule]
        return Schedule(
            known.name,
            known.epochs if self.epochs is None else self.epochs,
            known.batch if self.batch is None else self.batch,
            known.learning_rate if self.learning_rate is None else self.learning_rate,
            known.crop if self.crop is None else self.crop,
            known.train if self.train is None else self.train,
        )


def evaluate(backbone: Backbone, data: Path, settings: Settings, seed: int) -> Outcome:
    """`mIoU` and `pixel accuracy` of whole images at one scale. The backbone itself is left as it is.

    Args:
        data: images with a mask each, in one of the layouts of `open_segmented`.
        seed: of the head's first weights, the order of the images, and their crops.
    """
    plan = settings.plan
    train = open_segmented(data, plan.train).spread(settings.train_images)
    test = open_segmented(data, settings.test).spread(settings.test_images)
    size = world()[1]
    if plan.batch % size or len(train.pairs) < plan.batch:
        raise ValueError(
            f"fcn's batch is {plan.batch}, for {size} processes and {len(train.pairs)} training images: "
            f"set a multiple of {size}, not greater than the number of images"
        )
    network = FCN(with_stride_one(backbone.model, "layer4"), len(train.classes)).to(backbone.device)
    if size > 1 and backbone.device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
    with torch.enable_grad():
        fine_tune(network, backbone, train, plan, seed)
    matrices = gather(_confusions(network.eval(), backbone, test, share(test.pairs)))
    matrix = torch.stack(matrices).sum(0)
    if not int(matrix.sum()):
        raise ValueError(f"the masks of {data} ({settings.test}) are all void ({VOID})")
    files = [path for pair in train.pairs + test.pairs for path in pair]
    return Outcome(
        segmentation_scores(matrix),
        described(data, files, len(test.pairs)),
        (seed,),
        split=settings.test,
        absent=absent_classes(matrix, test.classes),
    )


class FCN(nn.Module):
    """Images (B, 3, H, W) -> logits (B, K, H, W)."""

    def __init__(self, backbone: nn.Module, classes: int) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(True)
        channels = int(backbone.num_features)  # type: ignore[arg-type]
        self.head = nn.Sequential(*_convolution(channels), *_convolution(256), nn.Conv2d(256, classes, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        cells = self.head(self.backbone.forward_features(pixels))  # type: ignore[operator]
        return upsampled(cells, (pixels.shape[2], pixels.shape[3]))


def _convolution(channels: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, 256, 3, padding=6, dilation=6, bias=False), nn.BatchNorm2d(256), nn.ReLU()


# ---- training --------------------------------------------------------------------------------------------------------


def fine_tune(network: FCN, backbone: Backbone, train: Segmented, plan: Schedule, seed: int) -> None:
    """Trains the network in place. Each process does its share of every batch; gradients are those of the whole."""
    rank, size = world()
    network.train()
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if size > 1:
        for parameter in parameters:
            dist.broadcast(parameter.data, 0)
    optimizer: torch.optim.Optimizer
    if plan.name == "voc":
        optimizer = torch.optim.SGD(parameters, lr=plan.learning_rate, momentum=0.9, weight_decay=1e-4)
    else:
        optimizer = torch.optim.Adam(parameters, lr=plan.learning_rate, weight_decay=1e-4)
    per_epoch = len(train.pairs) // plan.batch  # what does not fill a batch is left out, of each epoch something else
    for epoch in range(plan.epochs):
        order = stream(seed, epoch, 0, Purpose.ORDER).permutation(len(train.pairs))[: per_epoch * plan.batch]
        own = order.reshape(-1, size)[:, rank].tolist()

        def load(number: int, epoch: int = epoch) -> tuple[Tensor, Tensor]:
            return augmented(
                train, train.pairs[number], plan.crop, backbone, stream(seed, epoch, number, Purpose.VIEWS)
            )

        for step, samples in enumerate(in_threads(load, batches(own, plan.batch // size))):
            pixels, truth = (torch.stack(parts).to(backbone.device) for parts in zip(*samples, strict=True))
            for group in optimizer.param_groups:
                group["lr"] = plan.learning_rate * factor(plan, epoch, (epoch + step / per_epoch) / plan.epochs)
            counted = (truth != VOID).sum().float()
            if size > 1:
                dist.all_reduce(counted)
            logits = network(pixels).movedim(1, 3).flatten(0, 2)  # (pixels, K), as in the dense probe
            loss = F.cross_entropy(logits, truth.flatten(), ignore_index=VOID, reduction="sum") / counted.clamp(min=1)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if size > 1 and gradient is not None:
                    dist.all_reduce(gradient)
                parameter.grad = gradient
            optimizer.step()
    if size > 1:  # without SyncBN each process has statistics of its own; all must evaluate one network
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)


def factor(plan: Schedule, epoch: int, done: float) -> float:
    """The learning rate at a point of the training, as a fraction of the first one."""
    if plan.name == "voc":  # after 30 and 40 of 45 epochs
        return float(0.1 ** sum(epoch >= round(plan.epochs * part) for part in (30 / 45, 40 / 45)))
    return float((1 - done) ** 0.9)


def augmented(
    part: Segmented, pair: Pair, crop: int, backbone: Backbone, random: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """A random crop of an image that was scaled by 0.5 to 2 and perhaps mirrored: (3, crop, crop), (crop, crop).

    Beyond the image there are pixels of the mean color, without a class.
    """
    photo = Image.fromarray(read_image(pair[0]))
    mask = part.mask(pair, photo.size)
    scale, flip, down, across = 0.5 + 1.5 * random.random(), random.random() < 0.5, random.random(), random.random()
    size = (max(1, round(photo.width * scale)), max(1, round(photo.height * scale)))
    pixels = normalized(
        photo.resize(size, Image.Resampling.BILINEAR), backbone.preprocessing.mean, backbone.preprocessing.std
    )
    truth = torch.from_numpy(np.array(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))).long()
    if flip:
        pixels, truth = pixels.flip(2), truth.flip(1)
    beyond = (0, max(0, crop - size[0]), 0, max(0, crop - size[1]))
    pixels, truth = F.pad(pixels, beyond), F.pad(truth, beyond, value=VOID)
    top, left = (math.floor(part * (side - crop + 1)) for part, side in zip((down, across), truth.shape, strict=True))
    return pixels[:, top : top + crop, left : left + crop], truth[top : top + crop, left : left + crop]


# ---- evaluation ------------------------------------------------------------------------------------------------------


def _confusions(network: FCN, backbone: Backbone, part: Segmented, pairs: Sequence[Pair]) -> Iterator[Tensor]:
    def load(pair: Pair) -> tuple[Tensor, NDArray[np.uint8]]:
        photo = Image.fromarray(read_image(pair[0]))
        pixels = normalized(photo, backbone.preprocessing.mean, backbone.preprocessing.std)
        return pixels, part.mask(pair, photo.size)

    for ((pixels, mask),) in in_threads(load, batches(pairs, 1)):
        logits = network(padded(pixels[None].to(backbone.device), PAD))[0, :, : mask.shape[0], : mask.shape[1]]
        yield confusion(logits.argmax(0).cpu(), torch.from_numpy(mask), len(part.classes))
