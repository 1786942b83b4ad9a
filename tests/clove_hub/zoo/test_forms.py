"""Names as other code writes them around a ResNet's: each form is told, whatever is put in front of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import released_tensors
from test_zoo import assert_same
from torch import Tensor

from clove_hub.weights import load
from clove_hub.zoo.released import recognize

ONE = torch.ones(16)
HEADS = {"w": torch.ones(24, 512), "b": torch.ones(24)}


@pytest.fixture(scope="module")
def student() -> dict[str, Tensor]:
    return released_tensors("timm")


@pytest.fixture(scope="module")
def teacher(student: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor + 1 for name, tensor in student.items()}


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def mlp(prefix: str, *layers: int) -> dict[str, Tensor]:
    return {f"{prefix}{layer}.{leaf}": ONE for layer in layers for leaf in ("weight", "bias")}


def queue(name: str) -> dict[str, Tensor]:
    return {name: torch.ones(16, 32), f"{name}_ptr": torch.zeros(1)}


def neck(prefix: str) -> dict[str, Tensor]:
    linear = {"0.weight": torch.ones(24, 512), "0.bias": torch.ones(24)}
    return under(f"{prefix}.mlp.", {**linear, "2.weight": torch.ones(16, 24), "2.bias": torch.ones(16)})


PAIRS: dict[str, tuple[str, str, str, dict[str, Tensor], str]] = {
    # What it is called, what the names of student and teacher begin with, heads, and which is taken.
    "MoCo of OpenSelfSup": (
        "moco",
        "encoder_q.0.",
        "encoder_k.0.",
        {**neck("encoder_q.1"), **neck("encoder_k.1"), **queue("queue")},
        "student",
    ),
    "MoCo of MMSelfSup": (
        "moco",
        "backbone.",
        "encoder_k.module.0.",
        {**mlp("neck.mlp.", 0, 2), **mlp("encoder_k.module.1.mlp.", 0, 2), "encoder_k.steps": ONE, **queue("queue")},
        "student",
    ),
    "DenseCL of MMSelfSup": (
        "densecl",
        "backbone.",
        "encoder_k.module.0.",
        {**mlp("neck.mlp2.", 0, 2), **mlp("encoder_k.module.1.mlp2.", 0, 2), **queue("queue"), **queue("queue2")},
        "student",
    ),
    "MoCo of lightly": (
        "backbone",
        "backbone.",
        "backbone_momentum.",
        {**mlp("projection_head.layers.", 0, 2), **mlp("projection_head_momentum.layers.", 0, 2)},
        "student",
    ),
    "DINO of lightly": (
        "dino",
        "student_backbone.",
        "teacher_backbone.",
        {**mlp("student_head.layers.", 0), **mlp("teacher_head.layers.", 0), "criterion.center": ONE},
        "teacher",
    ),
    "MoCo of solo-learn": (
        "backbone",
        "backbone.",
        "momentum_backbone.",
        {**mlp("projector.", 0, 2), **mlp("momentum_projector.", 0, 2), "queue": ONE, "queue_ptr": ONE},
        "student",
    ),
    "BYOL of MMSelfSup before 1.0": (
        "byol",
        "online_net.0.",
        "target_net.0.",
        {**mlp("online_net.1.", 0), **mlp("target_net.1.", 0), **mlp("head.predictor.", 0)},
        "student",
    ),
    "two keys": ("backbone", "student.", "teacher.", {}, "teacher"),
}
ALONE: dict[str, tuple[str, str, dict[str, Tensor]]] = {
    "SimSiam of lightly": (
        "backbone",
        "backbone.",
        {**mlp("projection_head.layers.", 0), **mlp("prediction_head.", 0)},
    ),
    "SwAV of lightly": (
        "backbone",
        "backbone.",
        {**mlp("projection_head.layers.", 0), "prototypes.heads.0.weight": ONE},
    ),
    "SimCLR of MMSelfSup": ("backbone", "backbone.", mlp("neck.fc", 0, 1)),
    "Barlow Twins of solo-learn": (
        "backbone",
        "backbone.",
        {**mlp("projector.", 0, 1, 3), "classifier.weight": torch.ones(100, 512), "classifier.bias": torch.ones(100)},
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_is_told_by_its_names(name: str, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> None:
    format, one, two, heads, exported = PAIRS[name]
    found = recognize({**under(one, student), **under(two, teacher), **heads}, "it")
    assert found is not None
    assert (found.format, found.exported, set(found.heads)) == (format, exported, set(heads))
    assert_same(found.backbone("student"), student)
    assert_same(found.backbone("teacher"), teacher)


@pytest.mark.parametrize("name", ALONE)
def test_a_backbone_with_heads_is_told_by_its_names(name: str, student: dict[str, Tensor]) -> None:
    format, prefix, heads = ALONE[name]
    found = recognize({**under(prefix, student), **heads}, "it")
    assert found is not None
    assert (found.format, set(found.heads)) == (format, set(heads))
    assert_same(found.backbone("backbone"), student)


@pytest.mark.parametrize(
    "prefix",
    [
        *("module.", "_orig_mod.", "model.", "encoder.", "backbone."),
        *(
            "module._orig_mod.",
            "_orig_mod.module.",
            "model.backbone.",
            "module.encoder.",
            "model.module.encoder.backbone.",
        ),
    ],
)
def test_what_stands_in_front_of_every_name_is_left_out(
    tmp_path: Path, prefix: str, student: dict[str, Tensor]
) -> None:
    torch.save({"state_dict": under(prefix, student)}, tmp_path / "in.pth")
    assert_same(load(tmp_path / "in.pth").tensors, student)


def test_compiled_parts_have_the_names_of_their_modules(student: dict[str, Tensor], teacher: dict[str, Tensor]) -> None:
    parts = {**under("encoder_q._orig_mod.", student), **under("encoder_k._orig_mod.", teacher), **queue("queue")}
    for encoder in ("encoder_q", "encoder_k"):
        parts |= {f"{encoder}._orig_mod.fc.{name}": tensor for name, tensor in _linear().items()}
    found = recognize(parts, "it")
    assert found is not None
    assert found.format == "moco"
    assert_same(found.backbone("teacher"), teacher)


def _linear() -> dict[str, Tensor]:
    return {"0.weight": HEADS["w"], "0.bias": HEADS["b"], "2.weight": torch.ones(16, 24), "2.bias": ONE}


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.model."])
def test_the_numbers_of_a_sequential_are_the_children_of_a_resnet(prefix: str, student: dict[str, Tensor]) -> None:
    """As `nn.Sequential(*list(resnet.children())[:-1])` has them."""
    children = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    parted = {name: name.partition(".") for name in student}
    found = recognize({f"{prefix}{children[parted[n][0]]}.{parted[n][2]}": t for n, t in student.items()}, "it")
    assert found is not None
    assert_same(found.backbone("backbone"), student)


@pytest.mark.parametrize("kind", ["timm", "detectron2", "moco"])
def test_counters_that_a_file_does_not_have_are_zero_with_a_word(tmp_path: Path, kind: str) -> None:
    theirs = released_tensors(kind)
    torch.save({n: t for n, t in theirs.items() if not n.endswith("num_batches_tracked")}, tmp_path / "in.pth")
    loaded = load(tmp_path / "in.pth")
    assert loaded.tensors["bn1.num_batches_tracked"] == 0
    assert len(loaded.tensors) == 120
    missing = sum(name.endswith("num_batches_tracked") for name in theirs)
    assert f"has no num_batches_tracked, as before torch 0.4.1; {missing} are set to 0." in loaded.notes[-1]
    one = next(name for name in theirs if name.endswith("layer1.0.bn1.num_batches_tracked") or "norm.num" in name)
    torch.save({name: tensor for name, tensor in theirs.items() if name != one}, tmp_path / "in.pth")
    with pytest.raises(ValueError, match="1 missing tensor"):
        load(tmp_path / "in.pth")


def save(path: Path, student: Any, teacher: Any, **keys: Any) -> None:
    torch.save({"student": student, "teacher": teacher, "epoch": 3, **keys}, path)


def test_networks_under_keys_of_their_own_are_read_side_by_side(
    tmp_path: Path, student: dict[str, Tensor], teacher: dict[str, Tensor]
) -> None:
    """DINO's teacher is not wrapped where its student is."""
    head = under("head.mlp.0.", HEADS)
    pair = (under("module.", {**under("backbone.", student), **head}), {**under("backbone.", teacher), **head})
    save(tmp_path / "in.pth", *pair, dino_loss={"center": ONE}, optimizer={"state": {0: {"exp_avg": ONE}}})
    assert_same(load(tmp_path / "in.pth").tensors, teacher)
    torch.save({"teacher": pair[1]}, tmp_path / "in.pth")
    assert_same(load(tmp_path / "in.pth").tensors, teacher)
    save(tmp_path / "in.pth", student, teacher)
    assert_same(load(tmp_path / "in.pth").tensors, teacher)
    torch.save({"net": student, "epoch": 3}, tmp_path / "in.pth")
    assert_same(load(tmp_path / "in.pth").tensors, student)


def test_a_resnet_among_unknown_names_is_told_where_it_stands(tmp_path: Path, student: dict[str, Tensor]) -> None:
    torch.save({**under("trunk.", student), **mlp("jigsaw.", 0)}, tmp_path / "in.pth")
    with pytest.raises(
        ValueError,
        match=r"found 122 tensors such as trunk\.conv1.*The closest is a resnet18 as trunk\.\* \(complete; 2 tens",
    ):
        load(tmp_path / "in.pth")
    part = {name: tensor for name, tensor in student.items() if name != "layer4.1.bn2.bias"}
    torch.save({**under("trunk.", part), **mlp("jigsaw.", 0)}, tmp_path / "in.pth")
    with pytest.raises(
        ValueError, match=r"a resnet18 as trunk\.\* \(1 missing tensor \(layer4\.1\.bn2\.bias\); 2 tensors"
    ):
        load(tmp_path / "in.pth")
