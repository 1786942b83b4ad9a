"""Released checkpoints become bundles: the right encoder, bit for bit, with what is known about it; or a refusal."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from loopback_files import FileServer
from safetensors.torch import save_file
from synthetic import released_tensors, save_released, write_run
from torch import Tensor
from trajectories import golden_weight, released_names

from clove_hub.backbones import create_backbone
from clove_hub.cli import main
from clove_hub.export import export_run
from clove_hub.export.adopt import adopt
from clove_hub.export.bundle import FILES, check_bundle
from clove_hub.export.inspect import inspect_source
from clove_hub.methods.clove import Clove, CloveSettings
from clove_hub.weights import load
from clove_hub.zoo.models import models

FOREIGN = {
    # Beyond the zoo: what the names of the encoder begin with that is taken, and which one that is. (test_zoo has more
    # kinds of files; from there on they go the same way.)
    "slotcon_backbone": ("module.encoder_k.", "teacher"),
    "moco": ("module.encoder_q.", "student"),
    "moco_knn": ("module.encoder_q.", "student"),
    "resim": ("module.encoder_q.", "student"),
    "densecl": ("encoder_q.0.", "student"),
    "detco": ("", "backbone"),
    "vicreg_full": ("module.backbone.", "backbone"),
    "vicregl_full": ("module.backbone.", "backbone"),
    "byol": ("online_encoder.net.", "student"),
    "swav": ("module.", "backbone"),
    "torchvision": ("", "backbone"),
}
ZOO = {
    # Models of the zoo: the kind of file, what the names of the card's encoder begin with, what is noted, and what the file
    # does not say.
    "resnet50.slotcon_coco_800ep": ("slotcon", "module.encoder_k.", None, "epoch and data set"),
    "resnet50.slotcon_in1k_200ep": (
        "vicreg",
        "",
        "does not record which encoder it is of; that of resnet50.slotcon_in1k_200ep is the teacher's",
        None,
    ),
    "resnet50.moco_knn_coco_800ep": (
        "moco",
        "module.encoder_q.",
        "have the same tensor names; resnet50.moco_knn_coco_800ep is of MoCo with three extra invariances (k-NN)",
        "data set",
    ),
    "resnet50.pixpro_in1k_400ep": ("pixpro", "module.encoder.", None, "epoch and data set"),
}


def provenance(bundle: Path) -> dict[str, object]:
    told: dict[str, object] = json.loads((bundle / "clove_hub.json").read_text())
    return told


def assert_loads(bundle: Path, expected: Mapping[str, Tensor]) -> None:
    """timm gives exactly these tensors."""
    found = timm.create_model(f"local-dir:{bundle}", pretrained=True).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def the_part(tensors: Mapping[str, Tensor], prefix: str, architecture: str) -> dict[str, Tensor]:
    with torch.device("meta"):
        names = timm.create_model(architecture, num_classes=0).state_dict().keys()
    return {name: tensors[prefix + name] for name in names}


@pytest.fixture(scope="module")
def clove(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CLoVE checkpoint, for what is refused."""
    path = tmp_path_factory.mktemp("clove") / "ckpt.pth"
    save_released(path, "clove", released_tensors("clove"))
    return path


# ---- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_released_file_beyond_the_zoo_becomes_a_bundle_bit_for_bit(tmp_path: Path, kind: str) -> None:
    theirs = released_tensors(kind)
    save_released(tmp_path / "ckpt.pth", kind, theirs)
    adopt(tmp_path / "ckpt.pth", f"resnet18.{kind}", tmp_path / "bundle", license="cc-by-nc-4.0")
    prefix, encoder = FOREIGN[kind]
    assert_loads(tmp_path / "bundle", the_part(theirs, prefix, "resnet18"))
    told = provenance(tmp_path / "bundle")
    assert (told["exported"], told["model"]) == (encoder, None)
    assert json.loads((tmp_path / "bundle" / "config.json").read_text())["pretrained_cfg"]["license"] == "cc-by-nc-4.0"


@pytest.mark.parametrize(
    ("kind", "said", "tags"),
    [
        (
            "torchvision",
            "a ResNet alone. The file does not say how it was trained, whether labels were used, or on which images.",
            [],
        ),
        (
            "byol",
            "BYOL-style (online_encoder.net.* and target_encoder.net.*). The file does not say how it was trained, or on",
            ["self-supervised", "byol"],
        ),
    ],
)
def test_the_card_of_a_file_beyond_the_zoo_says_no_more_than_its_names_tell(
    tmp_path: Path, kind: str, said: str, tags: list[str]
) -> None:
    save_released(tmp_path / "ckpt.pth", kind, released_tensors(kind))
    adopt(tmp_path / "ckpt.pth", "resnet18.found", tmp_path / "bundle", license="cc-by-nc-4.0")
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert "# Model card for resnet18.found\n" in card
    assert said in card
    assert yaml.safe_load(card.split("---\n")[1])["tags"] == ["timm", "transformers", *tags]
    assert "used no labels" not in card
    config = json.loads((tmp_path / "bundle" / "config.json").read_text())["pretrained_cfg"]
    assert config["tag"] == "found"
    assert ("without labels" in config["description"]) == bool(tags)


@pytest.mark.parametrize("name", ZOO)
def test_a_model_of_the_zoo_is_the_encoder_that_its_card_says_bit_for_bit(tmp_path: Path, name: str) -> None:
    kind, prefix, note, unsaid = ZOO[name]
    theirs = released_tensors(kind, "resnet50")
    save_released(tmp_path / "ckpt.pth", kind, theirs)
    weights = adopt(tmp_path / "ckpt.pth", name, tmp_path / "bundle")
    assert_loads(tmp_path / "bundle", the_part(theirs, prefix, "resnet50"))

    model, told = models()[name], provenance(tmp_path / "bundle")
    assert (told["model"], told["method"], told["exported"]) == (name, model.method, model.exported)
    assert weights.license == model.paper.license
    origin = told["origin"]
    assert isinstance(origin, dict)
    assert origin["sha256"] == hashlib.sha256((tmp_path / "ckpt.pth").read_bytes()).hexdigest()
    assert origin["file"] == "ckpt.pth"
    assert str(tmp_path) not in (tmp_path / "bundle" / "clove_hub.json").read_text()
    *notes, silent = origin["notes"]
    assert (note is None) == (notes == [])
    assert note is None or note in notes[0]
    if unsaid is None:
        assert silent.startswith(
            f"**Nothing in the file confirms that these are the weights of {name}.** It holds only a ResNet"
        )
        assert silent in (tmp_path / "bundle" / "README.md").read_text()
    else:
        assert silent == f"The file does not record its {unsaid}; those of {name} are given here."


def test_a_file_that_speaks_against_the_card_is_refused_with_both_values(tmp_path: Path) -> None:
    theirs, name = released_tensors("pixpro", "resnet50"), "resnet50.pixpro_in1k_400ep"
    agreed = {"epoch": 399, "opt": {"epochs": 400, "dataset": "ImageNet", "num_instances": 1281167}}
    torch.save({"model": theirs, **agreed}, tmp_path / "ckpt.pth")
    weights = adopt(tmp_path / "ckpt.pth", None, tmp_path / "bundle")
    assert weights.model is models()[name], "it says enough to need no name"
    assert weights.origin["notes"] == []
    for told, message in (
        ({"epoch": 200}, f"records epoch 200, but the card of {name} has epoch 400"),
        ({"epoch": 399, "opt": {"epochs": 800}}, "records epochs 800, but .* has epochs 400"),
        ({"opt": {"num_instances": 118287}}, "records images 118287, but .* has images 1281167"),
        ({"opt": {"dataset": "COCO"}}, "records data set COCO, but .* has data set ImageNet-1k"),
    ):
        torch.save({"model": theirs, **told}, tmp_path / "ckpt.pth")
        with pytest.raises(ValueError, match=message):
            adopt(tmp_path / "ckpt.pth", name, tmp_path / "bundle")


def test_a_bare_backbone_is_named_by_whoever_gives_it_or_by_its_sum(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, theirs = tmp_path / "my ckpt.pth", released_tensors("vicreg", "resnet50")
    save_released(file, "vicreg", theirs)
    arguments = ["adopt", str(file), "--out", str(tmp_path / "bundle")]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "is a ResNet alone. It does not record its method, epoch, data set; give the name" in said
    for name in models():
        assert (f"\n    clove-hub adopt '{file}' --as {name}\n" in said) == ("slotcon" in name)
    assert f"clove-hub adopt '{file}' --as resnet50.my_tag --license ID" in said

    released, digest = "resnet50.slotcon_in1k_200ep", hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setitem(models(), released, dataclasses.replace(models()[released], sha256=(digest,)))
    assert main([*arguments, "--as", "resnet50.slotcon_coco_800ep"]) == 2
    assert f"has the sha256 of the released file of {released}, but --as names" in capsys.readouterr().err
    assert main(["inspect", str(file)]) == 0
    assert f"{digest}, that of {released}" in capsys.readouterr().out
    assert main(arguments) == 0
    assert f"Its sha256 is that of the released file of {released}." in capsys.readouterr().out
    assert_loads(tmp_path / "bundle", theirs)
    told = provenance(tmp_path / "bundle")
    assert told["model"] == released
    assert "Nothing in the file confirms" not in (tmp_path / "bundle" / "README.md").read_text()


@pytest.mark.network
def test_an_address_is_a_file_like_any_other_however_often_it_is_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    theirs = released_tensors("vicreg")
    save_released(tmp_path / "ckpt.pth", "vicreg", theirs)
    content = (tmp_path / "ckpt.pth").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    with FileServer(content, "cut:9000000", "cut:9000000", "cut:9000000") as server:
        arguments = [
            "adopt",
            f"{server.url}?sig=secret",
            "--as",
            "resnet18.mine",
            "--license",
            "mit",
            "--sha256",
            digest,
        ]
        assert main(arguments) == 0
        assert server.bytes_sent == len(content)
    adopted = tmp_path / "cache/clove-hub/models/resnet18.mine"
    assert_loads(adopted, theirs)
    origin = provenance(adopted)["origin"]
    assert isinstance(origin, dict)
    assert {key: origin[key] for key in ("fetched_from", "url", "file", "size", "sha256")} == {
        "fetched_from": server.url,
        "url": server.url,
        "file": "ckpt.pth",
        "size": len(content),
        "sha256": digest,
    }
    captured = capsys.readouterr()
    assert "secret" not in captured.out + captured.err
    assert "secret" not in "".join(path.read_text() for path in (tmp_path / "cache").rglob("*.json"))


def test_clove_goes_there_and_back_with_the_weights_of_the_golden_trajectory(
    golden: Mapping[str, Mapping[str, np.ndarray]], tmp_path: Path
) -> None:
    """Those that five steps of training start from in test_clove, in the file that the released code writes."""
    seed = int(golden["clove_trajectory"]["seed"])
    with torch.device("meta"):
        shapes = Clove(create_backbone("resnet50"), CloveSettings(global_size=160, attention="standard")).state_dict()
        names = released_names(
            Clove(create_backbone("resnet50"), CloveSettings(global_size=160, attention="standard")), "clove"
        )

    def drawn(name: str, shape: torch.Size) -> Tensor:
        weight = golden_weight(name, shape, seed)
        return weight.float() if weight.is_floating_point() else weight

    student = {
        theirs: drawn(theirs, shapes[ours].shape) for ours, theirs in names.items() if ours.startswith("student.")
    }
    teacher = {
        theirs: student[theirs.replace("encoder_k.", "encoder.").replace("projector_k.", "projector.")] + 1
        for ours, theirs in names.items()
        if ours.startswith("teacher.")
    }
    file = tmp_path / "ckpt.pth"
    save_released(file, "clove", {f"module.{name}": tensor for name, tensor in (student | teacher).items()})
    adopt(file, "resnet50.clove_in1k_400ep", tmp_path / "bundle")
    assert_loads(tmp_path / "bundle", the_part(student, "encoder.", "resnet50"))


def test_the_images_that_a_config_beside_the_file_tells_of_are_those_of_the_bundle(tmp_path: Path) -> None:
    save_released(tmp_path / "ckpt.pth", "torchvision", released_tensors("torchvision"))
    told = {"architecture": "resnet18", "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2], "input_size": [3, 160, 160]}
    for name, beside in (("own", told), ("none", None)):
        (tmp_path / "config.json").unlink(missing_ok=True)
        if beside:
            (tmp_path / "config.json").write_text(json.dumps(beside))
        adopt(tmp_path / "ckpt.pth", "resnet18.my_tag", tmp_path / name, license="mit")
    own, none = (load(tmp_path / name).preprocessing for name in ("own", "none"))
    assert (own.size, own.mean, own.std) == (160, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    assert (none.size, none.mean) == (224, (0.485, 0.456, 0.406))
    notes = [provenance(tmp_path / name)["origin"]["notes"] for name in ("own", "none")]  # type: ignore[index]
    assert notes[0] == []
    assert "does not say how its training images were preprocessed" in notes[1][0]


def test_a_file_from_before_torch_1_6_and_one_in_safetensors_give_the_same_bytes(clove: Path, tmp_path: Path) -> None:
    theirs = released_tensors("clove")
    save_released(tmp_path / "old.pth", "clove", theirs, zipped=False)
    save_file({name: tensor.clone() for name, tensor in theirs.items()}, tmp_path / "new.safetensors")
    for number, file in enumerate((clove, clove, tmp_path / "old.pth", tmp_path / "new.safetensors")):
        adopt(file, "resnet18.clove", tmp_path / str(number), license="mit")
    for name in FILES:
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "1" / name).read_bytes(), name
    for other in ("2", "3"):
        for name in ("model.safetensors", "config.json"):
            assert (tmp_path / "0" / name).read_bytes() == (tmp_path / other / name).read_bytes(), name


def test_an_adopted_bundle_is_a_source_like_any_other(clove: Path, tmp_path: Path) -> None:
    adopt(clove, "resnet18.clove", tmp_path / "bundle", license="mit")
    check_bundle(tmp_path / "bundle")
    one, two = load(str(tmp_path / "bundle")), load(str(clove))
    assert one.architecture == two.architecture == "resnet18"
    assert all(torch.equal(one.tensors[name], tensor) for name, tensor in two.tensors.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_of_half_precision_are_written_in_float32_with_a_word(tmp_path: Path, dtype: torch.dtype) -> None:
    theirs = released_tensors("clove", dtype=dtype)
    save_released(tmp_path / "ckpt.pth", "clove", theirs)
    weights = adopt(tmp_path / "ckpt.pth", "resnet18.half", tmp_path / "bundle", license="mit")
    student = the_part(theirs, "module.encoder.", "resnet18")
    assert_loads(tmp_path / "bundle", {name: t.float() if t.is_floating_point() else t for name, t in student.items()})
    said = f"stores the weights in {str(dtype).removeprefix('torch.')}; here they are in float32"
    assert said in weights.origin["notes"][-1]


def test_a_view_into_a_larger_tensor_takes_nothing_else_along(tmp_path: Path) -> None:
    theirs = released_tensors("timm")
    flat = torch.cat([tensor.flatten() for tensor in theirs.values() if tensor.is_floating_point()])
    parts = iter(flat.split([t.numel() for t in theirs.values() if t.is_floating_point()]))
    views = {name: next(parts).view(t.shape) if t.is_floating_point() else t for name, t in theirs.items()}
    torch.save(views, tmp_path / "ckpt.pth")
    adopt(tmp_path / "ckpt.pth", "resnet18.flat", tmp_path / "bundle", license="mit")
    assert_loads(tmp_path / "bundle", theirs)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (
            "clove",
            ["resnet50.clove_in1k_40ep"],
            r"not a model of the zoo: did you mean resnet50\.clove_in1k_400ep.*--license",
        ),
        (
            "clove",
            ["resnet50.clove_in1k_400ep"],
            r"holds a resnet18, but resnet50\.clove_in1k_400ep names a resnet50: give --as resnet18\.TAG",
        ),
        (
            "clove",
            ["resnet50.clove_in1k_400ep", "--license", "apache-2.0"],
            "was released under mit.*leave --license out",
        ),
        ("clove", ["resnet18.mine", "--license", "MIT"], "'MIT' is not a license id of the Hub .*did you mean 'mit'"),
        (
            "clove",
            ["resnet18", "--license", "mit"],
            r"--as resnet18: expected an architecture and a tag.*resnet50\.my_tag",
        ),
        ("clove", ["vit_small.mine", "--license", "mit"], r"architectures that can be adopted are resnet18, resnet34"),
        ("clove", ["resnet18.mine"], r"'resnet18\.mine' is not a model of the zoo.*and --license with the license"),
        (
            "slotcon50",
            ["resnet50.clove_in1k_400ep"],
            r"is a checkpoint of SlotCon, but .* is a model of CLoVE.*sthalles",
        ),
        ("moco_query50", ["resnet50.pixpro_in1k_400ep"], "is a checkpoint of MoCo v2 .* is a model of PixPro"),
        ("vicreg50", ["resnet50.clove_in1k_400ep"], "is a ResNet alone, but .* is a model of CLoVE"),
        (
            "torchvision50",
            ["resnet50.slotcon_coco_800ep"],
            r"a ResNet alone with a classifier \(fc\.weight, fc\.bias\)",
        ),
    ],
)
def test_what_is_not_what_its_name_says_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, arguments: list[str], message: str
) -> None:
    architecture = "resnet50" if kind.endswith("50") else "resnet18"
    kind = kind.removesuffix("50")
    save_released(tmp_path / "ckpt.pth", kind, released_tensors(kind, architecture))
    assert main(["adopt", str(tmp_path / "ckpt.pth"), "--out", str(tmp_path / "bundle"), "--as", *arguments]) == 2
    with pytest.raises(ValueError, match=message):
        raise ValueError(capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pth"], "something was left behind"


def test_what_is_in_the_way_is_left_alone(clove: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds something other than a bundle \(notes\.txt\)"):
        adopt(clove, "resnet18.clove", tmp_path, license="mit")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_command_says_what_it_took(clove: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(clove), "--as", "resnet18.clove", "--license", "mit", "--out", str(tmp_path / "bundle")]
    assert main(["adopt", *arguments]) == 0
    said = capsys.readouterr().out
    assert (
        f"resnet18.clove, the student in {clove}, recognized by its tensor names as CLoVE. 24 other tensors were left out"
        in said
    )
    assert hashlib.sha256((tmp_path / "bundle" / "model.safetensors").read_bytes()).hexdigest() in said
    assert "does not say how its training images were preprocessed" in said


# ---- looking at a file -----------------------------------------------------------------------------------------------


def test_a_file_is_described_without_anything_being_written(clove: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(clove.parent.iterdir())
    assert main(["inspect", str(clove), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sorted(clove.parent.iterdir()) == before
    assert {key: found[key] for key in ("what", "kind", "format", "architecture", "encoders", "exported")} == {
        "what": "a CLoVE checkpoint",
        "kind": "PyTorch checkpoint",
        "format": "clove",
        "architecture": "resnet18",
        "encoders": ["student", "teacher"],
        "exported": "student",
    }
    assert found["sha256"] == hashlib.sha256(clove.read_bytes()).hexdigest()
    assert found["size"] == clove.stat().st_size
    theirs = released_tensors("clove")
    assert (found["tensors"], len(found["heads"])) == (len(theirs), 24)
    assert found["values"] == sum(tensor.numel() for tensor in theirs.values())
    assert found["parameters"] == sum(p.numel() for p in timm.create_model("resnet18", num_classes=0).parameters())
    assert found["dtypes"] == {"float32": 220, "int64": 44}
    assert (found["not_finite"], found["refused"]) == ([], None)
    assert found["says"] == {"epoch": 400, "batch_size": 32}
    assert found["options"] == {"arch": "resnet18", "batch_size": 32, "crop": 0.2, "local_rank": 0}

    assert main(["inspect", str(clove)]) == 0
    said = capsys.readouterr().out
    for line in (
        *("is            a CLoVE checkpoint", "student (used), teacher", "11,176,512 parameters"),
        *("records       epoch 400, batch_size 32", "--arch resnet18 --batch_size 32 --crop 0.2"),
    ):
        assert line in said


def test_a_refused_file_is_described_as_far_as_it_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = released_tensors("pixpro")
    theirs["module.encoder.bn1.bias"][3] = torch.nan
    theirs["module.projector.bn1.bias"][3] = torch.inf
    save_released(tmp_path / "ckpt.pth", "pixpro", theirs)
    assert main(["inspect", str(tmp_path / "ckpt.pth")]) == 2
    said = capsys.readouterr().out
    assert "a PixPro checkpoint" in said
    assert "2 tensors (module.encoder.bn1.bias, module.projector.bn1.bias)" in said
    assert "refused       the student of" in said

    torch.save(timm.create_model("convnext_atto").state_dict(), tmp_path / "other.pth")
    found = inspect_source(tmp_path / "other.pth")
    assert (found.what, found.tensors, found.format) == ("a ConvNeXt", 128, None)
    assert found.refused is not None

    (tmp_path / "page.pth").write_text("<html>")
    found = inspect_source(tmp_path / "page.pth")
    assert found.sha256 == hashlib.sha256(b"<html>").hexdigest()
    assert found.refused is not None
    assert "a web page" in found.refused
    assert "does not exist" in str(inspect_source(tmp_path / "nowhere").refused)


def test_bundles_and_runs_are_described_too(tmp_path: Path) -> None:
    write_run(tmp_path / "run", "resnet18")
    export_run(tmp_path / "run", tmp_path / "bundle")
    for name, kind in (("run", "run"), ("bundle", "bundle")):
        found = inspect_source(tmp_path / name)
        assert (found.format, found.architecture, found.tensors, found.refused) == (kind, "resnet18", 120, None)
    assert "found neither a bundle" in str(inspect_source(tmp_path).refused)
