"""A step of fine-tuning beside torchvision's own model: `python -m benchmarks.finetune_step [--task instances]`.

Both sides train on the same made-up images in the same run, by turns: ours by what `downstream torchvision` does in a
step (forward, backward, the gradient's norm and limit, the optimizer), torchvision's by its model builder and SGD as its
references take a step. Both train all layers of the same ResNet; `--papers` adds ours with the papers' heads. On a CPU the
seconds are those of the processor, which other programs disturb less.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import detection

from clove_hub.training.finetune.loop import make_optimizer
from clove_hub.training.finetune.networks import build
from clove_hub.training.finetune.settings import DetectionImages, FinetuneSettings, Task, read_settings
from clove_hub.weights import load

from . import report
from .measure import Sample, by_turns, timed, times_faster
from .setting import arguments, command, positive

BUILDERS = {
    "detection": detection.fasterrcnn_resnet50_fpn,
    "instances": detection.maskrcnn_resnet50_fpn,
    "keypoints": detection.keypointrcnn_resnet50_fpn,
}
CLASSES, KEYPOINTS, OBJECTS = 80, 17, 8
RATE = 1e-5
"""Too low to change what is measured: the proposals that a step makes."""
# What two cores do in a few minutes.
CPU = {"images.shortest_edge": "[128]", "images.longest_edge": "214", "batch.total": "1", "run.precision": "fp32"}
CUDA = {"images.shortest_edge": "[800]", "batch.total": "8", "run.precision": "bf16"}


def main(given: list[str] | None = None) -> None:
    parser = arguments("finetune_step", "Measures a step of fine-tuning beside torchvision's.", data=False)
    parser.add_argument("--task", choices=tuple(BUILDERS), default="detection", help="default: %(default)s")
    parser.add_argument("--papers", action="store_true", help="measure the papers' heads too")
    options = parser.parse_args(given)
    positive([("--rounds", options.rounds)])
    changes = [f"{key}={value}" for key, value in (CPU if options.device == "cpu" else CUDA).items()]
    settings = read_settings(options.task, [*changes, *options.overrides])
    device = torch.device(options.device)
    images, targets = made_up(settings, device)
    source = load("random:resnet50")
    networks: dict[str, tuple[FinetuneSettings, nn.Module]] = {
        "ours": (settings, build(source, settings, CLASSES, keypoints(options.task))),
        "torchvision": (settings, theirs(settings)),
    }
    if options.papers:
        papers = read_settings(options.task, [*changes, *options.overrides], f"{options.task}_papers_1x")
        networks["papers"] = papers, build(source, papers, CLASSES, keypoints(options.task))
    sides: dict[str, Callable[[], object]] = {}
    for name, (own, network) in networks.items():
        network.to(device).train()
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        optimizer = (
            make_optimizer(network, own)
            if name != "torchvision"
            else torch.optim.SGD(trained, momentum=0.9, weight_decay=1e-4)
        )
        limit = own.optimizer.clip_norm if name != "torchvision" else None
        precision = own.run.precision
        sides[name] = partial(step, network, optimizer, images, targets, precision, name != "torchvision", limit)
    sample = partial(timed, device=device) if device.type == "cuda" else processor
    seconds = by_turns({name: sample(side) for name, side in sides.items()}, options.rounds)
    batch = settings.batch.total
    rows = [
        report.images_per_second(
            f"{options.task}, {name}, batch {batch}, {settings.run.precision}", seconds, batch, name
        )
        for name in sides
    ]
    faster = {name: times_faster(seconds["ours"], seconds[name]) for name in sides if name != "ours"}
    for name, one in faster.items():
        print(f"ours is {one['median']:.2f} times as fast as {name} ({one['min']:.2f}-{one['max']:.2f})")
    sizes = {"images": [list(image.shape) for image in images], "objects": OBJECTS, "rounds": options.rounds}
    changed = {"task": options.task, "batch": batch, "precision": settings.run.precision, **sizes}
    print(report.table(f"{options.name} on {report.hardware(device)['device']}", rows, compared=True))
    figures = {"rows": [dataclasses.asdict(row) for row in rows], "seconds": seconds, "faster": faster}
    report.save(options.name, device, options.results, settings=changed, **figures)


def processor(action: Callable[[], object]) -> Sample:
    """A sample of the processor's seconds for a step, which lasts long enough on a CPU."""

    def run() -> float:
        start = time.process_time()
        action()
        return time.process_time() - start

    return run


def theirs(settings: FinetuneSettings) -> nn.Module:
    """torchvision's own model of the task, as its builder makes it for a backbone that is trained whole."""
    assert isinstance(settings.images, DetectionImages)
    edges = {"min_size": settings.images.shortest_edge, "max_size": settings.images.longest_edge}
    network: nn.Module = BUILDERS[settings.task](weights=None, weights_backbone=None, num_classes=CLASSES + 1, **edges)
    return network


def keypoints(task: Task) -> int:
    return KEYPOINTS if task == "keypoints" else 0


def step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: list[Tensor],
    targets: list[dict[str, Tensor]],
    precision: str,
    ours: bool,
    limit: float | None,
) -> None:
    """A step of `training.finetune.loop`, or one of torchvision's references, on images that lie on the device.

    Args:
        limit: of the gradient's norm.
    """
    torch.manual_seed(0)
    for group in optimizer.param_groups:
        group["lr"] = RATE
    with torch.autocast(images[0].device.type, torch.bfloat16, enabled=precision == "bf16"):
        losses: dict[str, Tensor] = network(list(images), [dict(target) for target in targets])
    loss = torch.stack(list(losses.values())).sum()
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    if ours:
        norm = torch.nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None])
        if limit is not None and norm > limit:
            torch.nn.utils.clip_grads_with_norm_(network.parameters(), limit, norm)
        assert bool(torch.isfinite(norm)), "a step that is not finite is not a step"
    else:
        assert bool(torch.isfinite(loss))  # as the references look at each loss
    optimizer.step()


def made_up(settings: FinetuneSettings, device: torch.device) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Images of 480x640 and what is in them, the same for all sides."""
    generator = torch.Generator().manual_seed(0)
    images, targets = [], []
    for _ in range(settings.batch.total):
        images.append(torch.rand(3, 480, 640, generator=generator).to(device))
        corners = torch.rand(OBJECTS, 2, generator=generator) * torch.tensor([400.0, 300.0])
        boxes = torch.cat([corners, corners + 40 + 140 * torch.rand(OBJECTS, 2, generator=generator)], 1)
        labels = torch.randint(1, 2 if settings.task == "keypoints" else CLASSES, (OBJECTS,), generator=generator)
        target = {"boxes": boxes, "labels": labels}
        if settings.task == "instances":
            masks = torch.zeros(OBJECTS, 480, 640, dtype=torch.uint8)
            for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
                mask[y0:y1, x0:x1] = 1
            target["masks"] = masks
        if settings.task == "keypoints":
            within = boxes[:, None, :2] + (boxes[:, None, 2:] - boxes[:, None, :2]) * torch.rand(
                OBJECTS, KEYPOINTS, 2, generator=generator
            )
            target["keypoints"] = torch.cat([within, torch.full((OBJECTS, KEYPOINTS, 1), 2.0)], 2)
        targets.append({key: value.to(device) for key, value in target.items()})
    return images, targets


if __name__ == "__main__":
    command(main)
