"""Reading files of weights: what is read, what is refused, and what the refusal says."""

from __future__ import annotations

import argparse
import gzip
import io
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from synthetic import RELEASED, TWICE, released_tensors, save_released

from clove_hub.zoo.checks import require_finite, require_names_and_shapes
from clove_hub.zoo.released import read_released, recognize
from clove_hub.zoo.resnets import RESNETS, find_resnet
from clove_hub.zoo.tensors import read_tensors

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
    assert rest == {"opt": {"arch": "resnet50"}}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_code_beside_the_weights_becomes_a_note_and_code_among_them_is_refused(tmp_path: Path, zipped: bool) -> None:
    path, bomb = tmp_path / "weights.pth", Bomb(tmp_path / "trace")
    torch.save({"model": TENSORS, "extra": [bomb]}, path, _use_new_zipfile_serialization=zipped)
    tensors, rest = read_tensors(path)
    assert_same(tensors, TENSORS)
    assert rest == {"extra": [f"{os.mkdir.__module__}.mkdir({tmp_path / 'trace'})"]}

    torch.save({"model": {**TENSORS, "more": bomb}}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ValueError,
        match=r"\(more is a call of \w+\.mkdir\) under 'model'.* nothing that a file names is called\. If you trust",
    ):
        read_tensors(path)
    assert not (tmp_path / "trace").exists()
    torch.load(path, weights_only=False)  # the canary sings when it is let
    assert (tmp_path / "trace").exists()


def test_a_pickle_that_torch_did_not_save_is_told_how_to_save_it(tmp_path: Path) -> None:
    (tmp_path / "weights.pkl").write_bytes(pickle.dumps({"model": TENSORS}))
    with pytest.raises(
        ValueError, match=r"a call of torch\.storage\._load_from_bytes.*save its state dict as safetensors"
    ):
        read_tensors(tmp_path / "weights.pkl")


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
            r"entries that are not tensors \(epoch is 3\)",
        ),
        (lambda p: torch.save({"a": torch.ones(2, 2).to_sparse()}, p), "a call of torch._utils._rebuild_sparse_tensor"),
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
    with pytest.raises(ValueError, match=r"it: 1 tensor \(bad\) with non-finite values"):
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


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("convnext_atto", "a ConvNeXt"),
        ("vit_tiny_patch16_224", "a vision transformer"),
        ("swin_tiny_patch4_window7_224", "a Swin transformer"),
        ("resnet26d", "a ResNet with a deep stem"),
        ("mobilenetv3_small_050", "an EfficientNet or MobileNet"),
    ],
)
def test_what_is_no_resnet_is_said_to_be_none(name: str, kind: str) -> None:
    with torch.device("meta"):
        tensors = timm.create_model(name, num_classes=0).state_dict()
    with pytest.raises(ValueError, match=rf"it is {kind}.*, not a ResNet: found {len(tensors)} tensors"):
        find_resnet(tensors, "it")


def test_a_resnet_with_a_piece_missing_is_told_what_it_lacks() -> None:
    with torch.device("meta"):
        tensors = timm.create_model("resnet50", num_classes=0).state_dict()
    del tensors["layer4.2.conv3.weight"]
    with pytest.raises(ValueError, match=r"closest to resnet50, but has 1 missing tensor \(layer4\.2\.conv3\.weight\)"):
        find_resnet(tensors, "it")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_released_checkpoint_gets_our_names_and_keeps_every_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    theirs = released_tensors("clove", dtype=dtype)
    save_released(tmp_path / "ckpt.pth", "clove", theirs)
    found = read_released(tmp_path / "ckpt.pth")

    assert (found.format, found.architecture, found.exported) == ("clove", "resnet18", "student")
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
    assert len(found.tensors) == len(theirs)
    for their_name, our_name in names.items():
        assert_same({"it": found.tensors[our_name]}, {"it": theirs[their_name]})
    prefix = "module.encoder."
    student = {name[len(prefix) :]: t for name, t in theirs.items() if name.startswith(prefix)}
    assert_same(found.backbone("student"), student)
    assert not torch.equal(found.backbone("teacher")["conv1.weight"], student["conv1.weight"])


def test_a_resnet50_is_recognized_with_and_without_the_prefix_of_distributed_training() -> None:
    with torch.device("meta"):
        theirs = released_tensors("clove", "resnet50")
    bare = {name.removeprefix("module."): tensor for name, tensor in theirs.items()}
    for tensors in (theirs, bare):
        found = recognize(tensors, "it")
        assert found is not None
        assert found.architecture == "resnet50"
        assert len(found.backbone("teacher")) == 318


def test_a_released_state_is_complete_for_our_method() -> None:
    """By the methods themselves: every tensor, each of the right shape, and the first of each kind at its place."""
    from clove_hub.backbones import create_backbone
    from clove_hub.methods.clove import Clove, CloveSettings
    from clove_hub.methods.moco import Moco, MocoSettings
    from clove_hub.methods.pixpro import Pixpro, PixproSettings
    from clove_hub.methods.slotcon import SlotCon, SlotConSettings

    small = {"projector_hidden": 24, "feature_dim": 16}
    whole = {
        "clove": (Clove, CloveSettings(attention="standard", **small)),
        "pixpro": (Pixpro, PixproSettings(**small)),
        "pixpro_instance": (Pixpro, PixproSettings(instance_weight=1.0, **small)),
        "slotcon": (SlotCon, SlotConSettings(prototypes=256, **small)),
        "moco": (Moco, MocoSettings(queue=32, **small)),
    }
    for kind, (build, settings) in whole.items():
        theirs = released_tensors(kind)
        found = recognize(theirs, "it")
        assert found is not None
        build(create_backbone("resnet18"), settings).load_state_dict(found.tensors, strict=True)
        assert len(found.tensors) == len(theirs), kind
    assert torch.equal(found.tensors["queue"], theirs["module.queue"].T)
    assert torch.equal(found.tensors["queue_start"], theirs["module.queue_ptr"][0])
    assert torch.equal(found.tensors["teacher.projector.linear2.weight"], theirs["module.encoder_k.fc.2.weight"])


# What each kind of file is taken for, what its student's and teacher's names begin with, and how many tensors are beside.
PLACES = {
    "clove": ("clove", "module.encoder.", "module.encoder_k.", 24),
    "slotcon": ("slotcon", "module.encoder_q.", "module.encoder_k.", 51),
    "slotcon_backbone": ("slotcon", None, "module.encoder_k.", 0),
    "pixpro": ("pixpro", "module.encoder.", "module.encoder_k.", 20),
    "pixpro_instance": ("pixpro", "module.encoder.", "module.encoder_k.", 47),
    "moco": ("moco", "module.encoder_q.", "module.encoder_k.", 10),
    "moco_query": ("moco", "module.encoder_q.", None, 4),
    "moco_knn": ("moco_knn", "module.encoder_q.", "module.encoder_k.", 11),
    "resim": ("resim", "module.encoder_q.", "module.encoder_k.", 18),
    "densecl": ("densecl", "encoder_q.0.", "encoder_k.0.", 20),
    "byol": ("byol", "online_encoder.net.", "target_encoder.net.", 12),
    "byol_mmselfsup": ("byol", "online_net.0.", "target_net.0.", 12),
    "byol_solo": ("byol", "backbone.", "momentum_backbone.", 14),
}
ALONE = {
    # The same for files with one backbone.
    "detco": ("resnet", "", 0),
    "vicreg": ("resnet", "", 0),
    "vicreg_full": ("vicreg", "module.backbone.", 15),
    "vicregl_full": ("vicreg", "module.backbone.", 30),
    "swav": ("swav", "module.", 5),
    "torchvision": ("resnet", "", 2),
    "timm": ("resnet", "", 0),
}


def test_every_kind_of_released_file_is_covered() -> None:
    assert PLACES.keys() | ALONE.keys() | {"detectron2"} == RELEASED.keys()


@pytest.mark.parametrize("kind", sorted(PLACES.keys() | ALONE.keys()))
def test_a_released_file_is_told_by_its_names_and_each_tensor_has_its_place(kind: str) -> None:
    theirs = released_tensors(kind)
    found = recognize(theirs, "it")
    assert found is not None
    prefixes = (
        {"backbone": ALONE[kind][1]}
        if kind in ALONE
        else dict(zip(("student", "teacher"), PLACES[kind][1:3], strict=True))
    )
    assert found.format == (ALONE.get(kind) or PLACES[kind])[0]
    assert len(found.heads) == (ALONE.get(kind) or PLACES[kind])[-1]
    assert found.encoders.keys() == {encoder for encoder, prefix in prefixes.items() if prefix is not None}
    names = timm.create_model("resnet18", num_classes=0).state_dict().keys()
    for encoder in found.encoders:
        assert_same(found.backbone(encoder), {name: theirs[prefixes[encoder] + name] for name in names})
    with pytest.raises(ValueError, match=r"holds no (teacher|backbone), only the (student|backbone|teacher)"):
        found.backbone("teacher" if "teacher" not in found.encoders else "backbone")


def test_a_backbone_in_detectron2s_names_is_taken_too() -> None:
    theirs, plain = released_tensors("detectron2"), released_tensors("timm")
    assert "res2.0.conv1.norm.weight" in theirs
    found = recognize(theirs, "it")
    assert found is not None
    assert_same(found.backbone("backbone"), plain)


@pytest.mark.parametrize("kind", sorted(PLACES.keys() | ALONE.keys()))
def test_a_released_file_with_a_tensor_too_many_too_few_or_of_another_shape_is_refused(kind: str) -> None:
    theirs = released_tensors(kind)
    prefix = "module." if all(name.startswith("module.") for name in theirs) else ""
    with pytest.raises(ValueError, match=r"1 unexpected tensor \(secret\)"):
        recognize(theirs | {f"{prefix}secret": torch.ones(1)}, "it")
    last = next(name for name in reversed(theirs) if name.endswith("layer4.1.conv2.weight"))
    for change, message in (
        ({}, rf"1 missing tensor \({re.escape(last.removeprefix(prefix))}\)"),
        (
            {last: torch.ones(3)},
            rf"1 mis-shaped tensor \({re.escape(last.removeprefix(prefix))} \(3,\) instead of \(512, 512",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            recognize({name: t for name, t in theirs.items() if name != last} | change, "it")


@pytest.mark.parametrize(
    ("kind", "name", "expected"),
    [
        ("slotcon", "module.predictor_slot.mlp.3.weight", "(24, 24)"),
        ("slotcon", "module.center", "(1, 5)"),
        ("pixpro", "module.value_transform.weight", "(16, 16, 1, 1)"),
        ("moco", "module.queue_ptr", "(1,)"),
        ("moco", "module.encoder_k.fc.2.weight", "(16, 24)"),
        ("densecl", "encoder_k.1.mlp2.2.weight", "(16, 24, 1, 1)"),
        ("vicreg_full", "module.projector.6.weight", "(24, 24)"),
    ],
)
def test_heads_are_held_to_names_and_shapes(kind: str, name: str, expected: str) -> None:
    theirs = released_tensors(kind)
    bare = re.escape(name.removeprefix("module."))
    with pytest.raises(ValueError, match=rf"1 missing tensor \({bare}\)"):
        recognize({other: tensor for other, tensor in theirs.items() if other != name}, "it")
    if name != "module.center":  # it is where the number of prototypes is told first
        with pytest.raises(
            ValueError, match=rf"1 mis-shaped tensor \({bare} \(7,\) instead of {re.escape(expected)}\)"
        ):
            recognize(theirs | {name: torch.ones(7)}, "it")
    else:
        with pytest.raises(ValueError, match=r"grouping_q\.slot_embed\.weight \(256, 16\) instead of \(5, 16\)"):
            recognize(theirs | {name: torch.ones(1, 5)}, "it")


@pytest.mark.parametrize("kind", ["densecl", "byol"])
def test_a_backbone_that_is_there_twice_must_be_the_same_twice(kind: str) -> None:
    theirs = released_tensors(kind)
    name = TWICE[kind][0] + "layer1.0.conv1.weight"
    with pytest.raises(ValueError, match=rf"1 tensor \({re.escape(name)}\) of the one differ"):
        recognize(theirs | {name: theirs[name] + 1}, "it")


def test_names_with_and_without_the_prefix_of_distributed_training_do_not_mix() -> None:
    theirs = released_tensors("timm")
    with pytest.raises(ValueError, match=r"1 unexpected tensor \(module\.conv1\.weight\)"):
        recognize(theirs | {"module.conv1.weight": theirs["conv1.weight"]}, "it")


def test_a_state_that_is_not_whole_is_no_start_for_training(tmp_path: Path) -> None:
    for kind in ("moco_query", "vicreg"):
        save_released(tmp_path / "ckpt.pth", kind, released_tensors(kind))
        with pytest.raises(ValueError, match=r"only its backbone can be taken\. Found \d+ tensors .* the whole state"):
            read_released(tmp_path / "ckpt.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("module.encoder.layer2.0.bn1.weight"),
            r"1 missing tensor \(encoder\.layer2\.0\.bn1\.weight\)",
        ),
        (lambda t: t.pop("module.encoder_k.bn1.bias"), r"1 missing tensor \(encoder_k\.bn1\.bias\)"),
        (
            lambda t: t.pop("module.projector.linear1.weight"),
            r"missing tensor.*projector\.linear1\.weight",
        ),
        (lambda t: t.update({"module.queue": torch.ones(3)}), r"1 unexpected tensor \(queue\)"),
        (
            lambda t: t.update({"module.self_attn.in_proj_bias": torch.ones(3)}),
            r"1 mis-shaped tensor \(self_attn\.in_proj_bias \(3,\) instead of \(48,\)\)",
        ),
    ],
)
def test_a_released_checkpoint_that_is_not_whole_is_refused_by_the_tensors_name(change, message: str) -> None:
    tensors = released_tensors("clove")
    change(tensors)
    with pytest.raises(ValueError, match=message):
        recognize(tensors, "it")


def test_a_file_in_no_released_format_is_told_what_was_found_and_expected(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"no released checkpoint known here\. Found 3 tensors .* module\.self_attn"):
        read_released(tmp_path / "other.safetensors")
