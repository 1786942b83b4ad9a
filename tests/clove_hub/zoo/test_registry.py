"""The zoo's models as tags of timm."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from hub_cache import fetched
from loopback_hub import LoopbackHub, Repository, regular
from safetensors.torch import load_file, save

from clove_hub.export import write_bundle
from clove_hub.export.contents import Contents
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


@pytest.mark.slow
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
    """From what the Hub's client fetched earlier, without a network; timm lists that model and none that nobody has seen."""
    bundle = Path(homes["XDG_CACHE_HOME"]) / "clove-hub/models" / NAME
    fetched(tmp_path / "hub", f"somebody/{NAME}", bundle)
    code = f"""
import clove_hub, timm, torch
from safetensors.torch import load_file
names = {{name for name in timm.list_pretrained("resnet50") if name in clove_hub.list_models()}}
cfg = timm.models.get_pretrained_cfg({NAME!r})
print(*names, cfg.hf_hub_id, cfg.num_classes, cfg.classifier)
print(timm.models.get_pretrained_cfg("resnet50.slotcon_coco_800ep").hf_hub_id)
expected = load_file({str(bundle / "model.safetensors")!r})
from clove_hub.zoo.registry import create_model
for model in (timm.create_model({NAME!r}, pretrained=True), create_model({NAME!r})):
    state = model.state_dict()
    print(state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in expected))
"""
    empty = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HUB_CACHE": str(tmp_path / "hub")}
    done = python(code, empty, CLOVE_HUB_NAMESPACE="somebody")
    known, other = f"{NAME} somebody/{NAME} 0 fc", "somebody/resnet50.slotcon_coco_800ep"
    assert done.stdout == f"{known}\n{other}\nTrue\nTrue\n", done.stderr


@pytest.mark.slow
@pytest.mark.network
def test_a_version_is_what_loads_whatever_is_newest_and_only_where_it_was_asked_for(homes, tmp_path):
    bundle = Path(homes["XDG_CACHE_HOME"]) / "clove-hub/models" / NAME
    files = {path.name: regular(path.read_bytes()) for path in bundle.iterdir()}
    changed = load_file(bundle / "model.safetensors")
    changed["bn1.bias"] += 1
    newer = files | {"model.safetensors": regular(save(changed, {"format": "pt"}))}
    code = f"""
import os
from pathlib import Path
import clove_hub
from clove_hub.cli import main
assert main(["models"]) == main(["models", "--check"]) == main(["models"]) == 0
import timm  # after the check, so that its tags are made of what was seen there
print("listed", *{{name for name in timm.list_pretrained("resnet50") if name in clove_hub.list_models()}})

def bias(model):
    return float(model.state_dict()["bn1.bias"].sum())

there = {{"pretrained": True, "cache_dir": {str(tmp_path / "there")!r}}}
print("bias", bias(timm.create_model({NAME!r}, **there)))
print("bias", bias(timm.create_model({NAME!r}, features_only=True, **there)))
print("bias", bias(clove_hub.create_model({NAME!r}, cache_dir=there["cache_dir"])))
print("bias", bias(timm.create_model("hf-hub:acme/{NAME}@v1.0.0", **there)))
print("newest", bias(timm.create_model("hf-hub:acme/{NAME}", **there)))
print("elsewhere", *(path for path in Path({str(tmp_path / "hf")!r}).rglob("*.safetensors")))
print("bias", bias(clove_hub.load_backbone({NAME!r}).model))  # this one has no cache_dir
for revision in ("", "@v9"):
    os.environ["CLOVE_HUB_NAMESPACE"] = "nobody" if not revision else "acme" + revision
    for load in (clove_hub.create_model, clove_hub.load_backbone):
        try:
            load({NAME!r})
        except ValueError as error:
            print("refused", error)
"""
    with LoopbackHub() as hub:
        repository = hub.repositories[f"acme/{NAME}"] = Repository(private=False)
        repository.tags["v1.0.0"] = repository.commit("weights", files)
        repository.commit("other weights", newer)
        other = hub.repositories["acme/resnet50.clove_in1k_200ep"] = Repository(private=False)
        other.commit("weights without a tag", newer)
        away = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "XDG_CONFIG_HOME": str(tmp_path / "config")}
        environment = hub.environment(tmp_path / "hf") | away | {"CLOVE_HUB_NAMESPACE": "acme@v1.0.0"}
        done = python(code, environment)
    lines = done.stdout.splitlines()
    assert f"listed {NAME}" in lines, done.stderr
    old, new = changed["bn1.bias"].sum() - 64, changed["bn1.bias"].sum()
    assert [line for line in lines if line.startswith("bias")] == [f"bias {float(old)}"] * 5
    assert f"newest {float(new)}" in lines
    assert "elsewhere" in lines, "a file lies outside of cache_dir"
    places = [line.split("hf-hub:")[1] for line in lines if "  hf-hub:" in line and NAME in line]
    pinned = f"acme/{NAME}@v1.0.0"
    assert places == [f"{pinned} (not checked)", pinned, pinned], "before the check, in it, and after it"
    assert len([line for line in lines if line.startswith("resnet50.clove_in1k_200ep ") and "acme/" in line]) == 2
    refused = [line for line in lines if line.startswith("refused")]
    assert len(refused) == 4, lines
    assert all("it does not exist on the Hub, or the token has no access to it" in line for line in refused[:2])
    assert "`clove-hub models --check` shows which models are there" in refused[0]
    assert all("it has no tag, branch or commit v9: leave out @v9 for the newest" in line for line in refused[2:])


def test_a_wrong_namespace_is_a_warning_and_no_more(monkeypatch, caplog):
    monkeypatch.setenv("CLOVE_HUB_NAMESPACE", "a/b")
    registry.register()
    assert "CLOVE_HUB_NAMESPACE is 'a/b', which cannot be a user" in caplog.text


def test_a_timm_with_another_registry_is_left_alone_with_a_warning_and_a_way_round_it(monkeypatch, caplog, homes):
    monkeypatch.setenv("XDG_CACHE_HOME", homes["XDG_CACHE_HOME"])
    monkeypatch.delattr(timm.models._registry, "_model_default_cfgs")
    registry.register()
    assert "clove_hub.zoo.registry.create_model(name) loads them instead" in caplog.text
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", homes["XDG_CACHE_HOME"])
    assert registry.create_model(NAME).num_features == 2048
