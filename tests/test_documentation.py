"""Commands and Python of the README and the documentation, as a newcomer would type them, on small photos."""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from pages import BLOCK, PAGES, ROOT, blocks, commands, links, own_commands
from patience import PATIENCE
from synthetic import released_tensors, save_released
from training_runs import TINY

import clove_hub
from clove_hub.cli import COMMANDS
from clove_hub.command import Command
from clove_hub.training import recipe
from clove_hub.training.finetune.settings import as_sections, read_settings

SMALL = [f"{key}={value}" for key, value in TINY.items() if not key.startswith("data.")]
README = PAGES["README.md"]
GENERATED = [ROOT / "docs/reference" / f"{name}.md" for name in ("commands", "recipes", "settings")]
"""When the site is built."""


def typed(page: str) -> list[str]:
    return commands(PAGES[f"docs/{page}.md"])


def python(page: str, containing: str) -> str:
    return next(block for block in blocks(PAGES[f"docs/{page}.md"], "python") if containing in block)


@pytest.fixture(scope="module")
def home(tmp_path_factory, made_photos) -> Path:
    """A folder in which the README's paths exist."""
    home = tmp_path_factory.mktemp("home")
    (home / "training").symlink_to(ROOT / "training")
    shutil.copytree(made_photos, home / "photos")
    return home


def run(command: list[str], home: Path) -> str:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=home, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert result.returncode == 0, f"{shlex.join(command)}\n{result.stdout}{result.stderr}"
    return result.stdout + result.stderr


def shrunk(command: str) -> list[str]:
    """The command on small photos with a small network; all else as it is written."""
    words = re.sub(r"/path/to/[\w/]+", "photos", command)
    return [
        word for word in shlex.split(words) if not re.match(r"(batch|backbone|schedule|run.trackers)", word)
    ] + SMALL


@pytest.mark.slow
def test_one_device(home):
    command = next(
        c
        for c in typed("pre-training")
        if c.startswith("clove-hub pretrain clove_r50_in1k_200ep data.path=/path/to/imagenet")
    )
    run(shrunk(command), home)
    assert yaml.safe_load((home / "runs/clove_r50_in1k_200ep/recipe.yaml").read_text())["method"]["global_size"] == 64


@pytest.mark.slow
def test_accelerate_launch(home):
    launches = [c for c in typed("several-gpus") if c.startswith("accelerate launch")]
    assert len(launches) == 2
    for command in launches:
        words = shlex.split(command)
        config = home / words[words.index("--config_file") + 1]
        assert config.is_file()
        # The same module, recipe and overrides, on the one device that is here.
        module = words[words.index("-m") :]
        single = ["accelerate", "launch", "--config_file", str(ROOT / "training/accelerate/1gpu.yaml"), *module]
        run([*shrunk(shlex.join(single)), f"run.output=runs/{config.stem}"], home)


@pytest.mark.slow
def test_own_photos_then_load_and_convert(home):
    """The road: pre-train, export, load as the README does, convert."""
    command = next(c for c in typed("pre-training") if "run.output=runs/my_photos" in c)
    recipe.load("clove_r50_in1k_200ep", shlex.split(command)[3:])  # what it overrides is all known
    run([*shrunk(command), "run.trackers=[tensorboard]"], home)
    assert list((home / "runs/my_photos").rglob("events.out.tfevents.*"))
    export = next(c for c in typed("publishing") if c.startswith("clove-hub export"))
    assert "local-dir:bundles/my_photos" in run(shlex.split(export), home)

    check = (
        "import torch\nx = torch.randn(2, 3, 64, 64)\n"
        "assert model(x).shape == (2, model.num_features)\n"
        "assert len(maps(x)) == 5\nassert classifier(x).shape == (2, 10)\n"
    )
    run([sys.executable, "-c", python("publishing", "local-dir:") + check], home)
    one_line = next(block for block in blocks(README, "python") if "local-dir:" in block)
    run([sys.executable, "-c", one_line + "assert len(model.feature_info) == 5\n"], home)
    state = json.loads((home / "bundles/my_photos/clove_hub.json").read_text())
    assert state["method"] == "clove"


@pytest.mark.slow
def test_a_run_that_is_watched(home):
    run(shrunk(next(c for c in typed("pre-training") if "evaluate=[" in c)), home)
    found = [json.loads(line) for line in (home / "runs/watched/evaluations.jsonl").read_text().splitlines()]
    assert [row["step"] for row in found] == [0, TINY["schedule.steps"]]


@pytest.mark.slow
def test_what_the_authors_released_becomes_a_name_that_timm_knows(home, monkeypatch):
    for name in ("CACHE", "CONFIG"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(home / name.lower()))
    command = next(c for c in typed("zoo") if c.startswith("clove-hub adopt"))
    file = shlex.split(command)[2]
    save_released(home / file, "clove", released_tensors("clove", "resnet50"))
    with torch.serialization.safe_globals([argparse.Namespace]):  # it says 400 epochs, and the page's is of 200
        torch.save(torch.load(home / file, weights_only=True) | {"epoch": 200}, home / file)
    assert "clove_hub, timm" in run(shlex.split(command), home)
    program = python("zoo", "import clove_hub") + "assert model.num_features == 2048\n"
    run([sys.executable, "-c", program], home)
    assert "/cache/clove-hub/models/" in run(["clove-hub", "models"], home)


@pytest.mark.slow
def test_publishing_looks_at_the_hub_first(home):
    """The commands are understood and go as far as they get without a network; test_publish.py has them meet a Hub."""
    command = next(c for c in typed("pre-training") if "run.output=runs/my_photos" in c)
    run([*(w for w in shrunk(command) if "tracker" not in w)], home)
    run(
        shlex.split(next(c for c in typed("publishing") if c.startswith("clove-hub export") and "--license" in c)), home
    )
    publish = [c for c in typed("publishing") if c.startswith("clove-hub publish")]
    assert len(publish) == 2
    for words in map(shlex.split, publish):
        done = subprocess.run(
            [sys.executable, "-m", "clove_hub.cli", *words[1:]], cwd=home, capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set" in done.stderr


@pytest.mark.slow
def test_a_resnet_goes_to_every_framework(home):
    resnet = [
        word for word in shrunk("clove-hub pretrain demo data.path=/path/to/photos") if "backbone.model" not in word
    ]
    run(
        [*resnet, "backbone.model=resnet18", "schedule.steps=2", "schedule.warmup_epochs=0", "run.output=runs/r18"],
        home,
    )
    run(["clove-hub", "export", "runs/r18", "--out", "bundles/my_photos_r18"], home)
    command = next(c for c in typed("fine-tuning") if c.startswith("clove-hub convert"))
    said = run(shlex.split(command.replace("bundles/my_photos", "bundles/my_photos_r18")), home)
    assert "STRIDE_IN_1X1: false" in said.replace("False", "false")
    assert (home / "backbone.pth").is_file()
    assert yaml.safe_load((home / "backbone.yaml").read_text())["INPUT"]["FORMAT"] == "RGB"
    for to, out in (("torchvision", "tv.pth"), ("mmseg", "mmseg.pth"), ("timm", "timm.safetensors")):
        run(["clove-hub", "convert", "runs/r18", "--to", to, "--out", out], home)
        assert (home / out).is_file()


@pytest.mark.slow
def test_from_python(home):
    road, views = (python("getting-started", name) for name in ("clove_hub.pretrain", "clove_hub.Transform"))
    road = road.replace("data={", f"**{TINY}, data={{")
    check = (
        "import pathlib, timm, torch\n"
        "assert run.finished and record.protocol == 'correspond'\n"
        "transform = None\n"
        "class Photos(torch.utils.data.Dataset):\n"
        "    paths = sorted(pathlib.Path('photos').iterdir())\n"
        "    __len__ = lambda self: 8\n"
        "    __getitem__ = lambda self, index: (transform(self.paths[index]), index)\n"
        "dataset = Photos()\n"
    )
    end = (
        "crops, labels = next(iter(loader))\n"
        "method = clove_hub.create_method('clove', 'test_resnet')\n"
        "assert method(make_views(crops))[0].isfinite() and labels.tolist() == list(range(8))\n"
    )
    run([sys.executable, "-c", road + check + views + end], home)


@pytest.mark.parametrize("page", PAGES)
def test_every_row_of_a_table_has_as_many_cells_as_its_head(page):
    """Two rows that a line break has joined are one with too many."""
    text = BLOCK.sub("", PAGES[page])
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = [re.sub(r"`[^`]*`|\\\|", "", row).count("|") for row in table.splitlines()]
        assert set(rows) == {rows[0]}, table.splitlines()[next(n for n, count in enumerate(rows) if count != rows[0])]


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_is_there(page):
    for link in links(PAGES[page]):
        generated = (ROOT / page).parent / link in GENERATED
        assert generated or ((ROOT / page).parent / link).exists(), link
    known = [recipe.as_sections(recipe.load("demo", ["data.path=x"])), as_sections(read_settings("detection", []))]
    for name in re.findall(r"`((?:clove|slotcon|moco|pixpro|densecl|byol)\w*_(?:r50|convnext|vit)\w+)`", PAGES[page]):
        assert name in recipe.shipped_recipes()
    for key in re.findall(
        r"`((?:data|batch|run|schedule|backbone|optimizer)\.(?!yaml|py\b|conv_encoder)\w+)", PAGES[page]
    ):
        section, name = key.split(".")
        assert any(name in sections.get(section, {}) for sections in known), key


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_has_one_type_is_understood(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for program, *words in own_commands(PAGES[page]):
        target = COMMANDS
        while not isinstance(target, Command):
            if isinstance(target, str):
                module, _, name = target.partition(":")
                target = getattr(import_module(module), name)
            else:
                program, target, words = f"{program} {words[0]}", target.members[words[0]][1], words[1:]
        parser = argparse.ArgumentParser(program)
        target.add_arguments(parser)
        if "--help" in words:
            continue
        options = parser.parse_intermixed_args(words)
        if program.endswith("pretrain") and options.recipe in recipe.shipped_recipes():
            recipe.load(options.recipe, options.overrides)


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    """No broken link, no page outside of the menu, no name in the reference that is not there."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    pages = {path.parent.relative_to(tmp_path / "site").as_posix() for path in (tmp_path / "site").rglob("index.html")}
    for page in PAGES:
        if page.startswith("docs/"):
            name = page.removeprefix("docs/").removesuffix(".md")
            assert re.sub(r"(^|/)(README|index)$", "", name) or "." in pages, page
    api = (tmp_path / "site/reference/api/index.html").read_text()
    for name in set(clove_hub.__all__) - {"__version__"}:
        assert f'id="clove_hub.{name}"' in api, name


@pytest.mark.slow
def test_the_demo_makes_what_its_page_shows(home):
    small = [word for word in SMALL if not word.startswith(("run.output", "backbone.model"))]
    said = run(["clove-hub", "demo", "--out", "demo", "--data", "photos", *small], home)
    page = (home / "demo/index.html").read_text()
    assert "Open demo/index.html in a browser" in said
    pictures = re.findall(r'src="([^"]+)"', page)
    assert len(pictures) == 5
    for picture in pictures:
        assert (home / "demo" / picture).stat().st_size > 5000
    for link in re.findall(r"href='([^']+)'", page):
        assert (home / "demo" / link).is_dir()
    assert (home / "demo/detectron2/backbone.pth").is_file()
    scored = json.loads((home / "demo/detector/results.json").read_text())["metrics"]
    assert scored["AP50bb"] > 30  # of six coins in a row that it was not trained on
