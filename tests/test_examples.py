"""examples/: each script and the notebook, as they stand, on small photos; and a user's program before type checkers."""

import json
import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import SHARED
from pages import ROOT
from PIL import Image
from training_runs import TINY

EXAMPLES = ROOT / "examples"
SMALL = {key: value for key, value in TINY.items() if not key.startswith("data.")} | {"data.workers": 0}


def example(name: str) -> dict:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, made_photos) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    small = SMALL | {"backbone.model": "resnet18", "method.global_size": 128, "schedule.steps": 2}
    return example("pretrain")["pretrain"](made_photos, folder / "run", folder / "bundle", **small)


@pytest.mark.slow
def test_pretrain_writes_a_bundle(bundle):
    assert (bundle / "model.safetensors").is_file()


@pytest.mark.slow
def test_use_backbone_draws_what_resembles_a_point(bundle, made_photos, tmp_path, monkeypatch):
    photo = next(path for path in sorted(made_photos.rglob("*")) if path.is_file())
    found = example("use_backbone")["similar"](str(bundle), Image.open(photo), 0.4, 0.5)
    assert float(found.max()) == pytest.approx(1.0)
    words = ["use_backbone.py", str(bundle), str(photo), "0.4", "0.5", str(tmp_path / "similar.png")]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(EXAMPLES / "use_backbone.py"), run_name="__main__")
    assert Image.open(tmp_path / "similar.png").size == Image.open(photo).size


@pytest.mark.slow
def test_fine_tune_trains_the_backbone_in_torchvisions_detector(bundle, tmp_path, monkeypatch):
    data = SHARED / "data/detection"
    if not data.is_dir():
        pytest.skip("photos of COCO with annotations are not here")
    words = [str(bundle), str(data / "train"), str(data / "annotations/instances_train.json")]
    words += ["--steps", "2", "--out", str(tmp_path / "detector.pth")]
    monkeypatch.setattr(sys, "argv", ["fine_tune.py", *words])
    runpy.run_path(str(EXAMPLES / "fine_tune.py"), run_name="__main__")
    ended = torch.load(tmp_path / "detector.pth", weights_only=True)
    classes = len(ended["roi_heads.box_predictor.cls_score.bias"])
    begun = example("fine_tune")["detector"](str(bundle), classes)
    weight = "backbone.body.layer4.1.conv2.weight"
    assert ended.keys() == begun.state_dict().keys()
    assert not torch.equal(ended[weight], begun.state_dict()[weight])


@pytest.mark.slow
def test_the_notebook_runs(made_photos, monkeypatch, tmp_path):
    nbformat, nbclient = (
        pytest.importorskip(name, reason=f"{name} is in the extra `test`") for name in ("nbformat", "nbclient")
    )
    notebook = nbformat.read(EXAMPLES / "features.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "outputs are not committed"
    monkeypatch.setenv("PHOTOS", str(made_photos))
    monkeypatch.setenv("SOURCE", "random:test_resnet2")  # no trained weights are downloaded here
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": tmp_path}}, kernel_name="python3").execute()
    pictures = [out for cell in notebook.cells for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]
    assert len(pictures) == 2
    assert json.dumps(notebook)


PROGRAM = """from pathlib import Path

import clove_hub

run = clove_hub.pretrain("demo", data={"path": "photos"})
folder: Path = clove_hub.export_run(run.folder, license="mit")
record = clove_hub.evaluate("knn", folder, "photos", k=[5, 20])
score: float = record.metrics["top1"]
backbone = clove_hub.load_backbone(folder, seed=0)
channels: int = backbone.maps(clove_hub.load_backbone)[0].shape[1]  # the one error
"""


@pytest.mark.slow
@pytest.mark.parametrize("checker", ["mypy", "basedpyright"])
def test_a_users_program_is_checked_against_the_installed_wheel(checker, wheel, tmp_path):
    """As it is from outside: the wheel alone, without the checkout, strictly, with the one error found."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = os.environ | {"MYPYPATH": str(tmp_path / "installed")}
    settings = {"include": ["program.py"], "extraPaths": ["installed"], "typeCheckingMode": "standard"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = {
        "mypy": ["mypy", "--strict", "--python-executable", sys.executable, "--follow-imports=silent", "program.py"],
        "basedpyright": ["basedpyright", "--pythonpath", sys.executable],
    }[checker]
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    errors = [line for line in done.stdout.splitlines() if "error" in line and "program.py:" in line]
    assert len(errors) == 1, done.stdout
    assert "program.py:10" in errors[0]


@pytest.mark.slow
def test_the_wheel_and_the_source_archive_are_as_the_registry_wants_them(wheel, tmp_path):
    for name in ("clove_hub", "training", "export", "model_cards"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    build = ["build", "--sdist", "--no-isolation", "--outdir", "dist", "."]
    for words in (
        build,
        ["twine", "check", "--strict", str(wheel), "dist/*.tar.gz"],
        ["check_wheel_contents", str(wheel)],
    ):
        words = [str(found) for word in words for found in (sorted(tmp_path.glob(word)) if "*" in word else [word])]
        done = subprocess.run([sys.executable, "-m", *words], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
