"""Reading files of weights: what is read, what is refused, and what the refusal says."""

from __future__ import annotations

import argparse
import gzip
import io
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from synthetic import released_clove, save_released

from clove_hub.zoo import (
    RESNETS,
    find_resnet,
    read_released,
    read_tensors,
    recognise,
    require_finite,
    require_names_and_shapes,
)

TENSORS = {
    "conv.weight": torch.randn(4, 3),
    "count": torch.tensor(5),
    "half": torch.ones(2, dtype=torch.bfloat16),
}


class Bomb:
    """A pickle that leaves a trace if it is ever executed."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.trace),)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def test_safetensors_are_read_as_they_are_with_their_metadata(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "weights.bin", metadata={"format": "pt"})  # by its content, not by its name
    tensors, rest = read_tensors(tmp_path / "weights.bin")
    assert_same(tensors, TENSORS)
    assert rest == {"format": "pt"}


@pytest.mark.parametrize("wrapper", ["model", "state_dict", None])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_pytorch_files_of_both_ages_are_read(tmp_path: Path, wrapper: str | None, zipped: bool) -> None:
    content = {wrapper: OrderedDict(TENSORS), "epoch": 3} if wrapper else TENSORS
    torch.save(content, tmp_path / "weights.pth", _use_new_zipfile_serialization=zipped)
    tensors, rest = read_tensors(tmp_path / "weights.pth")
    assert_same(tensors, TENSORS)
    assert rest == ({"epoch": 3} if wrapper else {})


def test_a_namespace_of_options_is_plain_data(tmp_path: Path) -> None:
    torch.save({"opt": argparse.Namespace(arch="resnet50"), "model": TENSORS}, tmp_path / "weights.pth")
    _, rest = read_tensors(tmp_path / "weights.pth")
    assert rest["opt"].arch == "resnet50"


@pytest.mark.parametrize("kind", ["zip", "before torch 1.6", "plain pickle"])
def test_a_file_that_would_run_code_is_refused_and_nothing_runs(tmp_path: Path, kind: str) -> None:
    content = {"model": TENSORS, "extra": Bomb(tmp_path / "trace")}
    path = tmp_path / "weights.pth"
    if kind == "plain pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(ValueError, match=r"weights.pth (holds more than tensors|could not be read)"):
        read_tensors(path)
    assert not (tmp_path / "trace").exists()

    if kind == "zip":  # the canary sings when it is let
        torch.load(path, weights_only=False)
        assert (tmp_path / "trace").exists()


def test_the_refusal_of_code_names_what_was_asked_for(tmp_path: Path) -> None:
    torch.save({"model": TENSORS, "extra": Bomb(tmp_path / "trace")}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"it asks for \w+\.mkdir.*save its state dict as safetensors"):
        read_tensors(tmp_path / "weights.pth")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-300])


def save_cut_safetensors(path: Path) -> None:
    save_file({"a": torch.ones(1000)}, path)
    cut(path)


def save_cut_pytorch(path: Path) -> None:
    torch.save({"a": torch.ones(1000)}, path)
    cut(path)


def save_cut_old_pytorch(path: Path) -> None:
    torch.save({"a": torch.ones(1000)}, path, _use_new_zipfile_serialization=False)
    cut(path)


def save_compressed(path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(1000)}, buffer)
    with zipfile.ZipFile(buffer) as stored, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))


def save_other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: None, ": No such file"),
        (lambda p: p.mkdir(), "is a folder; expected a file with weights"),
        (lambda p: p.write_bytes(b""), "is an empty file"),
        (
            lambda p: p.write_text("<!DOCTYPE html><title>Quota exceeded"),
            "is a web page.*Was the download complete",
        ),
        (
            lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid"),
            "a Git LFS pointer .*git lfs pull",
        ),
        (lambda p: p.write_bytes(gzip.compress(b"weights")), "is a gzip archive"),
        (lambda p: p.write_bytes(b"\x00" * 100), "begins with"),
        (save_cut_safetensors, "is a damaged safetensors file"),
        (save_cut_pytorch, "is cut short or damaged"),
        (save_cut_old_pytorch, "could not be read as a PyTorch checkpoint"),
        (save_compressed, "is a compressed zip archive"),
        (save_other_zip, "could not be read as a PyTorch checkpoint"),
        (lambda p: torch.save([torch.ones(1)], p), "holds a list; expected a dict of named tensors"),
        (lambda p: torch.save({}, p), "holds nothing; expected named tensors"),
        (lambda p: torch.save({"model": {}}, p), "holds nothing under 'model'"),
        (
            lambda p: torch.save({"epoch": 3, "a": torch.ones(1)}, p),
            r"entries that are not tensors \(epoch\)",
        ),
        (lambda p: torch.save({"a": torch.ones(2, 2).to_sparse()}, p), r"entries that are not tensors \(a\)"),
    ],
)
def test_what_is_no_file_of_weights_is_refused_by_name_and_reason(tmp_path: Path, write, message: str) -> None:
    path = tmp_path / "weights.pth"
    write(path)
    with pytest.raises(ValueError, match=rf"weights\.pth.*{message}"):
        read_tensors(path)


def test_names_and_shapes_must_be_exactly_those_expected() -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    require_names_and_shapes(TENSORS, expected, "it")
    with pytest.raises(ValueError, match=r"^it: 1 missing tensor \(half\)\. "):
        require_names_and_shapes({k: v for k, v in TENSORS.items() if k != "half"}, expected, "it")
    with pytest.raises(ValueError, match=r"5 unexpected tensors \(x0, x1, x2 and 2 more\)"):
        require_names_and_shapes(TENSORS | {f"x{i}": torch.ones(1) for i in range(5)}, expected, "it")
    with pytest.raises(ValueError, match=r"1 mis-shaped tensor \(count \(1,\) instead of \(\)\)"):
        require_names_and_shapes(TENSORS | {"count": torch.ones(1)}, expected, "it")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_by_name(value: float) -> None:
    require_finite(TENSORS, "it")
    with pytest.raises(ValueError, match=r"it: 1 tensor \(bad\) with values that are not finite"):
        require_finite(TENSORS | {"bad": torch.tensor([0.0, value])}, "it")


@pytest.mark.parametrize("name", RESNETS)
def test_the_table_of_resnets_is_what_timm_and_torchvision_build(name: str) -> None:
    with torch.device("meta"):
        ours = timm.create_model(name, num_classes=0).state_dict()
        theirs = getattr(torchvision.models, name)().state_dict()
    shapes = {key: tuple(tensor.shape) for key, tensor in ours.items()}
    assert RESNETS[name].shapes == shapes
    assert shapes == {key: tuple(t.shape) for key, t in theirs.items() if not key.startswith("fc.")}
    assert find_resnet(ours, "it") == name


@pytest.mark.parametrize("name", ["convnext_atto", "vit_tiny_patch16_224", "resnet26d"])
def test_what_is_no_resnet_is_said_to_be_none(name: str) -> None:
    with torch.device("meta"):
        tensors = timm.create_model(name, num_classes=0).state_dict()
    with pytest.raises(ValueError, match=r"it is not a (complete )?ResNet"):
        find_resnet(tensors, "it")


def test_a_resnet_with_a_piece_missing_is_told_what_it_lacks() -> None:
    with torch.device("meta"):
        tensors = timm.create_model("resnet50", num_classes=0).state_dict()
    del tensors["layer4.2.conv3.weight"]
    with pytest.raises(ValueError, match=r"closest to resnet50, but has 1 missing tensor \(layer4\.2\.conv3\.weight\)"):
        find_resnet(tensors, "it")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_released_clove_checkpoint_gets_our_names_and_keeps_every_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    theirs = released_clove(dtype=dtype)
    save_released(tmp_path / "ckpt.pth", theirs)
    released = read_released(tmp_path / "ckpt.pth")

    assert (released.format, released.architecture, released.exported) == ("clove", "resnet18", "student")
    names = {
        "module.encoder.layer1.0.conv1.weight": "student.backbone.layer1.0.conv1.weight",
        "module.encoder_k.layer4.1.bn2.running_var": "teacher.backbone.layer4.1.bn2.running_var",
        "module.projector.linear1.weight": "student.projector.linear1.weight",
        "module.projector_k.bn2.num_batches_tracked": "teacher.projector.bn2.num_batches_tracked",
        "module.self_attn.in_proj_weight": "student.predictor.qkv.weight",
        "module.self_attn.in_proj_bias": "student.predictor.qkv.bias",
        "module.self_attn.out_proj.weight": "student.predictor.out.weight",
        "module.self_attn.out_proj.bias": "student.predictor.out.bias",
    }
    assert len(released.tensors) == len(theirs)
    for their_name, our_name in names.items():
        assert_same({"it": released.tensors[our_name]}, {"it": theirs[their_name]})
    prefix = "module.encoder."
    student = {name[len(prefix) :]: t for name, t in theirs.items() if name.startswith(prefix)}
    assert_same(released.backbone("student"), student)
    assert not torch.equal(released.backbone("teacher")["conv1.weight"], student["conv1.weight"])


def test_a_resnet50_is_recognised_with_and_without_the_prefix_of_distributed_training() -> None:
    with torch.device("meta"):
        theirs = released_clove("resnet50")
    bare = {name.removeprefix("module."): tensor for name, tensor in theirs.items()}
    for tensors in (theirs, bare):
        released = recognise(tensors, "it")
        assert released is not None
        assert released.architecture == "resnet50"
        assert len(released.backbone("teacher")) == 318


def test_a_released_state_is_complete_for_our_method() -> None:
    """By the method itself: every tensor of the standard-attention CLoVE, each of the right shape."""
    from clove_hub.backbones import create_backbone
    from clove_hub.methods import Clove, CloveSettings

    settings = CloveSettings(global_size=224, local_size=96, projector_hidden=24, feature_dim=16, attention="standard")
    released = recognise(released_clove(), "it")
    assert released is not None
    Clove(create_backbone("resnet18"), settings).load_state_dict(released.tensors, strict=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("module.encoder.layer2.0.bn1.weight"),
            r"1 missing tensor \(layer2\.0\.bn1\.weight\)",
        ),
        (lambda t: t.pop("module.encoder_k.bn1.bias"), r"1 missing tensor \(teacher\.backbone\.bn1\.bias\)"),
        (
            lambda t: t.pop("module.projector.linear1.weight"),
            r"missing tensor.*student\.projector\.linear1\.weight",
        ),
        (lambda t: t.update({"module.queue": torch.ones(3)}), r"1 unexpected tensor \(queue\)"),
        (
            lambda t: t.update({"module.self_attn.in_proj_bias": torch.ones(3)}),
            r"1 mis-shaped tensor \(student\.predictor\.qkv\.bias \(3,\) instead of \(48,\)\)",
        ),
    ],
)
def test_a_released_checkpoint_that_is_not_whole_is_refused_by_the_tensors_name(change, message: str) -> None:
    tensors = released_clove()
    change(tensors)
    with pytest.raises(ValueError, match=message):
        recognise(tensors, "it")


def test_a_file_in_no_released_format_is_told_what_was_found_and_expected(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"no released checkpoint known here: found 3 tensors .* module\.self_attn"):
        read_released(tmp_path / "other.safetensors")
