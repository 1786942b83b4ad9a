"""SlotCon, PixPro, MoCo and MoCo-kNN against five steps of the released trainers, in float64.

CLoVE's are in `test_clove.py`. The first losses are compared always: they differ where a pass has other statistics, boxes
or neighbors. All five, and the final state, take minutes.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from trajectories import Recording, assert_final_state, begin, follow, random_pixels, released_names, view_group

from clove_hub.backbones import create_backbone
from clove_hub.methods import (
    Moco,
    MocoKnnSettings,
    MocoSettings,
    Pixpro,
    PixproSettings,
    SlotCon,
    SlotConSettings,
)
from clove_hub.training.recipe import load
from clove_hub.training.schedule import half_cosine, learning_rate
from clove_hub.views import Views
from clove_hub.views.draw import crop_boxes

MakeViews = Callable[[np.random.Generator, int], list[Views]]


def slotcon(g: Recording) -> tuple[SlotCon, MakeViews]:
    batch, size = int(g["batch"]), int(g["size"])
    settings = SlotConSettings(
        global_size=size,
        projector_hidden=int(g["dim_hidden"]),
        feature_dim=int(g["dim_out"]),
        prototypes=int(g["num_prototypes"]),
    )
    method = SlotCon(create_backbone(str(g["arch"])), settings)

    def views(rng: np.random.Generator, step: int) -> list[Views]:
        rng.integers(60, 240, (batch, 2))
        pixels = []
        for _ in range(2):
            pixels.append(random_pixels(rng, batch, size))
            for _ in range(2):  # what is stored: sides and corners, and after them the flips
                rng.uniform(size=(batch, 2))
            rng.uniform(size=batch)
        crops, flips = g["crops"][step].astype(np.int64), g["flips"][step]
        boxes = np.empty((2, batch, 4))
        for image, (width, height) in enumerate(g["image_sizes"][step].tolist()):
            boxes[:, image] = crop_boxes(crops[:, image], flips[:, image], height, width, method.view_spec.boxes)
        return [view_group(pixels, boxes, list(flips))]

    return method, views


def pixpro(g: Recording) -> tuple[Pixpro, MakeViews]:
    batch, size = int(g["batch"]), int(g["size"])
    settings = PixproSettings(global_size=size, instance_weight=float(g["instance_weight"]))

    def views(rng: np.random.Generator, step: int) -> list[Views]:
        pixels, boxes, flips = [], [], []
        for _ in range(2):
            pixels.append(random_pixels(rng, batch, size))
            side = rng.uniform(0.5, 0.9, (batch, 2))
            low = rng.uniform(0, 1, (batch, 2)) * (1 - side)
            boxes.append(np.concatenate([low, low + side], 1).astype(np.float32))
            flips.append(rng.uniform(size=batch) < 0.5)
            boxes[-1][flips[-1]] = boxes[-1][flips[-1]][:, [2, 1, 0, 3]]
        return [view_group(pixels, boxes, flips)]

    return Pixpro(create_backbone(str(g["arch"])), settings), views


def moco(g: Recording, **knn: Any) -> tuple[Moco, MakeViews]:
    batch, queue, dim = int(g["batch"]), len(g["queue"].T), int(g["dim"])
    # In place of the shuffle the recording has the identity on one process: all keys are normalized together.
    common = {"global_size": int(g["size"]), "queue": queue, "feature_dim": dim, "key_norm": "synchronized"}
    backbone = create_backbone(str(g["arch"]))
    settings = MocoSettings(projector_hidden=backbone.num_features, temperature=float(g["temperature"]), **common)
    sizes = [(2, int(g["size"]))]
    if knn:
        small = {"local_size": int(g["small_size"]), "knn_neighbors": int(g["topk"]), "local_views": 4}
        weight = float(g["knn_weight"][-1])
        settings = MocoKnnSettings(projector_hidden=backbone.num_features, knn_weight=weight, **common, **small, **knn)
        sizes.append((4, int(g["small_size"])))

    def views(rng: np.random.Generator, step: int) -> list[Views]:
        return [
            view_group(
                [random_pixels(rng, batch, size) for _ in range(count)],
                np.zeros((count, batch, 4)),
                [np.zeros(batch, bool)] * count,
            )
            for count, size in sizes
        ]

    return Moco(backbone, settings), views


SGD = {"adapt": False, "decay_all": True}
METHODS: dict[str, tuple[str, Callable[[Recording], tuple[Any, MakeViews]], dict[str, Any]]] = {
    "slotcon": ("slotcon", slotcon, {"eps": 0.0}),
    "pixpro": ("pixpro", pixpro, {}),
    "pixpro_pixel": ("pixpro", pixpro, {}),
    "moco": ("moco", moco, SGD),
    "moco_knn": ("moco", lambda g: moco(g, knn_order="enqueue_first"), SGD),
    "moco_knn_warmup": ("moco", lambda g: moco(g, knn_order="look_first", knn_warmup_epochs=1.0), SGD),
}
"""By the name of the recording: whose names, method and views, and what moves the weights."""
FIRST = {"slotcon": 1, "pixpro_pixel": 1, "moco_knn": 2}
"""How many steps are compared always."""


def losses_and_state(name: str, g: Recording, steps: int) -> tuple[list[float], Any, dict[str, str]]:
    kind, build, groups = METHODS[name]
    method, views = build(g)
    method.double()
    names = released_names(method, kind)
    begin(method, names, int(g["seed"]))
    return follow(method, g, views, steps, **groups), method, names


@pytest.mark.parametrize("name", FIRST)
def test_the_first_losses_are_the_released_codes(name: str, golden: Mapping[str, Recording]) -> None:
    g = golden[f"{name}_trajectory"]
    losses, _, _ = losses_and_state(name, g, FIRST[name])
    assert np.abs(np.array(losses) - g["loss"][: len(losses)]).max() <= 1e-8


@pytest.mark.long
@pytest.mark.parametrize("name", METHODS)
def test_five_steps_of_training_are_the_released_codes(name: str, golden: Mapping[str, Recording]) -> None:
    g = golden[f"{name}_trajectory"]
    losses, method, names = losses_and_state(name, g, len(g["lr"]))
    assert np.abs(np.array(losses) - g["loss"]).max() <= 1e-8
    assert_final_state(method, names, g)
    if "queue" in g:
        assert np.abs(method.queue.T.numpy() - g["queue"]).max() <= 1e-8
        assert int(method.queue_start) == int(g["queue_ptr"])
    if "queue_backbone_every_16th" in g:
        assert np.abs(method.queue_features.T.numpy()[::16] - g["queue_backbone_every_16th"]).max() <= 1e-8
    if "center" in g:
        assert np.abs(method.center.numpy() - g["center"]).max() <= 1e-8


RECIPES = {
    "slotcon": "slotcon_r50_coco_800ep",
    "pixpro": "pixpro_r50_in1k_400ep",
    "moco": "moco_r50_coco_200ep",
    "moco_knn": "moco_knn_r50_coco_200ep",
}


@pytest.mark.parametrize("name", RECIPES)
def test_rates_and_momenta_of_a_recipe_are_the_released_ones_at_every_step(
    name: str, golden: Mapping[str, Recording]
) -> None:
    g, recipe = golden[f"{name}_trajectory"], load(RECIPES[name], ["data.path=x"])
    chosen, epoch = recipe.schedule, int(g["steps_per_epoch"])
    steps, warmup = int(g["epochs"]) * epoch, int(g["warmup_epochs"]) * epoch if "warmup_epochs" in g else 0
    peak = float(g["lr"].max())
    final = 1e-6 / peak if chosen.final_factor else 0.0  # the recipe's factor is that of its own peak
    assert chosen.final_factor * recipe.optimizer.learning_rate * recipe.batch.total / 256 == pytest.approx(
        final * peak
    )
    for step, (rate, momentum) in enumerate(zip(g["lr"], g["momentum"], strict=True)):
        ours = learning_rate(
            *(step, steps, warmup, peak, chosen.start_factor, final),
            warmup_to_peak=chosen.warmup_to_peak,
            decay_every=epoch if chosen.decay == "epoch" else 1,
        )
        assert ours == pytest.approx(float(rate), rel=1e-12)
        found = half_cosine(step, steps, chosen.teacher_momentum, chosen.final_teacher_momentum)
        assert found == pytest.approx(float(momentum), rel=1e-12)
