"""docs/loading.md: what it says of timm, transformers and ONNX, on a Hub on loopback and from a folder."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from loopback_hub import LoopbackHub, Repository, regular
from PIL import Image
from synthetic import write_run

from clove_hub.cli import main
from clove_hub.export import export_run

PAGE = (Path(__file__).parents[1] / "docs/loading.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
CHECKED = """
import timm as _timm, torch as _torch

def _alike(found, expected):
    assert len(found) == len(expected) > 0
    assert all(map(_torch.equal, found, expected))

_whole = _timm.create_model("local-dir:bundle", pretrained=True)
_features = _timm.create_model("local-dir:bundle", pretrained=True, features_only=True).eval()
_prepare = _timm.data.create_transform(**_timm.data.resolve_model_data_config(_whole), is_training=False)
_pixels = _prepare(Image.open("photo.jpg").convert("RGB"))[None]
assert _torch.equal(pixels, _pixels)
with _torch.no_grad():
    _alike(list(output.hidden_states), _features(pixels))
    _alike([output.pooler_output], [_whole.eval()(pixels)])
    _torch.testing.assert_close(_torch.tensor(embedding), _whole(pixels))
    _alike(list(maps), _features(pixels)[1:])
    assert classifier(pixels).logits.shape == (1, 10)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle and a photo in an otherwise empty folder."""
    home = tmp_path_factory.mktemp("loading")
    write_run(home / "run", "test_resnet", finished=True)
    export_run(home / "run", home / "bundle", license="mit")
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(home / "photo.jpg")
    return home


def carried_out(code: str, home: Path, hub: LoopbackHub) -> str:
    environment = os.environ | hub.environment(home / "hf") | {"OMP_NUM_THREADS": "1"}
    environment |= {"TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=home, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def served(home: Path):
    with LoopbackHub() as hub:
        repository = hub.repositories["acme/resnet50.my_photos"] = Repository(private=False)
        files = {path.name: regular(path.read_bytes()) for path in (home / "bundle").iterdir()}
        repository.tags["v1.0.0"] = repository.commit("weights", files)
        yield hub


LINES = "".join(block for kind, block in BLOCKS if kind == "python") + CHECKED


@pytest.mark.network
def test_its_lines_load_what_timm_loads_from_the_bundle(home: Path, served: LoopbackHub) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    carried_out(LINES, home, served)
    assert list((home / "weights").rglob("model.safetensors")), "cache_dir"


def test_they_load_the_same_from_a_folder_without_the_hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    monkeypatch.chdir(home)
    here = LINES.replace("hf-hub:acme/resnet50.my_photos@v1.0.0", "local-dir:bundle")
    exec(here.replace("acme/resnet50.my_photos", "bundle"), {})


@pytest.mark.network
def test_what_it_says_does_not_load_does_not(home: Path, served: LoopbackHub) -> None:
    """If this fails, transformers has changed and the page should say so."""
    pytest.importorskip("transformers", minversion="5.23", reason="transformers 5.23 is not installed")
    code = """
import timm, torch
from transformers import AutoBackbone, TimmBackbone, TimmBackboneConfig
for source in ("acme/resnet50.my_photos", "hf-hub:acme/resnet50.my_photos", "./bundle"):
    try:
        AutoBackbone.from_pretrained(source)
    except ValueError as error:
        print(str(error).split("\\n")[0])
expected = timm.create_model("local-dir:bundle", pretrained=True, features_only=True).state_dict()
plain = TimmBackbone.from_pretrained("local-dir:bundle")
configured = TimmBackbone(TimmBackboneConfig(backbone="local-dir:bundle", use_pretrained_backbone=True))
for backbone in (plain, configured):
    state = backbone._backbone.state_dict()
    print(*sorted({key.rpartition(".")[2] for key in expected if not torch.equal(state[key], expected[key])}))
"""
    said = carried_out(code, home, served).splitlines()
    assert [line.split(" ")[0] for line in said[:3]] == ["Unrecognized", "Repo", "Repo"]
    assert said[3] == "num_batches_tracked running_mean running_var"
    assert {"weight", "bias"} <= set(said[4].split())


def test_its_command_puts_it_into_a_detector(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers", minversion="5", reason="transformers 5 is not installed")
    monkeypatch.chdir(home)
    command = next(block for kind, block in BLOCKS if kind == "bash")
    assert main(shlex.split(command.replace("bundles/my_photos", "bundle"))[1:]) == 0
    said = capsys.readouterr().out
    lines = said[said.index("from transformers") :]
    assert 'AutoModelForObjectDetection.from_pretrained("detector", num_labels=10)' in lines
    exec(lines, {})


def test_its_command_writes_an_onnx_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("onnx", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'clove-hub[onnx]'")
    monkeypatch.chdir(home)
    *_, commands = (block.splitlines() for kind, block in BLOCKS if kind == "bash")
    program, *words = shlex.split(commands[-1].replace("bundles/my_photos", "bundle"))
    assert program == "clove-hub"
    assert main(words) == 0
    assert (home / "backbone.onnx").is_file()
