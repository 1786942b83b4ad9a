"""The package as it is shipped: the wheel, the recipes, the command line, the rooms and who knows whom."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from clove_hub.training import recipe

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    source = tmp_path_factory.mktemp("source")
    for name in ("clove_hub", "training", "export", "model_cards"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(source / "dist"),
        str(source),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return next((source / "dist").glob("*.whl"))


def test_the_wheels_only_top_level_name_is_clove_hub(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"clove_hub"}


def test_the_wheel_holds_every_module_and_data_file(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    folders = {"clove_hub": "clove_hub", "training": "clove_hub/training", "export": "clove_hub/export"}
    folders["model_cards"] = "clove_hub/model_cards"
    missing = [
        path
        for folder, place in folders.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
        and path.suffix in (".py", ".yaml", ".md", ".json", ".typed")
        and f"{place}/{path.relative_to(ROOT / folder).as_posix()}" not in names
    ]
    assert missing == []


def test_an_installed_wheel_runs_without_the_checkout(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in type(f).__module__ + str(f)];"
        "import clove_hub.training.recipe as r; print(r.__file__); print(r.shipped_recipes())"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment, check=True
    )
    assert str(tmp_path) in result.stdout
    assert "clove_r50_in1k_400ep" in result.stdout


# ---- who knows whom ----------------------------------------------------------------------------------------------


def imports(path: Path) -> set[str]:
    """The absolute modules a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [
        ("clove_hub", ("clove_hub.training", "clove_hub.export")),
        ("training", ("clove_hub.training", "clove_hub.export")),
        ("export", ("clove_hub.export", "clove_hub.training")),
    ],
)
def test_rooms_keep_to_their_neighbors(room, forbidden):
    """Nothing imports training or export from outside; inside a room imports are relative."""
    found = {
        (path.name, name)
        for path in (ROOT / room).rglob("*.py")
        for name in imports(path)
        if name.startswith(forbidden)
    }
    assert found == set()


def test_no_module_is_imported_but_declared_nowhere():
    declared = {"torch", "timm", "accelerate", "datasets", "huggingface_hub", "safetensors", "numpy", "PIL", "yaml"}
    declared |= {
        "fsspec",
        "matplotlib",
        "simplejpeg",
        "tqdm",
        "skimage",
        "pycocotools",
        "sklearn",
        "torchvision",
        *("detectron2", "densepose", "mmengine"),  # on no registry: a user brings them
        "clove_hub",
        *sys.stdlib_module_names,
    }
    used = {
        name.split(".")[0]
        for room in ("clove_hub", "training", "export")
        for path in (ROOT / room).rglob("*.py")
        for name in imports(path)
    }
    assert used <= declared


# ---- recipes and the command line --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipe.shipped_recipes())
def test_every_shipped_recipe_loads_and_says_what_it_is(name):
    loaded = recipe.load(name, ["data.path=photos"])
    assert recipe.parse(recipe.as_sections(loaded)) == loaded
    head = (recipe.SHIPPED / f"{name}.yaml").read_text().split("method:")[0]
    for word in ("Command:", "Expected:"):
        assert word in head


def test_the_imagenet_recipes_hold_the_facts_of_the_released_runs():
    for epochs, scale, decay in ((50, 0.24, 1e-5), (200, 0.2, 2e-5), (400, 0.2, 2e-5)):
        r = recipe.load(f"clove_r50_in1k_{epochs}ep", ["data.path=imagenet"])
        assert r.backbone.model == "resnet50"
        assert r.schedule.epochs == epochs
        assert (r.schedule.warmup_epochs, r.schedule.teacher_momentum) == (5, 0.99)
        assert (r.schedule.start_factor, r.schedule.final_factor) == (0.01, 0.01)
        assert (r.optimizer.learning_rate, r.optimizer.weight_decay) == (1.0, decay)
        assert (r.optimizer.momentum, r.optimizer.trust) == (0.9, 0.001)
        assert (r.batch.total, r.batch.per_device) == (2048, 256)
        assert (r.method.global_views, r.method.global_size, r.method.global_scale) == (2, 224, (scale, 1.0))
        assert (r.method.local_views, r.method.local_size, r.method.local_scale) == (6, 96, (0.08, 0.3))
        assert (r.method.match_distance, r.method.hard_negatives, r.method.margin) == (0.7, 10, 100)
        assert (r.method.projector_hidden, r.method.feature_dim, r.method.attention_heads) == (4096, 256, 8)


def test_values_are_typed_on_load(tmp_path):
    r = recipe.load("demo", ["data.path=x", "optimizer.weight_decay=1e-5", "method.local_scale=[0.1,0.2]"])
    assert r.optimizer.weight_decay == 1e-5  # YAML reads 1e-5 as a string
    assert r.method.local_scale == (0.1, 0.2)
    for override, message in (
        ("run.compile=1", "run.compile=1 is a int, expected bool"),
        ("method.local_scale=0.1", "expected tuple"),
        ("nonsense", "does not read section.key=value"),
        ("batch.total=[", "not valid YAML"),
    ):
        with pytest.raises(ValueError, match=message.replace("[", r"\[")):
            recipe.load("demo", ["data.path=x", override])
    broken = tmp_path / "broken.yaml"
    broken.write_text("just words")
    with pytest.raises(ValueError, match="a recipe is a mapping of sections"):
        recipe.load(str(broken), [])
    with pytest.raises(ValueError, match="does not exist"):
        recipe.load(str(tmp_path / "none.yaml"), [])


def test_the_command_line_lists_its_commands_quickly():
    code = "import sys; from clove_hub.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in ("pretrain", "export", "convert", "demo"):
        assert command in result.stdout
    assert result.stdout.endswith("False\n")  # nothing heavy is imported to say so


def test_a_reader_who_has_seen_enough_gets_no_traceback():
    reading, writing = os.pipe()
    os.close(reading)  # as `| head` leaves it, but before the first line instead of at some moment after it
    command = [sys.executable, "-m", "clove_hub.cli", "models", "--json"]
    with os.fdopen(writing, "wb") as gone:
        done = subprocess.run(command, stdout=gone, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (141, "")


def test_launch_configs_are_what_accelerate_reads():
    from accelerate.commands.config.config_args import load_config_from_file

    files = sorted((ROOT / "training" / "accelerate").glob("*.yaml"))
    processes = {path.stem: load_config_from_file(str(path)).num_processes for path in files}
    assert processes == {"1gpu": 1, "4gpu": 4, "8gpu": 8, "2nodes_8gpu": 16}
