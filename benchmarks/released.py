"""CLoVE's released code, run from the user's own clone; nothing of it is here."""

from __future__ import annotations

import importlib
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from clove_hub.training.recipe import Recipe
from clove_hub.views import ViewSpec

NEEDED = ("contrast/loss.py", "contrast/lars.py", "contrast/models/CLoVE.py", "contrast/resnet.py", "contrast/data")


@dataclass(frozen=True)
class Released:
    """The modules of the clone."""

    loss: Any
    lars: Any
    models: Any
    resnet: Any
    transform: Any
    dataset: Any


def open_released(clone: Path | None, spec: ViewSpec, own_transform: bool = True) -> Released | None:
    """Imports the clone's modules; None without a clone.

    Args:
        spec: the views that are measured or trained on.
        own_transform: whether its own transform makes them, which knows one size of small views.

    Raises:
        ValueError: it is not a clone of the released code, or the views are not the ones that it is written for.
    """
    if clone is None:
        return None
    missing = [name for name in NEEDED if not (clone / name).exists()]
    if missing:
        raise ValueError(
            f"--reference {clone} has no {missing[0]}: give a clone of CLoVE's released code (github.com/sthalles/CLoVE)"
        )
    views = [view.size for view in spec.views]
    if len(views) != 8 or views[0] != views[1] or (own_transform and views[2:] != [96] * 6):
        raise ValueError(
            f"the released code is written for 2 + 6 views, the small ones of 96 pixels, not for {views}: "
            "measure without --reference"
        )
    sys.path.insert(0, str(clone.resolve()))
    names = ("loss", "lars", "models", "resnet", "data.transform", "data.dataset")
    modules = [importlib.import_module(f"contrast.{name}") for name in names]
    assert all(str(clone.resolve()) in str(module.__file__) for module in modules), "another package called contrast"
    return Released(*modules)


def released_dataset(released: Released, recipe: Recipe) -> Any:
    """The released data set on the recipe's photos: (images, coordinates, index, class) for each.

    Raises:
        ValueError: the photos are not in folders by class, which it needs.
    """
    transform = released.transform.get_transform("BYOL", recipe.method.global_scale[0], recipe.method.global_size)
    try:
        return released.dataset.ImageFolder(recipe.data.path, transform=transform, two_crop=True, return_coord=True)
    except FileNotFoundError as error:
        raise ValueError(
            f"--data {recipe.data.path}: the released code reads folders of one class each, as ImageNet has; put the "
            f"photos one folder deeper ({error})"
        ) from error


def released_loader(dataset: Any, batch: int, batches: int, workers: int, pin_memory: bool) -> DataLoader[Any]:
    """A loader as the released one is set up, for `batches` batches whatever the number of photos."""
    sampler = RandomSampler(dataset, num_samples=batch * batches)
    return DataLoader(
        dataset, batch_size=batch, num_workers=workers, sampler=sampler, pin_memory=pin_memory, drop_last=True
    )


@contextmanager
def tried_convolutions() -> Iterator[None]:
    """Within the context cuDNN chooses its convolutions by trying them."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class ReleasedStep:
    """The released model and optimizer, stepped as the released loop does on one device.

    As there: `cudnn.benchmark` is on, and the host reads the loss at every step.
    """

    def __init__(self, released: Released, recipe: Recipe, device: torch.device) -> None:
        method = recipe.method
        encoder = getattr(released.resnet, recipe.backbone.model, None)
        if encoder is None:
            raise ValueError(
                f"the released code has no backbone {recipe.backbone.model!r}: measure without --reference"
            )
        options = Namespace(
            feature_dim=method.feature_dim, clove_attn_heads=method.attention_heads, head_type="early_return"
        )
        torch.manual_seed(recipe.run.seed)
        self.model = released.models.CLoVE(encoder, options).to(device).train()
        self.criterion = released.loss.TripletLoss(method.positive_weight, method.match_distance).to(device)
        groups = released.lars.add_weight_decay(self.model, recipe.optimizer.weight_decay)
        sgd = torch.optim.SGD(groups, lr=0.0, momentum=recipe.optimizer.momentum)
        self.optimizer = released.lars.LARS(sgd)
        self.device = device
        kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        self.dtype = kinds[recipe.run.precision]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

    def __call__(self, images: list[Tensor], coordinates: list[Tensor], rate: float, momentum: float) -> float:
        images = [image.to(self.device, non_blocking=True) for image in images]
        coordinates = [box.to(self.device, non_blocking=True) for box in coordinates]
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with tried_convolutions():
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                large, small, targets, *_ = self.model(images, momentum)
            loss = self.criterion(large.float(), small.float(), targets.float(), coordinates)
            self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return float(loss.detach())
