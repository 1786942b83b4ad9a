"""The zoo's models as tags of timm."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from clove_hub.export import write_bundle
from clove_hub.export.bundle import Contents
from clove_hub.weights import Preprocessing
from clove_hub.zoo import registry
from clove_hub.zoo.models import find_model

NAME = "resnet50.clove_in1k_400ep"


@pytest.fixture(scope="module")
def homes(tmp_path_factory) -> dict[str, str]:
    """Folders of a user who has adopted a model: its weights are random ones here."""
    home = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    model = find_model(NAME)
    weights = Contents(
        what="random weights",
        architecture="resnet50",
        tensors=timm.create_model("resnet50", num_classes=0).state_dict(),
        method=model.method,
        exported=model.exported,
        preprocessing=Preprocessing(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        origin={"kind": "adopted", "file": "random.pth", "sha256": "0" * 64, "format": "none", "notes": []},
        license="mit",
        model=model,
    )
    write_bundle(weights, home / "cache/clove-hub/models" / NAME)
    return {"XDG_CACHE_HOME": str(home / "cache"), "XDG_CONFIG_HOME": str(home / "config")}


def python(code: str, homes: dict[str, str], **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if key != "CLOVE_HUB_NAMESPACE"}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | homes | environment,
    )


def test_timm_knows_the_zoos_names_whichever_is_imported_first(homes):
    weights = Path(homes["XDG_CACHE_HOME"]) / "clove-hub/models" / NAME / "model.safetensors"
    code = f"""
import {{}}
import torch
from safetensors.torch import load_file
from clove_hub.zoo.registry import create_model
expected = load_file({str(weights)!r})
default = timm.create_model("resnet50", num_classes=3).pretrained_cfg["tag"]
assert timm.models._registry._model_default_cfgs["resnet50"].default_with_tag[0] == "a1_in1k", "the default tag"
assert default == "a1_in1k", default
assert {NAME!r} in timm.list_pretrained("resnet50")
for model in (timm.create_model({NAME!r}, pretrained=True), create_model({NAME!r})):
    state = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 2048)
    assert model.pretrained_cfg["license"] == "mit"
head = timm.create_model({NAME!r}, pretrained=True, num_classes=10)
assert head(torch.zeros(1, 3, 64, 64)).shape == (1, 10)
maps = timm.create_model({NAME!r}, pretrained=True, features_only=True)
assert len(maps(torch.zeros(1, 3, 64, 64))) == 5
print("ok")
"""
    done = python(code.format("clove_hub, timm"), homes)
    assert done.stdout == "ok\n", done.stderr
    done = python("import timm, clove_hub; print('" + NAME + "' in timm.list_pretrained())", homes)
    assert done.stdout == "True\n", done.stderr


def test_asking_where_timm_is_does_not_keep_its_names_away():
    """As transformers does before it decides what it offers."""
    code = """
import importlib.util
import clove_hub
assert importlib.util.find_spec("timm")
import timm
assert timm.get_pretrained_cfg("resnet50.clove_in1k_400ep").tag == "clove_in1k_400ep"
print("ok")
"""
    done = python(code, {})
    assert done.stdout == "ok\n", done.stderr


def test_importing_clove_hub_imports_neither_timm_nor_torch():
    code = "import sys, clove_hub; print({'timm', 'torch', 'numpy', 'huggingface_hub'} & sys.modules.keys())"
    assert python(code, {}).stdout == "set()\n"


def test_what_timm_is_told_is_what_the_bundle_says(homes):
    config = json.loads((Path(homes["XDG_CACHE_HOME"]) / "clove-hub/models" / NAME / "config.json").read_text())
    told = json.loads(json.dumps(registry.pretrained_cfg(find_model(NAME)).to_dict(remove_source=True)))
    said = {key: value for key, value in config["pretrained_cfg"].items() if key != "description"}
    assert {key: told.get(key) for key in said} == said


def test_without_weights_the_error_says_how_to_get_them(homes, tmp_path):
    own = str(tmp_path / "own.pth")
    code = f"""
import clove_hub, timm, torch
name = "resnet50.slotcon_coco_800ep"
assert not timm.models.is_model_pretrained(name)
assert not [known for known in timm.list_pretrained("resnet50") if "slotcon" in known]
assert timm.create_model(name).num_features == 2048  # random weights need none
torch.save(timm.create_model("resnet50", num_classes=0).state_dict(), {own!r})
timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file={own!r}))  # nor do one's own
from clove_hub.zoo.registry import create_model
for make in (lambda: timm.create_model(name, pretrained=True), lambda: create_model(name)):
    try:
        make()
    except ValueError as error:
        print(error)
"""
    done = python(code, homes)
    messages = done.stdout.splitlines()
    assert len(messages) == 2, done.stderr
    assert messages[0] == messages[1]
    assert "no weights of resnet50.slotcon_coco_800ep are known here" in messages[0]
    assert "released at https://github.com/CVMI-Lab/SlotCon" in messages[0]
    assert "clove-hub adopt FILE --as resnet50.slotcon_coco_800ep" in messages[0]
    assert "CLOVE_HUB_NAMESPACE" in messages[0]


def test_a_namespace_makes_them_tags_that_load_from_the_hub(homes, tmp_path):
    """From what the Hub's client fetched earlier, without a network."""
    commit, repository = "0123456789abcdef0123456789abcdef01234567", tmp_path / "hub" / f"models--somebody--{NAME}"
    (repository / "snapshots").mkdir(parents=True)
    bundle = Path(homes["XDG_CACHE_HOME"]) / "clove-hub/models" / NAME
    (repository / "snapshots" / commit).symlink_to(bundle)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    code = f"""
import clove_hub, timm, torch
from safetensors.torch import load_file
names = [name for name in timm.list_pretrained("resnet50") if name.rpartition(".")[2].startswith("slotcon")]
cfg = timm.models.get_pretrained_cfg({NAME!r})
print(len(names), cfg.hf_hub_id, cfg.num_classes, cfg.classifier)
expected = load_file({str(bundle / "model.safetensors")!r})
from clove_hub.zoo.registry import create_model
for model in (timm.create_model({NAME!r}, pretrained=True), create_model({NAME!r})):
    state = model.state_dict()
    print(state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in expected))
"""
    empty = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HUB_CACHE": str(tmp_path / "hub")}
    done = python(code, empty, CLOVE_HUB_NAMESPACE="somebody")
    assert done.stdout == f"4 somebody/{NAME} 0 fc\nTrue\nTrue\n", done.stderr


def test_a_wrong_namespace_is_a_warning_and_no_more(monkeypatch, caplog):
    monkeypatch.setenv("CLOVE_HUB_NAMESPACE", "a/b")
    registry.register()
    assert "CLOVE_HUB_NAMESPACE is 'a/b', which is no name" in caplog.text


def test_a_timm_with_another_registry_is_left_alone_with_a_warning_and_a_way_round_it(monkeypatch, caplog, homes):
    monkeypatch.setenv("XDG_CACHE_HOME", homes["XDG_CACHE_HOME"])
    monkeypatch.delattr(timm.models._registry, "_model_default_cfgs")
    registry.register()
    assert "clove_hub.zoo.registry.create_model(name) loads the zoo's models instead" in caplog.text
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", homes["XDG_CACHE_HOME"])
    assert registry.create_model(NAME).num_features == 2048
