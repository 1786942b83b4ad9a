"""Put a backbone into torchvision's own Faster R-CNN and train it on a folder in COCO's format, in a plain loop.

    python examples/fine_tune.py bundles/mine images annotations.json --steps 1000 --out detector.pth

`clove-hub downstream torchvision` does this with schedules, augmentation, checkpoints and scores; here is what it comes down to. Both need
`pip install 'clove-hub[downstream]'`.
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.models import detection, resnet
from torchvision.transforms import v2

import clove_hub


def detector(source: str, classes: int) -> nn.Module:
    """Faster R-CNN with a feature pyramid around the backbone, a ResNet; the background is class 0.

    Raises:
        RuntimeError: a tensor of the backbone has no place in torchvision's model.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "backbone.pth"
        clove_hub.convert(source, to="torchvision", out=file)
        state = torch.load(file, weights_only=True)
    backbone = clove_hub.load_backbone(source)
    assert backbone.weights is not None  # as only of a model in memory
    body = getattr(resnet, backbone.weights.architecture)(weights=None)
    body.fc = nn.Identity()
    body.load_state_dict(state, strict=True)
    pyramid = detection.backbone_utils._resnet_fpn_extractor(body, trainable_layers=5)
    seen = backbone.preprocessing
    model: nn.Module = detection.FasterRCNN(pyramid, classes, image_mean=list(seen.mean), image_std=list(seen.std))
    return model


def train(model: nn.Module, data: Any, steps: int, rate: float = 0.005, batch: int = 2) -> list[float]:
    """Train in a plain loop; return the loss of each step."""
    loader = torch.utils.data.DataLoader(
        data, batch, shuffle=True, collate_fn=lambda items: tuple(zip(*items, strict=True))
    )
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=1e-4)
    losses = []
    model.train()
    for _, (images, targets) in zip(range(steps), cycle(loader), strict=False):
        loss = sum(model(list(images), list(targets)).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fine-tune torchvision's Faster R-CNN.")
    parser.add_argument("source")
    parser.add_argument("images", type=Path)
    parser.add_argument("annotations", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("detector.pth"))
    given = parser.parse_args()
    to_tensor = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.SanitizeBoundingBoxes()])
    photos = CocoDetection(given.images, given.annotations, transforms=to_tensor)
    classes = 1 + max(photos.coco.getCatIds())
    data = wrap_dataset_for_transforms_v2(photos, target_keys=["boxes", "labels"])
    data = torch.utils.data.Subset(
        data, [number for number, image in enumerate(photos.ids) if photos.coco.getAnnIds(image)]
    )
    model = detector(given.source, classes)
    print(f"loss of the last step: {train(model, data, given.steps)[-1]:.3f}")
    torch.save(model.state_dict(), given.out)
