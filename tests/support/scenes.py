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


def distant_blocks(folder: Path, train: int = 6, test: int = 4, size: tuple[int, int] = (96, 128)) -> Path:
    """The layout of NYUv2: blocks of four colors, each at a distance of its own, and a row without a distance."""
    rng = np.random.default_rng(4)
    meters = np.array([1.0, 2.5, 5.0, 8.0])
    for split, count in (("train", train), ("test", test)):
        scene = folder / f"{split}_0001"
        scene.mkdir(parents=True)
        lines = []
        for number in range(count):
            height, width = size
            blocks = (
                rng.integers(0, 4, (height // 24 + 1, width // 24 + 1)).repeat(24, 0).repeat(24, 1)[:height, :width]
            )
            image = (COLORS[blocks] * 0.9 + noise(rng, *size) * 0.1).astype(np.uint8)
            millimeters = (1000 * meters[blocks]).astype(np.uint16)
            millimeters[height // 2] = 0
            Image.fromarray(image).save(scene / f"rgb_{number:05d}.jpg", quality=95)
            Image.fromarray(millimeters).save(scene / f"sync_depth_{number:05d}.png")
            lines.append(f"/{scene.name}/rgb_{number:05d}.jpg /{scene.name}/sync_depth_{number:05d}.png 518.8579\n")
        (folder / f"nyu_{split}.txt").write_text("".join(lines))
    return folder


def keypoint_pairs(folder: Path, pairs: int = 3, shift: tuple[int, int] = (16, 8)) -> Path:
    """The layout of SPair-71k: a pattern of colored cells, and the same pattern further right and further down."""
    rng = np.random.default_rng(6)
    (folder / "PairAnnotation" / "test").mkdir(parents=True)
    (folder / "Layout" / "large").mkdir(parents=True)
    lines = []
    for number in range(2 * pairs):
        category = ("cat", "bus")[number % 2]
        photos = folder / "JPEGImages" / category
        photos.mkdir(parents=True, exist_ok=True)
        names = [f"2008_{2 * number + which:06d}" for which in range(2)]
        image = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(image).save(photos / f"{names[0]}.jpg", quality=95)
        Image.fromarray(np.roll(image, shift[::-1], (0, 1))).save(photos / f"{names[1]}.jpg", quality=95)
        line = f"{number + 1:06d}-{names[0]}-{names[1]}:{category}"
        points = [[x, y] for x in (4, 12, 28) for y in (4, 20, 36)][: 5 + number]
        document = {
            "category": category,
            "src_imname": f"{names[0]}.jpg",
            "trg_imname": f"{names[1]}.jpg",
            "src_imsize": [64, 64, 3],
            "trg_imsize": [64, 64, 3],
            "src_bndbox": [0, 0, 40, 48],
            "trg_bndbox": [shift[0], shift[1], 40 + shift[0], 48 + shift[1]],
            "src_kps": points,
            "trg_kps": [[x + shift[0], y + shift[1]] for x, y in points],
            "kps_ids": [str(place) for place in range(len(points))],
            "mirror": 0,
        }
        (folder / "PairAnnotation" / "test" / f"{line}.json").write_text(json.dumps(document))
        lines.append(f"{line}\n")
    (folder / "Layout" / "large" / "test.txt").write_text("".join(lines))
    return folder


def boxed_objects(folder: Path, images: int = 6) -> Path:
    """The layout of VOC: a bright square on a dark ground, of which every other image has a difficult object too."""
    rng = np.random.default_rng(8)
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for number in range(images):
        left, top = (int(32 * rng.integers(0, 3)) for _ in range(2))
        image = noise(rng, 160, 192) // 8
        image[top : top + 64, left : left + 64] += np.array([120, 200, 60], dtype=np.uint8)
        Image.fromarray(image).save(folder / "JPEGImages" / f"{number:06d}.jpg", quality=95)
        boxes = [("cat", 0, left + 1, top + 1, left + 64, top + 64)]
        boxes += [("bus", 1, 161, 129, 192, 160)] if number % 2 else []
        objects = "".join(
            f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin>"
            f"<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
            for name, difficult, x0, y0, x1, y1 in boxes
        )
        size = "<size><width>192</width><height>160</height><depth>3</depth></size>"
        (folder / "Annotations" / f"{number:06d}.xml").write_text(f"<annotation>{size}{objects}</annotation>")
    (folder / "ImageSets/Main/trainval.txt").write_text("".join(f"{number:06d}\n" for number in range(images)))
    return folder
