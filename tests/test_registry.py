"""The zoo's models as tags of timm."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from clove_hub.export import write_bundle
from clove_hub.export.bundle import Weights
from clove_hub.export.runs import Preprocessing

from clove_hub.zoo import registry
from clove_hub.zoo.models import find_model

NAME = "resnet50.clove_in1k_400ep"


@pytest.fixture(scope="module")
def homes(tmp_path_factory) -> dict[str, str]:
    """Folders of a user who has adopted a model: its weights are random ones here."""
    home = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    model = find_model(NAME)
    weights = Weights(
        what="random weights",
        architecture="resnet50",
        tensors=timm.create_model("resnet50", num_classes=0).state_dict(),
        method=model.method,
        exported=model.exported,
        preprocessing=Preprocessing(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        origin={"kind": "adopted", "file": "random.pth", "sha256": "0" * 64, "format": "none"},
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
assert timm.list_models("resnet50.*", pretrained=True)[0] == "resnet50.a1_in1k", "the default tag"
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


def test_weights_that_nobody_has_are_no_tag_and_the_error_says_how_to_get_them(homes, tmp_path):
    code = """
import clove_hub, timm
assert not [name for name in timm.list_pretrained("resnet50") if "slotcon" in name]
from clove_hub.zoo.registry import create_model
create_model("resnet50.slotcon_coco_800ep")
"""
    done = python(code, homes)
    assert "no weights of resnet50.slotcon_coco_800ep are known here" in done.stderr
    assert "clove-hub adopt FILE --as resnet50.slotcon_coco_800ep" in done.stderr
    assert "CLOVE_HUB_NAMESPACE" in done.stderr


def test_a_namespace_makes_them_tags_that_load_from_the_hub(homes):
    code = """
import clove_hub, timm
names = [name for name in timm.list_pretrained("resnet50") if "slotcon" in name]
cfg = timm.get_pretrained_cfg("resnet50.slotcon_coco_800ep")
print(len(names), cfg.hf_hub_id, cfg.num_classes, cfg.classifier)
"""
    done = python(code, homes, CLOVE_HUB_NAMESPACE="somebody")
    assert done.stdout == "4 somebody/resnet50.slotcon_coco_800ep 0 fc\n", done.stderr
    wrong = python("import clove_hub, timm; print(len(timm.list_models()) > 100)", homes, CLOVE_HUB_NAMESPACE="a/b")
    assert wrong.stdout == "True\n"
    assert "CLOVE_HUB_NAMESPACE is 'a/b', which is no name" in wrong.stderr


def test_a_timm_with_another_registry_is_left_alone_with_a_warning(monkeypatch, caplog, homes):
    monkeypatch.setenv("CLOVE_HUB_NAMESPACE", "somebody")
    monkeypatch.delattr(timm.models._registry, "_model_default_cfgs")
    registry.register()
    assert "clove_hub.zoo.registry.create_model(name) loads the zoo's models instead" in caplog.text
