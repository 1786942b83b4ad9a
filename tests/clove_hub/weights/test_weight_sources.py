"""What each kind of source gives, and the sentence for what is none: see test_matrix.py for the commands."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_cache import fetched
from loopback_hub import TOKEN, LoopbackHub, Repository, regular
from patience import PATIENCE
from safetensors.torch import load_file, save_file
from synthetic import released_tensors, save_released, trained, write_run
from timm.models import save_for_hf
from torch import Tensor, nn

from clove_hub.export import convert, export_run
from clove_hub.weights import fingerprint, load, load_backbone, load_method
from clove_hub.weights.architectures import LOOKALIKES
from clove_hub.zoo.resnets import RESNETS


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A run, and the backbone that it holds."""
    run = tmp_path_factory.mktemp("resnet18") / "run"
    return run, write_run(run, "resnet18")


@pytest.fixture(scope="module")
def bundle(resnet18: tuple[Path, nn.Module]) -> Path:
    return export_run(resnet18[0], license="mit")


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    """A bundle to spoil."""
    return Path(shutil.copytree(bundle, tmp_path / "copied"))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


# ---- where weights come from -----------------------------------------------------------------------------------------


def test_a_repository_of_the_hub_gives_the_same(
    resnet18: tuple[Path, nn.Module], bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that the Hub's client fetched earlier; without a network it is found by its revision."""
    commit = fetched(tmp_path / "cache", "somebody/weights", bundle)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    for source in ("hf-hub:somebody/weights", f"hf-hub:somebody/weights@{commit}"):
        assert_same(load(source).tensors, dict(resnet18[1].state_dict()))
    with pytest.raises(ValueError, match=r"cannot fetch hf-hub:somebody/weights@v2: it is not in the cache"):
        load("hf-hub:somebody/weights@v2")
    with pytest.raises(ValueError, match=r"cannot fetch hf-hub:somebody/other: .*HF_HUB_OFFLINE"):
        load("hf-hub:somebody/other")
    with pytest.raises(ValueError, match=r"cannot fetch hf-hub:a/b/c: .*Check the name"):
        load("hf-hub:a/b/c")


@pytest.mark.parametrize(
    ("kind", "prefix", "what", "notes"),
    [
        ("slotcon", "module.encoder_k.", "the teacher of .*, a released SlotCon checkpoint", 0),
        ("moco_knn", "module.encoder_q.", "the student of .*, a released MoCo-kNN checkpoint", 0),
        ("densecl", "encoder_q.0.", "the student of .*, a released DenseCL checkpoint", 0),
        ("byol_solo", "backbone.", "the student of .*, a released BYOL-style", 0),
        ("vicreg_full", "module.backbone.", "ckpt.pth", 2),
        ("swav", "module.", "ckpt.pth", 2),
        ("detco", "", "ckpt.pth", 2),
    ],
)
def test_every_kind_of_released_file_is_a_source(tmp_path: Path, kind: str, prefix: str, what: str, notes: int) -> None:
    theirs = released_tensors(kind)
    save_released(tmp_path / "ckpt.pth", kind, theirs)
    loaded = load(str(tmp_path / "ckpt.pth"))
    assert_same(loaded.tensors, {name: theirs[prefix + name] for name in loaded.tensors})
    assert len(loaded.tensors) == 120
    assert re.search(what, loaded.what)
    assert len(loaded.notes) == notes


def test_a_bundle_with_another_networks_weights_is_refused(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architecture": "resnet34", "pretrained_cfg": {}}')
    (tmp_path / "model.safetensors").symlink_to(bundle / "model.safetensors")
    with pytest.raises(ValueError, match=r"the bundle .* \(resnet34\): 96 missing tensors"):
        load(str(tmp_path))


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"model_type": "bert"}'])
def test_a_config_that_is_not_timms_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"its config\.json is not one that timm writes or reads"):
        load(str(tmp_path))


def test_a_source_that_is_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither a bundle \(config\.json.* nor a run \(recipe\.yaml"):
        load(str(tmp_path))
    with pytest.raises(
        ValueError,
        match=r"nowhere' does not exist: expected .* hf-hub:organization/name",
    ):
        load(str(tmp_path / "nowhere"))


def test_a_source_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return Path.mkdir, (tmp_path / "trace",)  # type: ignore[return-value]

    torch.save({"model": {"conv1.weight": torch.ones(1), "extra": Bomb()}}, tmp_path / "in.pth")
    with pytest.raises(ValueError, match="nothing that a file names is called"):
        load(str(tmp_path / "in.pth"))
    assert not (tmp_path / "trace").exists()


# ---- architectures ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_lookalikes_of_a_resnet_are_those_of_timm() -> None:
    """All of timm's ResNets with the names and shapes of one that other libraries build."""
    found: dict[str, tuple[str, ...]] = {}
    with torch.device("meta"):
        for name in timm.list_models(module="resnet"):
            state = timm.create_model(name, num_classes=0).state_dict()
            shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
            for own, network in RESNETS.items():
                if name != own and shapes == network.shapes:
                    found[own] = (*found.get(own, ()), name)
    assert found == dict(LOOKALIKES)


def test_a_run_of_a_lookalike_is_no_resnet_to_other_libraries(tmp_path: Path) -> None:
    model = write_run(tmp_path / "run", "resnetblur18")
    loaded = load(tmp_path / "run")
    assert loaded.architecture == "resnetblur18"
    for to in ("torchvision", "mmseg"):
        with pytest.raises(
            ValueError, match=rf"is a resnetblur18, which {to} does not build: expected one of resnet18,"
        ):
            convert(str(tmp_path / "run"), to, tmp_path / "out.pth")
    assert (
        "resnetblur18" in convert(str(tmp_path / "run"), "detectron2", tmp_path / "out.pth").how_to_load
    )  # as timm builds it
    names: dict[str, Any] = {}
    exec(convert(str(tmp_path / "run"), "timm", tmp_path / "out.safetensors").how_to_load, names)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(names["model"].eval()(image), model(image))
        assert torch.equal(load_backbone(tmp_path / "run").model(image), model(image))


@pytest.mark.parametrize(
    ("content", "beside", "architecture", "notes"),
    [
        ({}, None, "resnet18", ["which is assumed, and resnetblur18: if it is one of these"]),
        ({"arch": "resnetblur18"}, None, "resnetblur18", []),
        ({"arch": "resnet18"}, None, "resnet18", []),
        ({"args": argparse.Namespace(model="resnetblur18")}, None, "resnetblur18", []),
        ({"opt": {"arch": "resnetblur18"}}, None, "resnetblur18", []),
        ({}, {"architecture": "resnetblur18"}, "resnetblur18", []),
        ({"arch": "resnet18"}, {"architecture": "resnetblur18"}, "resnet18", []),
        ({"arch": "resnet"}, {"model_type": "resnet"}, "resnet18", ["resnetblur18"]),
    ],
)
def test_a_file_is_of_the_architecture_that_it_says(
    tmp_path: Path, content: dict[str, Any], beside: dict[str, str] | None, architecture: str, notes: list[str]
) -> None:
    torch.save({"state_dict": trained("resnet18").state_dict(), **content}, tmp_path / "in.pth")
    if beside:
        (tmp_path / "config.json").write_text(json.dumps(beside))
    loaded = load(tmp_path / "in.pth")
    assert loaded.architecture == architecture
    found = [note for note in loaded.notes if "normalized" not in note]
    assert len(found) == len(notes)
    assert all(note in text for note, text in zip(notes, found, strict=True))


def test_the_advice_of_the_note_can_be_followed(tmp_path: Path) -> None:
    save_file(trained("resnetblur18").state_dict(), tmp_path / "in.safetensors")
    note = next(note for note in load(tmp_path / "in.safetensors").notes if "config.json" in note)
    (written,) = re.findall(r"\{.*\}", note)
    (tmp_path / "config.json").write_text(written)
    assert load(tmp_path / "in.safetensors").architecture == "resnetblur18"


def test_a_network_that_is_no_resnet_is_read_where_its_name_is_said(tmp_path: Path) -> None:
    save_file(trained("convnext_atto").state_dict(), tmp_path / "in.safetensors")
    with pytest.raises(
        ValueError, match=r"not a ResNet.* write its name into a config\.json beside the file, as in \{"
    ) as refused:
        load(tmp_path / "in.safetensors")
    (written,) = re.findall(r"\{.*\}", str(refused.value))
    (tmp_path / "config.json").write_text(written.replace("convnext_tiny", "convnext_atto"))
    assert len(load(tmp_path / "in.safetensors").tensors) == 126


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("resnet34", r"in\.pth \(resnet34, as its `arch` says\): 96 missing tensors"),
        ("convnext_atto", r"in\.pth is a resnet18, but its `arch` says convnext_atto"),
    ],
)
def test_a_file_that_says_one_network_and_holds_another_is_refused(tmp_path: Path, said: str, message: str) -> None:
    torch.save({"state_dict": trained("resnet18").state_dict(), "arch": said}, tmp_path / "in.pth")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "in.pth")


def test_a_checkpoint_of_timms_training_brings_its_images(tmp_path: Path) -> None:
    options = argparse.Namespace(
        model="resnet18.a1_in1k", mean=[0.4], std=None, crop_pct=0.9, img_size=160, interpolation="bilinear"
    )
    state = {f"_orig_mod.{name}": t for name, t in timm.create_model("resnet18").state_dict().items()}
    average = {name: tensor + 1 for name, tensor in state.items()}
    content = {"arch": "resnet18.a1_in1k", "args": options, "state_dict": state, "state_dict_ema": average}
    torch.save(content, tmp_path / "in.pth")
    loaded = load(tmp_path / "in.pth")
    seen = loaded.preprocessing
    assert (seen.size, seen.mean, seen.interpolation, seen.crop_pct) == (160, (0.4, 0.4, 0.4), "bilinear", 0.9)
    assert loaded.notes == (
        "The classifier was left out (fc.bias, fc.weight).",
        "The weights are the moving average that the file has under state_dict_ema, not those under state_dict.",
    )
    assert torch.equal(loaded.tensors["conv1.weight"], average["_orig_mod.conv1.weight"])


@pytest.mark.parametrize(
    ("name", "model_args"),
    [
        ("resnet18", {"output_stride": 16}),
        ("vit_tiny_patch16_224", {"img_size": 96, "depth": 1}),
        ("convnext_atto", {"depths": (1, 1, 2, 1)}),
    ],
)
def test_the_arguments_that_timm_writes_are_part_of_the_architecture(
    tmp_path: Path, name: str, model_args: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **model_args).eval()
    save_for_hf(model, str(tmp_path / "saved"), model_args=model_args, safe_serialization=True)
    loaded, backbone = load(tmp_path / "saved"), load_backbone(tmp_path / "saved")
    assert loaded.model_args.keys() == model_args.keys()
    side = loaded.preprocessing.size
    assert side == model_args.get("img_size", side)
    image = torch.randn(1, 3, side, side)
    with torch.no_grad():
        assert torch.equal(backbone.model(image), model(image))
        assert torch.equal(
            backbone.maps(image)[0], model.forward_intermediates(image, norm=True, intermediates_only=True)[-1]
        )
        names: dict[str, Any] = {}
        exec(convert(str(tmp_path / "saved"), "timm", tmp_path / "out.safetensors").how_to_load, names)
        assert torch.equal(names["model"].eval()(image), model(image))
    assert loaded.fingerprint != fingerprint(name, loaded.tensors)
    with pytest.raises(ValueError, match=r"with model_args \{.*\}, which mmseg does not build|which mmseg does"):
        convert(str(tmp_path / "saved"), "mmseg", tmp_path / "out.pth")
    if name != "resnet18":
        said = convert(str(tmp_path / "saved"), "detectron2", tmp_path / "out.pth").how_to_load
        assert all(key in said for key in model_args)


def test_arguments_that_change_nothing_are_not_part_of_the_architecture(tmp_path: Path) -> None:
    for name in ("resnet18", "vit_tiny_patch16_224"):
        model = timm.create_model(name, num_classes=3, drop_path_rate=0.1)
        save_for_hf(model, str(tmp_path / name), safe_serialization=True)
        loaded = load(tmp_path / name)
        assert loaded.model_args == {}
        assert loaded.fingerprint == fingerprint(name, loaded.tensors)


@pytest.mark.parametrize(
    ("model_args", "message"),
    [
        ({"checkpoint_path": "/etc/passwd"}, "has 'checkpoint_path' among its model_args"),
        ({"pretrained": True}, "has 'pretrained' among its model_args"),
        ({"in_chans": 0}, "has in_chans 0 among its model_args; expected 1 to 1024 bands"),
        ({"norm_layer": {"a": 1}}, "expected names with numbers, words or lists"),
        ([1], r"has model_args \[1\]; expected names"),
        ({"no_such_thing": 1}, r"timm cannot build resnet18 with the model_args \{'no_such_thing': 1\}"),
    ],
)
def test_arguments_that_make_no_backbone_are_refused(tmp_path: Path, model_args: Any, message: str) -> None:
    config = {"architecture": "resnet18", "model_args": model_args, "pretrained_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(trained("resnet18").state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"mean": [0.5]}, r"has mean \[0\.5\]; expected three numbers from 0 to 1"),
        ({"std": [0.5, 0, 0.5]}, "has std"),
        ({"mean": ["a", "b", "c"]}, "has mean"),
        ({"input_size": [3, 224]}, "has input_size"),
        ({"crop_pct": "much"}, "has crop_pct"),
        (7, "has pretrained_cfg 7, expected keys and values"),
    ],
)
def test_preprocessing_that_is_not_timms_is_refused(tmp_path: Path, cfg: Any, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18", "pretrained_cfg": cfg}))
    save_file(trained("resnet18").state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_a_file_in_its_first_authors_names_is_renamed_by_timm_and_held_to_the_architecture(tmp_path: Path) -> None:
    """Microsoft's Swin files count a stage's downsampling to the stage before, and call the classifier `head`."""
    model_args = {"depths": [1, 1, 1, 1], "embed_dim": 24, "num_heads": [1, 1, 1, 1]}
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **model_args)

    def theirs(name: str) -> str:
        name = re.sub(r"layers\.(\d)\.downsample", lambda at: f"layers.{int(at[1]) - 1}.downsample", name)
        return name.replace("head.fc.", "head.")

    tensors = {theirs(name): tensor for name, tensor in model.state_dict().items()}
    config = {
        "architecture": "swin_tiny_patch4_window7_224",
        "num_classes": 5,
        "model_args": model_args,
        "pretrained_cfg": {"num_classes": 5, "input_size": [3, 224, 224], "classifier": "head.fc"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    loaded = load(tmp_path)
    assert "timm renamed the tensors of the file." in loaded.notes
    expected = {name: t for name, t in model.state_dict().items() if not name.startswith("head.")}
    assert_same(loaded.tensors, expected)
    del tensors["layers.0.downsample.norm.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing tensors? \(layers\.3\.downsample"):
        load(tmp_path)


# ---- sums ------------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_every_read_of_a_bundle_checks_its_sums(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    fetched(tmp_path / "cache", "acme/bundle", copied)
    sources = [str(copied), f"local-dir:{copied}", f"{copied / 'model.safetensors'}", "hf-hub:acme/bundle"]
    assert len({load(source).fingerprint for source in sources}) == 1
    if name == "config.json":
        (copied / name).write_text((copied / name).read_text().replace("0.485", "0.5"))
    else:
        flip(copied / name)
    for source in sources:
        with pytest.raises(
            ValueError, match=rf"{name} is not what was exported: its sha256 is not the one in clove_hub"
        ):
            load(source)


def test_a_bundle_whose_card_was_edited_is_still_its_weights(copied: Path) -> None:
    (copied / "README.md").write_text("A better description.")
    assert load(copied).license == "mit"


def test_sums_that_were_taken_away_are_missed(copied: Path) -> None:
    provenance = json.loads((copied / "clove_hub.json").read_text())
    del provenance["sha256"]["model.safetensors"]
    (copied / "clove_hub.json").write_text(json.dumps(provenance))
    with pytest.raises(
        ValueError, match=r"model\.safetensors is not what was exported: clove_hub\.json has no checksum of it"
    ):
        load(copied)


# ---- names and paths -------------------------------------------------------------------------------------------------


def test_a_word_that_is_a_model_and_a_path_is_refused_with_both_ways_out(
    resnet18: tuple[Path, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    save_for_hf(timm.create_model("resnet18", num_classes=3), str(tmp_path / "timms"), safe_serialization=True)
    fetched(tmp_path / "cache", "timm/resnet18.a1_in1k", tmp_path / "timms")
    (tmp_path / "resnet18").mkdir()
    (tmp_path / "resnet18" / "photo.jpg").touch()
    assert load("resnet18").kind == "timm"  # the folder holds no weights
    shutil.rmtree(tmp_path / "resnet18")
    (tmp_path / "resnet18").symlink_to(resnet18[0])
    message = (
        r"is both the name of a model and a path: write \./resnet18 for the path, or hf-hub:timm/resnet18\.TAG for"
    )
    with pytest.raises(ValueError, match=message):
        load("resnet18")
    assert load("./resnet18").kind == load(Path("resnet18")).kind == "run"
    assert load("hf-hub:timm/resnet18.a1_in1k").kind == "bundle"
    assert load("resnet18.a1_in1k").kind == "timm"


def test_a_tilde_is_the_home_of_a_user(
    resnet18: tuple[Path, nn.Module], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(resnet18[0].parent))
    assert load("~/run").fingerprint == load(f"local-dir:~/run/{bundle.name}").fingerprint
    with pytest.raises(ValueError, match="cannot be accessed"):
        load("~nobody-of-this-name/run")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("resnet18.a1_in1", r"did you mean resnet18\."),
        ("resnt18", r"did you mean resnet18"),
        ("./rnu", r"did you mean run\?"),
        ("resnet18.pth", r"does not exist"),
        ("x" * 5000, "cannot be accessed"),
        ("hub:somebody/weights", "expected a run's or bundle's folder"),
        ("resnet50.clove_in1k_200ep", "`clove-hub adopt FILE --as resnet50.clove_in1k_200ep`"),
        ("random:resnet50.a1_in1k", "write random:resnet50 or resnet50.a1_in1k"),
        ("random:resnt50", "did you mean resnet50"),
    ],
)
def test_what_is_no_source_is_told_what_is_near(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match=message) as refused:
        load(source)
    assert len(str(refused.value)) < 1200


def test_an_architecture_without_weights_says_what_there_is() -> None:
    name = next(name for name in timm.list_models() if not timm.models.is_model_pretrained(name))
    with pytest.raises(
        ValueError, match=f"timm has no weights of {name}: write random:{name} to start from random ones"
    ):
        load(name)


def test_a_fine_tuning_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    (tmp_path / "settings.yaml").touch()
    with pytest.raises(ValueError, match="is a fine-tuning run, which changed the backbone for its task"):
        load(tmp_path)


def test_a_model_of_the_zoo_comes_from_the_namespace_and_is_of_its_architecture(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOVE_HUB_NAMESPACE", "acme")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    name, other = "resnet50.clove_in1k_200ep", "resnet50.clove_in1k_400ep"
    folder = tmp_path / "resnet50"
    save_for_hf(timm.create_model("resnet50", num_classes=0), str(folder), safe_serialization=True)
    fetched(tmp_path / "cache", f"acme/{name}", folder)
    assert load(name).architecture == "resnet50"
    fetched(tmp_path / "cache", f"acme/{other}", bundle)
    with pytest.raises(ValueError, match=rf"{other} is published with the weights of another architecture: resnet18"):
        load(other)


# ---- fingerprints ----------------------------------------------------------------------------------------------------


def test_the_same_weights_have_one_fingerprint_wherever_they_are(
    resnet18: tuple[Path, nn.Module], bundle: Path, tmp_path: Path
) -> None:
    for to, name in (
        ("timm", "a.safetensors"),
        ("torchvision", "b.pth"),
        ("detectron2", "c.pth"),
        ("detectron2", "d.pkl"),
    ):
        convert(str(bundle), to, tmp_path / name)
    save_for_hf(load(bundle).build(), str(tmp_path / "saved"), safe_serialization=True)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    config["pretrained_cfg"]["mean"] = [0.5, 0.5, 0.5]  # which is none of the weights
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config))
    places = [resnet18[0], bundle, *(tmp_path / name for name in ("a.safetensors", "b.pth", "c.pth", "d.pkl", "saved"))]
    assert {load(place).fingerprint for place in places} == {fingerprint("resnet18", dict(resnet18[1].state_dict()))}


def test_a_fingerprint_changes_with_any_bit_any_type_and_the_architecture() -> None:
    tensors = {"a": torch.zeros(2, 3), "b": torch.tensor(7)}
    negative = {**tensors, "a": torch.tensor([[0.0, 0, 0], [0, 0, -0.0]])}
    variants = [
        fingerprint("resnet18", tensors),
        fingerprint("resnetblur18", tensors),
        fingerprint("resnet18", tensors, {"output_stride": 16}),
        fingerprint("resnet18", negative),
        fingerprint("resnet18", {**tensors, "a": torch.zeros(3, 2)}),
        fingerprint("resnet18", {**tensors, "a": torch.zeros(2, 3, dtype=torch.int32)}),
        fingerprint("resnet18", {"a": tensors["b"], "b": tensors["a"]}),
    ]
    assert len(set(variants)) == len(variants)
    assert fingerprint("resnet18", dict(reversed(tensors.items()))) == variants[0]
    assert fingerprint("resnet18", {**tensors, "a": torch.zeros(3, 2).t()}) == variants[0]  # in another memory order


def test_values_that_are_not_finite_are_refused_from_every_kind(tmp_path: Path, copied: Path) -> None:
    tensors = load_file(copied / "model.safetensors")
    tensors["bn1.weight"][3] = torch.inf
    save_file(tensors, tmp_path / "in.safetensors")
    (copied / "clove_hub.json").unlink()
    save_file(tensors, copied / "model.safetensors")
    for source in (tmp_path / "in.safetensors", copied):
        with pytest.raises(ValueError, match=r"1 tensor \(bn1\.weight\) with non-finite values"):
            load_backbone(source)


# ---- a method --------------------------------------------------------------------------------------------------------


def test_a_released_method_has_its_tensors_and_no_settings(tmp_path: Path) -> None:
    theirs = released_tensors("clove")
    save_released(tmp_path / "ckpt.pth", "clove", theirs)
    found = load_method(tmp_path / "ckpt.pth")
    assert found.name == "clove"
    assert torch.equal(found.tensors["student.backbone.conv1.weight"], theirs["module.encoder.conv1.weight"])
    with pytest.raises(ValueError, match="does not say with which settings it was trained"):
        _ = found.method


# ---- the Hub ---------------------------------------------------------------------------------------------------------

ASK = """
import sys
from clove_hub.weights import load
for source in sys.argv[1:]:
    try:
        print(load(source).fingerprint)
    except ValueError as error:
        print(error)
"""


def ask(hub: LoopbackHub, home: Path, *sources: str, **environment: str) -> list[str]:
    """What the real client makes of repositories on loopback, in a process with an empty cache."""
    home.mkdir()
    told = os.environ | hub.environment(home) | environment
    done = subprocess.run(
        [sys.executable, "-c", ASK, *sources], env=told, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert TOKEN not in done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.network
def test_the_real_client_fetches_once_and_its_failures_are_sentences(bundle: Path, tmp_path: Path) -> None:
    with LoopbackHub() as hub:
        hub.repositories["acme/weights"] = Repository(private=False)
        files = {path.name: regular(path.read_bytes()) for path in bundle.iterdir()}
        hub.repositories["acme/weights"].commit("first", files)
        hub.repositories["acme/thesis"] = Repository(private=False)
        hub.repositories["acme/thesis"].commit("first", {"thesis.pdf": regular(b"years of work")})
        sources = ["hf-hub:acme/weights", "hf-hub:acme/weights@v9", "hf-hub:acme/nothing", "hf-hub:acme/thesis"]
        found, revision, absent, thesis = ask(hub, tmp_path / "one", *sources)
        assert found == load(bundle).fingerprint
        assert revision.startswith(
            "cannot fetch hf-hub:acme/weights@v9: it has no tag, branch or commit v9: leave out @v9"
        )
        assert absent.startswith("cannot fetch hf-hub:acme/nothing: it does not exist on the Hub")
        assert "neither a bundle (config.json, model.safetensors) nor the state of a run" in thesis
        asked = [name for name in hub.requests if "resolve" in name]
        assert not any("README" in name or "curves" in name for name in asked), asked  # only what is read
        hub.forget((1, "down"))
        (unreachable,) = ask(hub, tmp_path / "two", "hf-hub:acme/weights")
        assert f"no answer from {hub.url}" in unreachable


@pytest.mark.slow
@pytest.mark.network
def test_a_file_that_the_network_damaged_is_found(bundle: Path, tmp_path: Path) -> None:
    with LoopbackHub() as hub:
        files = {path.name: path.read_bytes() for path in bundle.iterdir()}
        weights = files["model.safetensors"]
        files["model.safetensors"] = weights[:-1] + bytes([weights[-1] ^ 1])
        hub.repositories["acme/weights"] = Repository(private=False)
        hub.repositories["acme/weights"].commit("first", {name: regular(content) for name, content in files.items()})
        (said,) = ask(hub, tmp_path / "home", "hf-hub:acme/weights")
    assert said.startswith("hf-hub:acme/weights: model.safetensors is not what was exported: its sha256 is not the one")
