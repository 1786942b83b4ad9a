"""The package as it is shipped: the wheel, the recipes, the command line, the rooms and who knows whom."""

import ast
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from patience import PATIENCE

from clove_hub.training import recipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]


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

ROOMS = ("clove_hub", "training", "export")
ABOVE = {"clove_hub": ("training", "export"), "training": ("export",), "export": ("training",)}
"""The rooms that a room must not know."""
DOORS = {"clove_hub/cli.py", "clove_hub/__init__.py"}
"""The files that name modules of rooms above, each to be imported when it is asked for."""


def modules(room: str) -> list[Path]:
    """The files of a room, without those of the rooms that are linked into it."""
    found = [path for path in (ROOT / room).rglob("*.py") if not path.parent.is_symlink()]
    links = [path for path in (ROOT / room).iterdir() if path.is_symlink()]
    return [path for path in found if not any(link in path.parents for link in links)]


def module_name(path: Path) -> str:
    """`training/run/stopping.py` -> `clove_hub.training.run.stopping`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "clove_hub" else ("clove_hub", *parts)).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """The absolute names of what a file imports, wherever in it; relative ones are made absolute."""
    here = module_name(path).split(".")
    package = here if path.name == "__init__.py" else here[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            names |= {start} | {f"{start}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names |= {node.args[0].value} if isinstance(node.args[0], ast.Constant) else set()
    return names


def strings(path: Path) -> set[str]:
    """The modules of the package that a file names in strings, docstrings aside: `clove_hub.export.publish`."""
    tree = ast.parse(path.read_text())
    notes = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in notes
    ]
    pattern = r"(?:^|(?<=\W))(?:clove_hub\.|^\.+)((?:training|export)\b(?:\.\w+)*)"
    return {f"clove_hub.{piece}" for text in texts for piece in re.findall(pattern, text)}


def reaching_up(room: str) -> set[tuple[str, str]]:
    """File and name, for each import of a room above and each string that names a module of one."""
    above = tuple(f"clove_hub.{name}" for name in ABOVE[room])
    found = set()
    for path in modules(room):
        file = path.relative_to(ROOT).as_posix()
        named = set() if file in DOORS else imports(path) | strings(path)
        found |= {(file, name) for name in named if name.startswith(above)}
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_knows_one_above(room):
    assert reaching_up(room) == set()


def test_benchmarks_import_the_package_under_its_one_name():
    names = {name.split(".")[0] for path in (ROOT / "benchmarks").glob("*.py") for name in absolute(path)}
    assert not names & {"training", "export", "model_cards"}


def absolute(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    plain = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return plain | {
        node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module and not node.level
    }


def test_the_doors_name_what_there_is():
    for file in DOORS:
        for name in strings(ROOT / file) | {name for name in imports(ROOT / file) if name.startswith("clove_hub.")}:
            parts = name.removeprefix("clove_hub.").split(".")
            place = ROOT.joinpath(*(parts if parts[0] in ("training", "export") else ("clove_hub", *parts)))
            assert any(p.with_suffix(".py").is_file() or p.is_dir() for p in (place, place.parent)), f"{file}: {name}"


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("clove_hub", "import clove_hub.training.loop"),
        ("clove_hub", "from clove_hub.export import convert"),
        ("clove_hub", "from clove_hub import training"),
        ("clove_hub", "from ..export.bundle import WEIGHTS"),
        ("clove_hub", "def f():\n    from ..training import recipe"),
        ("clove_hub", "RECIPES = 'clove_hub.training.recipes'"),
        ("clove_hub", "import_module(f'.export.{name}', 'clove_hub')"),
        ("training", "from ..export import bundle"),
        ("training", "importlib.import_module('clove_hub.export.bundle')"),
        ("export", "from clove_hub.training.recipe import load"),
    ],
)
def test_a_line_that_reaches_up_is_found(room, line, tmp_path, monkeypatch):
    folder = {"clove_hub": "clove_hub/zoo", "training": "training", "export": "export"}[room]
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "bad.py").write_text(line + "\n")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert reaching_up(room)


# ---- what must be installed --------------------------------------------------------------------------------------

BROUGHT = {"cityscapesscripts", "densepose", "detectron2", "lvis", "mmengine", "mmseg"}
"""What a user brings who trains in these frameworks; most are on no registry."""
OTHER_NAMES = {
    "pillow": "PIL",
    "pillow-jxl-plugin": "pillow_jxl",
    "pyyaml": "yaml",
    "scikit-image": "skimage",
    "scikit-learn": "sklearn",
}
"""Of packages whose modules are not called as they are."""


def declared(pyproject: dict) -> set[str]:
    """The modules that come with the dependencies and extras that users install."""
    project = pyproject["project"]
    extras = [
        one for name, extra in project["optional-dependencies"].items() if name not in ("test", "docs") for one in extra
    ]
    packages = {re.split(r"[\s<>=!~\[;]", one)[0] for one in [*project["dependencies"], *extras]}
    return {OTHER_NAMES.get(package, package.replace("-", "_")) for package in packages}


def imported() -> set[str]:
    """The packages that the product imports, not Python's own."""
    paths = [path for room in ROOMS for path in modules(room)]
    names = {name.split(".")[0] for path in paths for name in imports(path)}
    return names - {"clove_hub", *BROUGHT, *sys.stdlib_module_names}


PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_badges_of_the_front_page_are_true():
    front, project = (ROOT / "README.md").read_text(), PYPROJECT["project"]
    assert re.findall(r"\[license: (.+?)\]", front) == [project["license"]]
    assert [f">= {one}" for one in re.findall(r"\[Python: (\S+) or newer\]", front)] == [project["requires-python"]]


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    assert imported() == declared(PYPROJECT)


@pytest.mark.parametrize("package", PYPROJECT["project"]["dependencies"])
def test_a_dependency_that_is_taken_out_is_missed(package):
    kept = [one for one in PYPROJECT["project"]["dependencies"] if one != package]
    without = {"project": PYPROJECT["project"] | {"dependencies": kept}}
    assert not imported() <= declared(without)


# ---- what tools see ----------------------------------------------------------------------------------------------

SEEN = """import clove_hub
import clove_hub.export
import clove_hub.training.loop

reveal_type(clove_hub.training.loop.train)
reveal_type(clove_hub.export.Converted)
reveal_type(clove_hub.pretrain)
reveal_type(clove_hub.load_backbone("random:resnet18"))
reveal_type(clove_hub.__version__)
"""


def test_jedi_sees_every_room_and_the_front_door():
    jedi = pytest.importorskip("jedi", reason="jedi is in the extra `test`")
    project = jedi.Project(ROOT, sys_path=[str(ROOT)])

    def completed(line: str) -> set[str]:
        script = jedi.Script(f"import clove_hub, clove_hub.export, clove_hub.training.loop\n{line}", project=project)
        return {one.name for one in script.complete()}

    assert "train" in completed("clove_hub.training.loop.tr")
    assert {"export_run", "write_bundle"} <= completed("clove_hub.export.")
    assert {"pretrain", "load_backbone", "Transform"} <= completed("clove_hub.")
    script = jedi.Script("import clove_hub\nclove_hub.pretrain(", project=project)
    assert [signature.name for signature in script.get_signatures()] == ["pretrain"]
    assert [one.name for one in script.get_signatures()[0].params] == ["recipe", "overrides"]


def test_pyright_sees_every_room_and_the_front_door(tmp_path):
    pytest.importorskip("basedpyright", reason="basedpyright, a pyright that brings its Node, is in the extra `test`")
    (tmp_path / "seen.py").write_text(SEEN)
    settings = {"include": ["seen.py"], "extraPaths": [str(ROOT)], "typeCheckingMode": "basic"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "basedpyright", "--project", str(tmp_path), "--outputjson"]
    done = subprocess.run([*command, "--pythonpath", sys.executable], capture_output=True, text=True, timeout=PATIENCE)
    told = json.loads(done.stdout)["generalDiagnostics"]
    errors = [one["message"] for one in told if one["severity"] == "error"]
    assert errors == []
    types = [one["message"] for one in told if one["severity"] == "information"]
    assert len(types) == 5
    assert not [one for one in types if "Unknown" in one or '"Any"' in one]
    assert "RunResult" in types[2]
    assert "Backbone" in types[3]


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
        ("nonsense", "is not of the form section.key=value"),
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
