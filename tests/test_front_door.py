"""`import clove_hub`: light, complete, its examples work, and nothing that it offers leaves a trace in the process."""

import dataclasses
import doctest
import inspect
import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from loopback_hub import LoopbackHub
from patience import PATIENCE

import clove_hub
from clove_hub.cli import main
from clove_hub.methods import METHODS

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def traces() -> dict[str, object]:
    """The global state that a library must leave alone."""
    named = [one for one in logging.Logger.manager.loggerDict.values() if isinstance(one, logging.Logger)]
    return {
        "loggers": {one.name: (one.level, tuple(one.handlers), one.disabled) for one in (logging.getLogger(), *named)},
        "signals": {number: signal.getsignal(number) for number in signal.Signals},
        "environment": dict(os.environ),
        "torch": torch.get_rng_state().tolist(),
        "numpy": str(np.random.get_state()),  # noqa: NPY002
        "random": random.getstate(),
    }


def differing(before: dict[str, object], after: dict[str, object]) -> list[str]:
    """What is not as it was; a logger that was not there before must be as Python makes one."""
    loggers = dict.fromkeys(after["loggers"], (0, (), False)) | before["loggers"]
    before = before | {"loggers": loggers}
    return [name for name in before if before[name] != after[name]]


@pytest.fixture(scope="module")
def scope(tmp_path_factory, made_photos) -> dict[str, Path]:
    return {"photos": made_photos, "folder": tmp_path_factory.mktemp("front_door")}


def run_example(name: str, scope: dict[str, object]) -> None:
    offered = getattr(clove_hub, name)
    parts = [one for one in doctest.DocTestFinder(recurse=False).find(offered, name, globs=dict(scope)) if one.examples]
    assert parts, f"{name} has no example"
    said: list[str] = []
    for part in parts:
        assert doctest.DocTestRunner(optionflags=OPTIONS).run(part, out=said.append).failed == 0, "".join(said)


EXAMPLES = [
    "pretrain",  # makes the run that the next ones take
    "export_run",
    "convert",
    "adopt",
    "evaluate",
    "load_backbone",
    "list_models",
    "create_model",
    "create_method",
    "register_method",
    "Transform",
    "collate",
]


@pytest.mark.parametrize("name", EXAMPLES)
def test_its_example_works_and_leaves_no_trace(name, scope, tmp_path, monkeypatch):
    import accelerate  # noqa: F401  # it and datasets set up loggers of their own when they are imported
    import datasets  # noqa: F401
    import timm  # noqa: F401

    for kind in ("CACHE", "CONFIG"):
        monkeypatch.setenv(f"XDG_{kind}_HOME", str(tmp_path))
    if name in ("export_run", "convert") and not (scope["folder"] / "run").is_dir():
        run_example("pretrain", scope)
    torch.manual_seed(1)
    before = traces()
    try:
        run_example(name, scope)
    finally:
        METHODS.pop("my_pixpro", None)
    assert differing(before, traces()) == []


def test_a_command_puts_back_what_it_sets_up(scope, tmp_path):
    import accelerate  # noqa: F401
    import datasets  # noqa: F401

    sizes = ["method.global_size=64", "method.local_views=0", "method.hard_negatives=3", "backbone.model=test_resnet"]
    run = ["schedule.steps=2", "schedule.warmup_epochs=0", "batch.total=4", "batch.per_device=4", "data.workers=0"]
    torch.manual_seed(1)
    before = traces()
    path = tmp_path / "2024-11-25"
    assert main(["pretrain", "demo", *sizes, *run, f"data.path={scope['photos']}", f"run.output={path}"]) == 0
    assert main(["export", str(path)]) == 0
    assert main(["evaluate", "correspond", "--model", str(path), "--data", str(scope["photos"]), "images=2"]) == 0
    assert main(["evaluate", "knn", "--model", str(path), "--data", "nowhere"]) == 2
    assert differing(before, traces()) == []


@pytest.mark.slow
@pytest.mark.network
def test_publishing_from_python_tells_what_it_would_do(scope, tmp_path):
    if not (scope["folder"] / "run" / "bundle").is_dir():
        run_example("pretrain", scope)
        clove_hub.export_run(scope["folder"] / "run", license="mit")
    code = (
        "import doctest, pathlib, sys, clove_hub\n"
        f"part = doctest.DocTestFinder(recurse=False).find(clove_hub.publish, globs={{'folder': pathlib.Path({str(scope['folder'])!r})}})[0]\n"
        f"sys.exit(doctest.DocTestRunner(optionflags={OPTIONS}).run(part).failed)"
    )
    with LoopbackHub() as hub:
        environment = os.environ | hub.environment(tmp_path)
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=PATIENCE
        )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_name_is_offered_and_imported_when_it_is_used():
    code = (
        "import sys, json; before = set(sys.modules); import clove_hub\n"
        "heavy = [m for m in ('torch', 'timm', 'numpy', 'accelerate', 'PIL') if m in sys.modules]\n"
        "print(json.dumps([heavy, dir(clove_hub), clove_hub.__all__, [n for n in clove_hub.__all__ if getattr(clove_hub, n) is None]]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=True)
    heavy, listed, offered, absent = json.loads(done.stdout)
    assert heavy == []
    assert set(offered) <= set(listed)
    assert absent == []
    assert {*EXAMPLES, "publish"} <= set(offered)
    with pytest.raises(AttributeError, match="has no attribute 'pretrian'"):
        _ = clove_hub.pretrian


def test_importing_everything_leaves_no_trace():
    code = (
        "import os, signal, logging, random\n"
        "import accelerate, datasets, timm, torch, numpy as np, matplotlib, huggingface_hub, PIL.Image\n"
        "import test_front_door as t\n"
        "torch.manual_seed(1); before = t.traces()\n"
        "import clove_hub; [getattr(clove_hub, name) for name in clove_hub.__all__]\n"
        "import clove_hub.cli, clove_hub.training.loop, clove_hub.training.finetune.fine_tune, clove_hub.export.results\n"
        "print(t.differing(before, t.traces()))"
    )
    path = os.pathsep.join([*sys.path, str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.stdout == "[]\n", done.stdout + done.stderr


def small_run(scope, folder: Path, **changes: object) -> clove_hub.RunResult:
    return clove_hub.pretrain(
        "demo",
        data={"path": scope["photos"], "workers": 0},
        run={"output": folder, "save_every": 1, "precision": changes.pop("precision", "fp32")},
        schedule={"steps": changes.pop("steps", 2), "warmup_epochs": 0},
        backbone={"model": "test_resnet"},
        batch={"total": 4, "per_device": 4},
        method={"global_size": 64, "local_size": 32, "local_views": 1, "hard_negatives": 3, "feature_dim": 16},
        **changes,
    )


def test_one_process_trains_runs_of_any_precision_from_any_thread(scope, tmp_path):
    assert small_run(scope, tmp_path / "one", precision="bf16").finished
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(small_run(scope, tmp_path / "two", precision="fp32")))
    thread.start()
    thread.join()
    assert [one.finished for one in found] == [True]


def test_words_are_those_of_the_command_line(scope, tmp_path):
    result = small_run(scope, tmp_path / "run", **{"optimizer.learning_rate": 0.5, "run.log_every": 1})
    assert result.steps == 2
    assert "learning_rate: 0.5" in (tmp_path / "run" / "recipe.yaml").read_text()
    for wrong, message in (
        ({"batch": 4}, r"pretrain\(batch=4\): give a section with the keys to change"),
        ({"bach": {"total": 4}}, "unknown section 'bach' .did you mean 'batch'"),
        ({"data.path": "x", "batch.totl": 4}, "unknown key batch.totl"),
        ({"data.path": "x", "optimizer": {"learning_rate": float("nan")}}, "must be a finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            clove_hub.pretrain("demo", **wrong)


# ---- views for somebody's own Dataset --------------------------------------------------------------------------------


class Photos(torch.utils.data.Dataset):
    def __init__(self, paths: list[Path], transform: clove_hub.Transform) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[object, int]:
        return self.transform(self.paths[index]), index


def test_a_methods_loss_from_somebody_elses_loader(scope):
    method = clove_hub.create_method(
        "clove", "test_resnet", global_size=64, local_size=32, local_views=1, hard_negatives=3
    )
    dataset = Photos(sorted(scope["photos"].iterdir()), clove_hub.Transform(method.view_spec))
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, num_workers=2, collate_fn=clove_hub.collate)
    epochs = [list(loader) for _ in range(2)]
    crops, labels = epochs[0][0]
    assert labels.tolist() == [0, 1, 2, 3]
    loss, logs = method(clove_hub.DeviceViews(method.view_spec)(crops))
    assert loss.isfinite()
    assert "embedding_spread" in logs
    boxes = [batch.boxes[0][0, i].tolist() for epoch in epochs for batch, _ in epoch for i in range(4)]
    assert len({tuple(box) for box in boxes}) == len(boxes)  # anew for each image, worker and epoch


def test_the_crops_are_those_of_pre_training(scope):
    from clove_hub.data.images import decode
    from clove_hub.views import allocate, draw, write_sample

    spec = clove_hub.create_method("clove", "test_resnet", global_size=64, local_views=0, hard_negatives=3).view_spec
    paths = sorted(scope["photos"].iterdir())[:3]
    transform = clove_hub.Transform(spec, seed=5)
    found = clove_hub.collate([transform(path) for path in paths])
    expected = allocate(spec, 3)
    for number, path in enumerate(paths):
        pixels = decode(path.read_bytes())
        write_sample(expected, number, pixels, draw(spec, 5, 0, number, *pixels.shape[:2]))
    assert torch.equal(found.crops[0], expected.crops[0])
    assert torch.equal(found.boxes[0], expected.boxes[0])
    assert all(np.array_equal(value, vars(expected.color[0])[name]) for name, value in vars(found.color[0]).items())


def test_a_pil_image_is_rgb_or_refused(scope):
    from PIL import Image

    transform = clove_hub.Transform(clove_hub.create_method("clove", "test_resnet", local_views=0).view_spec)
    with Image.open(sorted(scope["photos"].iterdir())[0]) as image:
        transform(image)
        with pytest.raises(ValueError, match=r"the image has the mode L: give its path or bytes.* or image\.convert"):
            transform(image.convert("L"))


def test_a_method_of_somebody_else_is_refused_where_it_cannot_be_told(scope):
    with pytest.raises(ValueError, match="a method is called 'clove' already"):
        clove_hub.register_method("clove", METHODS["clove"].build, METHODS["clove"].settings)
    with pytest.raises(ValueError, match="give a frozen dataclass"):
        clove_hub.register_method("mine", METHODS["clove"].build, dict)
    with pytest.raises(ValueError, match=r"no method is called 'clov' .did you mean 'clove'"):
        clove_hub.create_method("clov")


@pytest.mark.parametrize("name", sorted(set(clove_hub.__all__) - {"__version__"}))
def test_a_docstring_says_what_each_argument_is_and_shows_a_use(name):
    """As Google's convention has it: a summary, every argument under Args, errors under Raises, an example."""
    griffe = pytest.importorskip("griffe", reason="griffe comes with the extra `docs`")
    offered = getattr(clove_hub, name)
    sections = {part.kind.value: part.value for part in griffe.Docstring(offered.__doc__, lineno=1).parse("google")}
    assert "text" in sections
    if dataclasses.is_dataclass(offered):
        return  # its fields have notes of their own
    said = {parameter.name.lstrip("*") for parameter in sections.get("parameters", [])}
    assert said == set(inspect.signature(offered).parameters)
    assert "examples" in sections
