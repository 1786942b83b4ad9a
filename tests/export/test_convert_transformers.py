"""A backbone inside five models of transformers: each tensor in its place, after building, saving and opening again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from synthetic import trained
from torch import Tensor, nn

from clove_hub.cli import main
from clove_hub.export import Converted, convert
from clove_hub.weights.transformers import MODELS

transformers = pytest.importorskip("transformers", minversion="5", reason="transformers 5 is not installed")

MEAN, STD = [0.3, 0.5, 0.6], [0.2, 0.3, 0.1]
NETWORKS = {"resnet18": (1, 2, 3, 4), "convnext_atto": (0, 1, 2, 3), "hrnet_w18_small": (1, 2, 3, 4)}
"""And which of timm's feature maps have strides of 4, 8, 16 and 32."""
PLACES = {
    "detr": ("model.backbone.model.", 1),
    "rt_detr_v2": ("model.backbone.model._backbone.", 3),
    "d_fine": ("model.backbone.model._backbone.", 3),
    "mask2former": ("model.pixel_level_module.encoder._backbone.", 4),
    "upernet": ("backbone._backbone.", 4),
}
"""Where transformers 5.23 has timm's network, and how many of its last feature maps it uses."""
SMALL: dict[str, dict[str, Any]] = {
    "detr": {"encoder_layers": 1, "decoder_layers": 1},
    "rt_detr_v2": {"decoder_layers": 2, "num_queries": 20},
    "d_fine": {"decoder_layers": 2, "num_queries": 20},
    "mask2former": {"encoder_layers": 1, "decoder_layers": 1},
    "upernet": {"hidden_size": 32},
}
READER = """
import json, sys, torch, transformers
from safetensors.torch import load_file
found = []
for opened_by, folder, place, reference, small in json.load(sys.stdin):
    model = getattr(transformers, opened_by).from_pretrained(folder, **small).eval()
    inside, expected = model.get_submodule(place.rstrip(".")), load_file(reference)
    state, image = inside.state_dict(), expected.pop("image")
    maps = [expected.pop(name) for name in sorted(expected) if name.startswith("map ")]
    wrong = [n for n, t in expected.items() if n in state and not torch.equal(state[n], t)]
    lacks = [n for n in expected if n not in state and not n.endswith("num_batches_tracked")]
    with torch.no_grad():
        found_maps = inside(image)
    alike = len(found_maps) == len(maps) and all((a - b).abs().max() <= 1e-5 * b.abs().max() for a, b in zip(found_maps, maps))
    found.append([len(state), wrong, lacks, [n for n in state if n not in expected], alike])
print(json.dumps(found))
"""


def write_source(folder: Path, architecture: str) -> Path:
    folder.mkdir()
    save_file(trained(architecture).state_dict(), folder / "model.safetensors")
    cfg = {"input_size": [3, 64, 64], "mean": MEAN, "std": STD}
    (folder / "config.json").write_text(
        json.dumps({"architecture": architecture, "num_classes": 0, "pretrained_cfg": cfg})
    )
    return folder


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("transformers") / "resnet", "test_resnet")


def by_timm(source: Path, indices: tuple[int, ...]) -> nn.Module:
    """What timm itself loads from the source: shares no code with the conversion."""
    features: nn.Module = timm.create_model(
        f"local-dir:{source}", pretrained=True, features_only=True, out_indices=indices
    )
    return features.eval()


def opened(converted: Converted) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(converted.how_to_load, names)
    return names


def table(source: Path, indices: tuple[int, ...], folder: Path) -> tuple[list[list[Any]], dict[str, int]]:
    """What a fresh process finds, of each model as converted and as saved again; and how many tensors were to be placed."""
    orders, tensors = [], {}
    for model, (place, count) in PLACES.items():
        features = by_timm(source, indices[-count:])
        image = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            maps = {f"map {index}": one.contiguous() for index, one in enumerate(features(image))}
        reference = folder / f"{model}.safetensors"
        save_file({**features.state_dict(), **maps, "image": image}, reference)
        converted = convert(source, "transformers", folder / model, model=model)
        tensors[model] = converted.tensors
        auto = getattr(transformers, MODELS[model].opened_by)
        built = auto.from_pretrained(folder / model, num_labels=3, **SMALL[model]).eval()
        with torch.no_grad():
            assert built(image) is not None
        built.save_pretrained(folder / f"{model}_again")
        for name in (model, f"{model}_again"):
            orders.append([MODELS[model].opened_by, str(folder / name), place, str(reference), SMALL[model]])
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", READER],
        input=json.dumps(orders),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[list[Any]] = json.loads(done.stdout)
    return found, tensors


@pytest.mark.slow
@pytest.mark.parametrize("architecture", NETWORKS)
def test_every_tensor_is_in_its_place_in_a_fresh_process(architecture: str, tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", architecture)
    found, tensors = table(source, NETWORKS[architecture], tmp_path)
    expected = [[tensors[model], [], [], [], True] for model in PLACES for _ in range(2)]
    assert found == expected


@pytest.mark.slow
def test_the_smallest_network_is_in_its_place_too(resnet: Path, tmp_path: Path) -> None:
    """The same within seconds; `slow` has three whole networks."""
    found, tensors = table(resnet, (1, 2, 3, 4), tmp_path)
    assert tensors == {"detr": 75, "rt_detr_v2": 75, "d_fine": 75, "mask2former": 90, "upernet": 90}
    assert found == [[tensors[model], [], [], [], True] for model in PLACES for _ in range(2)]


@pytest.mark.parametrize("model", PLACES)
def test_the_documented_way_of_transformers_5_gives_random_weights(resnet: Path, model: str) -> None:
    """Why there is a conversion. If this fails, transformers has changed, and docs/loading.md should say so."""
    place, count = PLACES[model]
    backbone = transformers.TimmBackboneConfig(
        backbone=f"local-dir:{resnet}", use_pretrained_backbone=True, out_indices=[1, 2, 3, 4][-count:]
    )
    config = transformers.AutoConfig.for_model(model, backbone_config=backbone, **SMALL[model])
    auto = getattr(transformers, MODELS[model].opened_by)
    inside: dict[str, Tensor] = auto.from_config(config).get_submodule(place.rstrip(".")).state_dict()
    weights = {name: tensor for name, tensor in trained("test_resnet").state_dict().items() if tensor.ndim == 4}
    assert weights.keys() < inside.keys()
    assert not any(torch.equal(inside[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("model", PLACES)
def test_the_lines_that_it_prints_open_it_and_prepare_photos_as_the_backbone_saw_them(
    resnet: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model"
    assert main(["convert", str(resnet), "--to", "transformers", "--model", model, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"{out}: test_resnet for transformers, {75 if PLACES[model][1] < 4 else 90} tensors\n" in said
    names: dict[str, Any] = {}
    exec(said[said.index("from transformers") :], names)
    assert names["model"].config.num_labels == 10
    color = [51, 102, 204]
    pixels = names["processor"](Image.new("RGB", (96, 64), tuple(color)), return_tensors="pt")["pixel_values"]
    wanted = [(value / 255 - mean) / std for value, mean, std in zip(color, MEAN, STD, strict=True)]
    np.testing.assert_allclose(pixels[0, :, 20, 20], wanted, rtol=1e-4)
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in out.iterdir()} == dict.fromkeys(
        ["config.json", "model.safetensors", "preprocessor_config.json"], "0o644"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"], "nothing is left beside it"
    assert str(resnet) not in (out / "config.json").read_text(), "and no folder of this machine is in it"


def test_the_same_backbone_gives_the_same_bytes(resnet: Path, tmp_path: Path) -> None:
    one, other = (convert(resnet, "transformers", tmp_path / name, model="detr").path for name in ("one", "other"))
    for file in one.iterdir():
        assert file.read_bytes() == (other / file.name).read_bytes(), file.name


# ---- what does not fit is refused ----------------------------------------------------------------------------


def test_norms_with_an_activation_are_not_frozen_away(tmp_path: Path) -> None:
    """DETR makes of RegNet's BatchNormAct2d a frozen norm without the activation; RT-DETR has a setting against it."""
    source = write_source(tmp_path / "source", "regnety_002")
    with pytest.raises(ValueError, match=r"detr .* without the activation .* --model mask2former and --model upernet"):
        convert(source, "transformers", tmp_path / "detr", model="detr")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    for model in ("rt_detr_v2", "mask2former", "upernet"):
        converted = convert(source, "transformers", tmp_path / model, model=model)
    assert json.loads((tmp_path / "rt_detr_v2/config.json").read_text())["freeze_backbone_batch_norms"] is False
    assert converted.tensors == len(by_timm(source, (1, 2, 3, 4)).state_dict())


def test_a_tensor_that_transformers_resets_is_not_handed_out(
    resnet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `TimmBackbone.from_pretrained` of version 5 does with the statistics of batch norms."""
    own = transformers.TimmBackbone._init_weights

    def resets(self: Any, module: nn.Module) -> None:
        own(self, module)
        if isinstance(module, nn.BatchNorm2d):
            nn.Module.get_buffer(module, "running_mean").data.zero_()

    monkeypatch.setattr(transformers.TimmBackbone, "_init_weights", resets)
    with pytest.raises(
        ValueError, match=r"upernet of transformers .* has no place for 15 tensors of .*, such as bn1\.running_mean"
    ):
        convert(resnet, "transformers", tmp_path / "out", model="upernet")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("architecture", "model", "why"),
    [
        ("test_vit", "upernet", r"strides \[16\], but upernet needs \[4, 8, 16, 32\]: stride 4 is missing"),
        ("vit_tiny_patch16_224", "detr", r"cannot take images of any size \(Input height"),
    ],
)
def test_a_network_without_such_feature_maps_is_refused(
    architecture: str, model: str, why: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=why):
        convert(f"random:{architecture}", "transformers", tmp_path / "out", model=model)
    assert not list(tmp_path.iterdir())


def test_what_is_missing_or_not_wanted_is_said_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").touch()
    with pytest.raises(
        ValueError, match="--to transformers needs --model: choose one of detr, rt_detr_v2, d_fine, mask2former"
    ):
        convert("nothing", "transformers", tmp_path / "out")
    with pytest.raises(ValueError, match="--model yolo is unknown: choose one of detr"):
        convert("nothing", "transformers", tmp_path / "out", model="yolo")
    with pytest.raises(ValueError, match="--model detr needs --to transformers: leave it out for timm"):
        convert("nothing", "timm", tmp_path / "out.safetensors", model="detr")
    with pytest.raises(ValueError, match="full exists and is not an empty folder; give a new folder"):
        convert("nothing", "transformers", tmp_path / "full", model="detr")
    monkeypatch.setattr("transformers.__version__", "4.57.6")
    with pytest.raises(ValueError, match=r"needs transformers 5 or newer, and 4\.57\.6 is installed: pip install -U"):
        convert("nothing", "transformers", tmp_path / "out", model="detr")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install 'clove-hub\[transformers\]'"):
        convert("nothing", "transformers", tmp_path / "out", model="detr")
