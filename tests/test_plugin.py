"""A method of another package: installed by pip, found by its entry point, used by every command like one of ours."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from training_runs import TINY

PYPROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "tiny-methods"
version = "1"
[project.entry-points."clove_hub.methods"]
tiny = "tiny_methods:ENTRY"
byol = "tiny_methods:ENTRY"
broken = "tiny_methods:MISSING"
[tool.setuptools]
packages = ["tiny_methods"]
[tool.setuptools.package-data]
tiny_methods = ["recipes/*.yaml"]
"""
METHOD = '''
"""Two crops agree after one linear layer."""
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from clove_hub.methods import Entry
from clove_hub.methods.base import embedding_spread, frozen_copy, move_toward, unit
from clove_hub.views import View, ViewSpec


@dataclass(frozen=True)
class Settings:
    size: int = 64
    """Side of a view in pixels."""


class Tiny(nn.Module):
    exported = "student"

    def __init__(self, backbone, settings):
        super().__init__()
        self.view_spec = ViewSpec(views=(View(size=settings.size, scale=(0.5, 1.0)),) * 2)
        self.student = nn.ModuleDict({"backbone": backbone, "head": nn.Linear(backbone.num_features, 8)})
        self.teacher = frozen_copy(self.student)

    def begin_step(self, momentum, epoch):
        move_toward(self.teacher, self.student, momentum)

    def forward(self, views):
        one, other = views[0].pixels
        embed = lambda net, x: unit(net["head"](net["backbone"].forward_features(x).mean((2, 3))))
        with torch.no_grad():
            target = embed(self.teacher, other)
        return 2 - 2 * (embed(self.student, one) * target).sum(1).mean(), {"embedding_spread": embedding_spread(target)}


ENTRY = Entry(Settings, Tiny, "two crops agree after one linear layer", Path(__file__).parent / "recipes")
'''
RECIPE = {key: value for key, value in TINY.items() if not key.startswith("method.")} | {"schedule.steps": 2}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of processes that have the package."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "source" / "tiny_methods" / "recipes").mkdir(parents=True)
    (folder / "source" / "pyproject.toml").write_text(PYPROJECT)
    (folder / "source" / "tiny_methods" / "__init__.py").write_text(METHOD)
    recipe = "method:\n  name: tiny\ndata:\n  path: ''\nrun:\n  output: runs/tiny\n"
    (folder / "source" / "tiny_methods" / "recipes" / "tiny_demo.yaml").write_text(recipe)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(folder / "site"), str(folder / "source")], check=True)
    return os.environ | {"PYTHONPATH": f"{folder / 'site'}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}


def command(environment: dict[str, str], *words: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "clove_hub.cli", *map(str, words)],
        env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_method_of_another_package_trains_exports_and_is_drawn(installed, made_photos, tmp_path):
    run = tmp_path / "run"
    settings = [f"{key}={value}" for key, value in RECIPE.items()]
    said = command(
        installed, "pretrain", "tiny_demo", *settings, "data.workers=1", f"data.path={made_photos}", f"run.output={run}"
    )
    assert "tiny on test_resnet" in said
    # Of its other entry points each is named, and keeps nobody from the rest.
    assert "the method 'byol' of tiny-methods cannot be used (ValueError: a method is called 'byol' already" in said
    assert "the method 'broken' of tiny-methods cannot be used (AttributeError" in said

    command(installed, "export", run, "--license", "mit")
    assert timm.create_model(f"local-dir:{run / 'bundle'}", pretrained=True).num_features
    assert "trained with tiny" in (run / "bundle" / "README.md").read_text()
    command(installed, "figures", "curves", run, "--out", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 0


def test_it_is_listed_with_its_recipes_and_settings(installed):
    listed = command(installed, "methods")
    assert "tiny      two crops agree after one linear layer" in listed
    assert "recipes: tiny_demo" in listed
    assert "method.size=64" in command(installed, "pretrain", "tiny_demo", "--help")
