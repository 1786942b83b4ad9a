"""Small made data sets for the evaluation protocols, and backbones whose features are known."""

import json
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

COLORS = np.array([[40, 40, 200], [200, 60, 40], [60, 180, 60], [200, 200, 60]], dtype=np.uint8)


class Patches(nn.Module):
    """The pixels of each patch are its features: the map (B, 3 * stride^2, h, w), made of zero mean."""

    def __init__(self, stride: int = 8) -> None:
        super().__init__()
        self.stride = stride
        self.unused = nn.Parameter(torch.zeros(1))

    def forward_features(self, pixels: Tensor) -> Tensor:
        return F.pixel_unshuffle(pixels, self.stride)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.forward_features(pixels).mean((2, 3))


class Colors(nn.Module):
    """The mean color of each cell, of 8 pixels a side, is its feature."""

    def __init__(self, stride: int = 8) -> None:
        super().__init__()
        self.stride = stride
        self.unused = nn.Parameter(torch.zeros(1))

    def forward_features(self, pixels: Tensor) -> Tensor:
        return F.avg_pool2d(pixels, self.stride)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.forward_features(pixels).mean((2, 3))


def small_resnet(seed: int = 0) -> nn.Module:
    """A ResNet of plain blocks with few channels, whose batch norm has statistics to lose."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = timm.create_model("resnet18", num_classes=0, layers=(1, 1, 1, 1), channels=(8, 16, 24, 32))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def class_images(folder: Path, train: int = 8, val: int = 4, classes: int = 3, clean: bool = False) -> Path:
    """`train/` and `val/` with noisy pictures of one color for each class."""
    rng = np.random.default_rng(1)
    for split, count in (("train", train), ("val", val)):
        for number in range(classes):
            own = folder / split / f"class{number}"
            own.mkdir(parents=True)
            for index in range(count):
                image = COLORS[number] // 2 + noise(rng, 40, 48) // (8 if clean else 2)
                Image.fromarray(image.astype(np.uint8)).save(own / f"{index}.png")
    return folder


def segmented_images(folder: Path, train: int = 6, test: int = 4, size: tuple[int, int] = (70, 100)) -> Path:
    """The layout of CamVid: blocks of three colors, each a class, and a void frame of two pixels at the top."""
    rng = np.random.default_rng(2)
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    names = [f"{split}{number}" for split, count in (("train", train), ("test", test)) for number in range(count)]
    for name in names:
        height, width = size
        blocks = rng.integers(0, 3, (height // 20 + 1, width // 20 + 1))
        mask = blocks.repeat(20, 0).repeat(20, 1)[:height, :width].astype(np.uint8)
        image = (COLORS[mask] * 0.8 + noise(rng, *size) * 0.2).astype(np.uint8)
        mask[:2] = 255
        Image.fromarray(image).save(folder / "images" / f"{name}.png")
        Image.fromarray(mask).save(folder / "labels" / f"{name}.png")
    for split in ("train", "test"):
        (folder / f"{split}.txt").write_text("\n".join(name for name in names if name.startswith(split)) + "\n")
    (folder / "val.txt").write_text((folder / "test.txt").read_text())
    classes = [{"id": number, "name": f"color {number}"} for number in range(3)]
    (folder / "classes.json").write_text(json.dumps({"classes": classes}))
    return folder


def moving_clips(folder: Path, clips: int = 2, frames: int = 8, objects: int = 2) -> Path:
    """The layout of DAVIS 2017: textured squares of 32 pixels that move by 8 a frame over a textured ground."""
    rng = np.random.default_rng(3)
    for number in range(clips):
        photos, masks = (folder / kind / f"clip{number}" for kind in ("JPEGImages", "Annotations"))
        photos.mkdir(parents=True)
        masks.mkdir(parents=True)
        ground = noise(rng, 96, 160)
        textures = [noise(rng, 32, 32) for _ in range(objects)]
        for frame in range(frames):
            image, mask = ground.copy(), np.zeros((96, 160), dtype=np.uint8)
            for index, texture in enumerate(textures):
                top, left = 8 + 48 * index, 8 * frame if index == 0 else 120 - 8 * frame
                image[top : top + 32, left : left + 32] = texture
                mask[top : top + 32, left : left + 32] = index + 1
            Image.fromarray(image).save(photos / f"{frame:05d}.png")
            Image.fromarray(mask).save(masks / f"{frame:05d}.png")
    (folder / "val.txt").write_text("".join(f"clip{number}\n" for number in range(clips)))
    return folder
