"""What a file says of its training is held against the cards: what contradicts is refused, what is missing is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from clove_hub.export.confirm import match, only_match
from clove_hub.zoo.models import find_model
from clove_hub.zoo.released import Released

# What the released code wrote into its checkpoints when it was run, as `inspect` prints it.
CLOVE = {"epoch": 200, "epochs": 200, "dataset": "ImageNet", "images": 1281167, "batch_size": 32, "accumulation": 2, "learning_rate": 1.0}  # fmt: skip
SLOTCON = {"epoch": 800, "epochs": 800, "dataset": "COCO", "images": 118287, "batch_size": 64, "processes": 8, "prototypes": 256, "learning_rate": 1.0}  # fmt: skip
PIXPRO = {
    "epoch": 100,
    "epochs": 100,
    "dataset": "ImageNet",
    "images": 1281167,
    "batch_size": 128,
    "learning_rate": 0.03,
}


def released(*methods: str, prototypes: int | None = None) -> Released:
    tensors = {"center": torch.zeros(1, prototypes)} if prototypes else {}
    return Released("", methods[0], methods, "resnet50", "student", {"student": {}, "teacher": {}}, (), tensors)


BARE = Released("resnet", "a ResNet alone", ("slotcon",), "resnet50", "backbone", {"backbone": {}}, (), {})


@pytest.mark.parametrize(
    ("method", "told", "name"),
    [
        ("clove", CLOVE, "resnet50.clove_in1k_200ep"),
        ("slotcon", SLOTCON, "resnet50.slotcon_coco_800ep"),
        ("slotcon", SLOTCON | {"dataset": "COCOplus", "images": 241690}, "resnet50.slotcon_cocoplus_800ep"),
        ("pixpro", PIXPRO, "resnet50.pixpro_in1k_100ep"),
    ],
)
def test_a_file_that_says_enough_needs_no_name(method: str, told: dict[str, Any], name: str) -> None:
    assert only_match("ckpt.pth", "ckpt.pth", released(method), told).name == name


@pytest.mark.parametrize(
    ("file", "told", "possible", "said"),
    [
        (released("slotcon"), {}, 4, "does not record its epoch, data set"),
        (released("slotcon", prototypes=2048), {}, 2, "does not record its epoch, data set"),
        (released("moco", "moco_knn"), {"epoch": 800}, 2, "does not record its method, data set"),
        (released("moco_knn"), {"epoch": 800}, 1, "does not record its data set"),
        (BARE, {"epoch": 800}, 2, "does not record its method, data set"),
        (
            released("clove"),
            CLOVE | {"epoch": 120},
            0,
            "records epoch 120, but the card of resnet50.clove_in1k_400ep has epoch 400",
        ),
        (released("dino"), {}, 0, "no model of the zoo\nTo adopt it"),
    ],
)
def test_a_file_that_says_too_little_gets_a_command_for_each_name(
    file: Released, told: dict[str, Any], possible: int, said: str
) -> None:
    with pytest.raises(ValueError, match=r"resnet50\.my_tag --license ID") as error:
        only_match("a b.pth", "a b.pth", file, told)
    assert said in str(error.value)
    assert str(error.value).count("    clove-hub adopt 'a b.pth' --as ") == possible + 1


@pytest.mark.parametrize(
    ("file", "told", "name", "message"),
    [
        (
            released("slotcon", prototypes=256),
            {},
            "slotcon_in1k_200ep",
            "records prototypes 256, but .* has prototypes 2048",
        ),
        (
            released("slotcon"),
            {"prototypes": 2048},
            "slotcon_coco_800ep",
            "prototypes 2048, but .* has prototypes 256",
        ),
        (released("slotcon"), SLOTCON | {"processes": 4}, "slotcon_coco_800ep", "images a step 256, but .* step 512"),
        (released("slotcon"), {"dataset": "COCO"}, "slotcon_cocoplus_800ep", "data set COCO, but .*COCO train2017 and"),
        (BARE, {"epoch": 100}, "slotcon_coco_800ep", "records epoch 100, but .* has epoch 800"),
    ],
)
def test_a_file_that_says_otherwise_is_refused_with_both_values(
    file: Released, told: dict[str, Any], name: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        match("ckpt.pth", file, told, find_model(f"resnet50.{name}"))


def test_what_cannot_be_confirmed_is_noted() -> None:
    found = match("ckpt.pth", released("pixpro"), PIXPRO, find_model("resnet50.pixpro_in1k_100ep"))
    assert found.missing == ()
    assert [note.partition(",")[0] for note in found.notes] == [
        "The file records learning rate 0.03; pixpro_r50_in1k_100ep has 1.0.",
        "The file records batch size 128",
    ]
    assert match("ckpt.pth", released("slotcon"), SLOTCON, find_model("resnet50.slotcon_coco_800ep")).notes == ()
    (_, nothing) = match("ckpt.pth", BARE, {}, find_model("resnet50.slotcon_coco_800ep")).notes
    assert nothing.startswith(
        "**Nothing in the file confirms that these are the weights of resnet50.slotcon_coco_800ep.**"
    )
    (_, known) = match("ckpt.pth", BARE, {}, find_model("resnet50.slotcon_coco_800ep"), known=True).notes
    assert known == "Its sha256 is that of the released file of resnet50.slotcon_coco_800ep."
