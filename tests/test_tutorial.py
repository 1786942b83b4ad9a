"""The tutorial's commands, one after the other as they stand there, on small photos and with a small network."""

import itertools
import re
import shlex
import shutil
from pathlib import Path

import pytest
import scenes
import timm
from PIL import Image
from training_runs import TINY

from clove_hub.cli import main

ROOT = Path(__file__).parents[1]
TUTORIAL = (ROOT / "docs/tutorial.md").read_text()
SMALL = [f"{key}={value}" for key, value in TINY.items() if not key.startswith(("data.", "backbone."))]


def commands() -> list[list[str]]:
    blocks = re.findall(r"^```bash\n(.*?)^```", TUTORIAL, re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if not line.startswith("pip ")]


@pytest.fixture
def home(tmp_path, made_photos, monkeypatch) -> Path:
    """A folder with photos and with images that have masks, in which the commands are typed."""
    shutil.copytree(made_photos, tmp_path / "photos")
    scenes.segmented_images(tmp_path / "labeled")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_all_of_it_in_its_order(home, capsys):
    assert len(commands()) == 11
    for program, *words in commands():
        assert program == "clove-hub"
        small = SMALL if words[0] == "pretrain" else []
        assert main([*words, *small]) == 0, f"{shlex.join(words)}\n{capsys.readouterr().err}"
        for word, following in itertools.pairwise(words):
            if word == "--out" and following.endswith(".png"):
                assert min(Image.open(home / following).size) > 100
    assert timm.create_model("local-dir:bundles/mine", pretrained=True, features_only=True).feature_info.channels()
    assert (home / "bundles/mine/curves.png").is_file()
    said = capsys.readouterr().out
    assert "| runs/mine" in said
    assert "| random:resnet18 |" in said


def test_what_it_links_to_is_there():
    for link in re.findall(r"\]\(([^)h][^)]*)\)", TUTORIAL):
        assert (ROOT / "docs" / link).exists(), link
