"""What every registered method must do, whichever it is: the contract of `clove_hub.methods.base`."""

import ast
import copy
import dataclasses
import json
import multiprocessing
import re
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from benchmark_runs import run
from patience import PATIENCE
from safetensors.torch import load_file
from small_methods import run_command
from training_runs import assert_same_run, last_checkpoint, rows

from benchmarks.small import small
from clove_hub.backbones import create_backbone
from clove_hub.batch_norm import group_batch_norms
from clove_hub.cli import main
from clove_hub.methods import METHODS
from clove_hub.settings import flat
from clove_hub.training import listing, recipe
from clove_hub.training.step import TrainState, assemble, prepare, take_step
from clove_hub.views import CropBatch, allocate, draw, write_sample
from clove_hub.zoo.models import papers

ROOT = Path(__file__).parents[3]


def bare(name: str) -> dict[str, dict[str, object]]:
    """A recipe that says nothing but the method's name."""
    return {"method": {"name": name}, "data": {"path": "x"}, "run": {"output": "x"}}


def build(name: str, **changes: object) -> TrainState:
    sections = bare(name)
    for override in small(name, **changes):
        recipe.apply_override(sections, override)
    return assemble(recipe.parse(sections), Accelerator(cpu=True, mixed_precision="no"))


def crops(train_state: TrainState, images: range, seed: int = 0) -> CropBatch:
    """The crops of made pictures, the same for an image whatever others are asked for."""
    spec = train_state.method.view_spec
    batch = allocate(spec, len(images))
    for position, image in enumerate(images):
        picture = np.random.default_rng([seed, image]).integers(0, 256, (80, 100, 3), dtype=np.uint8)
        write_sample(batch, position, picture, draw(spec, seed, 0, image, 80, 100))
    return batch


@pytest.fixture(params=sorted(METHODS))
def name(request) -> str:
    return request.param


# ---- forward and backward --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("large", "local"), [(75, 45), (97, 33)])
def test_odd_sizes_train_the_student_and_nothing_else(name, large, local):
    sizes = {"method__global_size": large}
    if "local_size" in {field.name for field in dataclasses.fields(METHODS[name].settings)}:
        sizes["method__local_size"] = local
    train_state = build(name, **sizes)
    method = train_state.method
    method.begin_step(0.99, 0.0)
    loss, logs = method(train_state.make_views(crops(train_state, range(4))))
    loss.backward()
    assert loss.isfinite()
    assert loss.ndim == 0
    assert "embedding_spread" in logs
    assert all(value.ndim == 0 and value.isfinite() and not value.requires_grad for value in logs.values())
    for key, parameter in method.named_parameters():
        assert parameter.requires_grad == key.startswith("student."), key
        # Distributed training waits for every parameter that asks for a gradient.
        assert (parameter.grad is not None) == parameter.requires_grad, key
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all(), key


def test_the_contract_is_kept(name):
    method = build(name).method
    assert method.exported in ("student", "teacher")
    assert method.view_spec.views
    parts = [key for key, _ in method.named_children() if key in ("student", "teacher")]
    assert method.exported in parts
    assert all("backbone" in getattr(method, part) for part in parts)


def test_the_teacher_moves_by_exactly_the_momentum(name):
    method = build(name).method.double()
    with torch.no_grad():
        for parameter in method.student.parameters():
            parameter.add_(torch.randn_like(parameter))
    before = copy.deepcopy(dict(method.teacher.named_parameters()))
    students = dict(method.student.named_parameters())
    method.begin_step(0.9, 0.0)
    moved = dict(method.teacher.named_parameters())
    assert moved
    for key, parameter in moved.items():
        assert torch.allclose(parameter, 0.9 * before[key] + 0.1 * students[key], rtol=0, atol=1e-14), key
    held = copy.deepcopy(moved)
    method.begin_step(1.0, 0.0)
    assert all(torch.equal(parameter, held[key]) for key, parameter in method.teacher.named_parameters())


def test_the_loss_falls_on_a_small_fixed_set(name):
    """With what the method remembers of earlier batches held still.

    A queue that filled up with the very images it is trained on would raise the loss.
    """
    train_state = build(name)
    method = train_state.method
    views = train_state.make_views(crops(train_state, range(8)))
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    remembered = {key: buffer.clone() for key, buffer in method.named_buffers(recurse=False)}
    losses = []
    for _ in range(15):
        method.begin_step(0.99, 0.0)
        for key, buffer in remembered.items():
            method.get_buffer(key).copy_(buffer)
        optimizer.zero_grad()
        loss, _ = method(views)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    # By more than it goes up and down from one step to the next.
    assert max(losses[-3:]) < losses[0] - 0.2, losses


def test_half_precision_leaves_the_loss_in_float32(name):
    train_state = build(name)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = train_state.method(train_state.make_views(crops(train_state, range(4))))
    assert loss.dtype == torch.float32


def test_a_method_is_the_same_whenever_it_is_built(name):
    one, other = (build(name).method.state_dict() for _ in range(2))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


# ---- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory, made_photos):
    """The folder of a finished run of four steps of each method, made once; the recipe names the method alone."""
    runs: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in runs:
            folder = tmp_path_factory.mktemp(name)
            (folder / "method.yaml").write_text(json.dumps({"method": {"name": name}}))  # JSON is YAML
            changes = {"data__path": made_photos, "run__output": folder / "run"}
            assert run_command("pretrain", folder / "method.yaml", *small(name, **changes)) == 0
            runs[name] = folder / "run"
        return runs[name]

    return run


def test_a_run_that_was_stopped_ends_bit_for_bit_like_one_left_alone(name, finished, tmp_path):
    whole, stopped = finished(name), tmp_path / "run"
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "checkpoints" / "step_00000004")
    overrides = [*yaml_overrides(whole), f"run.output={stopped}"]
    assert run_command("pretrain", whole.parent / "method.yaml", *overrides) == 0
    assert [row["step"] for row in rows(stopped)] == [1, 2, 3, 4]
    assert_same_run(whole, stopped)


def yaml_overrides(run: Path) -> list[str]:
    """What the run was started with, from what it wrote down itself."""
    sections = json.loads((last_checkpoint(run) / "state.json").read_text())["recipe"]
    return [
        f"{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in flat(sections).items()
        if key != "method.name"
    ]


def test_the_state_of_a_run_loads_strictly(name, finished):
    state = json.loads((last_checkpoint(finished(name)) / "state.json").read_text())
    loaded = recipe.parse(state["recipe"])
    method = METHODS[name].build(create_backbone(loaded.backbone.model), loaded.method)
    tensors = load_file(last_checkpoint(finished(name)) / "model.safetensors")
    method.load_state_dict(tensors, strict=True)
    assert state["exported"] == method.exported
    with pytest.raises(RuntimeError, match="student"):
        method.load_state_dict({key: value for key, value in tensors.items() if not key.startswith("student.")})


def test_a_run_becomes_a_bundle_that_timm_loads_and_converts(name, finished, tmp_path):
    run, bundle = finished(name), tmp_path / "bundle"
    assert run_command("export", run, "--out", bundle) == 0
    tensors = load_file(last_checkpoint(run) / "model.safetensors")
    exported = METHODS[name].build.exported
    loaded = timm.create_model(f"local-dir:{bundle}", pretrained=True).state_dict()
    assert loaded
    assert all(torch.equal(value, tensors[f"{exported}.backbone.{key}"]) for key, value in loaded.items())
    # To torchvision, Detectron2 and the rest lead names that have nothing to do with the method.
    assert run_command("convert", bundle, "--to", "timm", "--out", tmp_path / "backbone.safetensors") == 0
    converted = load_file(tmp_path / "backbone.safetensors")
    assert converted.keys() == loaded.keys()
    assert all(torch.equal(value, loaded[key]) for key, value in converted.items())


# ---- two processes ---------------------------------------------------------------------------------------------------

EQUAL = "Two processes compute what one does"
NOT_EQUAL = "Two processes do not compute what one does"


def stated(name: str) -> str:
    """What the method's file says of several processes."""
    said = " ".join((sys.modules[METHODS[name].build.__module__].__doc__ or "").split())
    found = [text for text in (EQUAL, NOT_EQUAL) if text in said]
    assert len(found) == 1, f"the docstring of {name}'s file has to say {EQUAL!r} or {NOT_EQUAL!r}, and when or why"
    return found[0]


def train_share(name: str, rank: int, world: int, port: int, folder: str) -> None:
    """Two steps on this process's share of eight images, with batch norm over four."""
    import os

    torch.set_num_threads(1)
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    train_state = build(name, optimizer__name="sgd")
    group_batch_norms(train_state.method, group=4, images=8 // world)
    prepare(train_state)
    figures = []
    for step in range(2):
        share = crops(train_state, range(rank * 8 // world, (rank + 1) * 8 // world), seed=step)
        take_step(train_state, [share], 1, rate=0.05, momentum=0.9, epoch=0.0)
        figures.append(train_state.figures.clone())
    torch.save((torch.stack(figures), train_state.method.state_dict()), f"{folder}/{world}_{rank}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], keys: list[str]) -> float:
    return float(torch.stack([(one[key].double() - other[key].double()).norm() for key in keys]).norm())


def test_two_processes_equal_one_where_the_method_says_so(name, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["clove_hub.training.loop"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=train_share, args=(name, rank, world, port, str(tmp_path)))
        for world in (1, 2)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
        assert process.exitcode == 0
    (figures, one), (figures_of_two, two), (_, other) = (
        torch.load(tmp_path / f"{file}.pt", weights_only=True) for file in ("1_0", "2_0", "2_1")
    )
    assert all(torch.equal(two[key], other[key]) for key in two), "the two processes have come apart"
    assert figures_of_two.isfinite().all()
    if stated(name) == EQUAL:
        assert torch.allclose(figures, figures_of_two, rtol=1e-4)
        start = build(name, optimizer__name="sgd").method.state_dict()
        for keys in ([k for k in one if k.startswith("student.")], [k for k in one if not k.startswith("student.")]):
            # Together, as biases before a norm have gradients of nothing but rounding.
            moved, apart = (distance(one, state, keys) for state in (start, two))
            assert apart < 1e-3 * moved


# ---- the registry ----------------------------------------------------------------------------------------------------


def test_a_method_says_what_it_is_in_one_line(name):
    summary = METHODS[name].summary
    assert 20 < len(summary) < 110
    assert not summary.endswith(".")


def test_a_methods_file_reads_in_one_go(name):
    file = Path(sys.modules[METHODS[name].build.__module__].__file__)
    assert len(file.read_text().splitlines()) <= 270


def test_loop_checkpoints_and_export_name_no_method():
    """Neither in a name nor in a string. Comments and docstrings may, where a paper is the reason for something."""
    files = [ROOT / "training" / f"{name}.py" for name in ("loop", "step", "reporting", "data")]
    files.append(ROOT / "training" / "run" / "checkpoints.py")
    files += sorted((ROOT / "export").glob("*.py"))
    word = re.compile(rf"\b({'|'.join(METHODS)})\b", re.IGNORECASE)
    for file in files:
        named = [text for text in words_of(file) if word.search(re.sub("clove[-_]hub", "", text, flags=re.IGNORECASE))]
        assert named == [], file.name


def words_of(file: Path) -> list[str]:
    """The names and strings of a file's code, docstrings left out."""
    found = []
    tree = ast.parse(file.read_text())
    docstrings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
            found.append(node.value)
        found += [value for key in ("id", "attr", "name", "arg") if isinstance(value := getattr(node, key, None), str)]
    return found


# ---- clove-hub methods -----------------------------------------------------------------------------------------------


def test_every_method_and_every_recipe_is_listed(capsys):
    assert main(["methods"]) == 0
    said = capsys.readouterr().out
    for name, entry in METHODS.items():
        cost = listing.measured()["methods"][name]
        paper = f"{re.escape(papers()[name].title)}, arXiv:{papers()[name].arxiv}"
        line = rf"^{name} +{re.escape(entry.summary)}\n +{paper}\n +{cost['speed']:.2f} x the images/s and {cost['memory']:.2f} x "
        assert re.search(line, said, re.MULTILINE)
    for shipped in recipe.shipped_recipes():
        assert re.search(rf"\b{shipped}\b", said)
    assert listing.measured()["setting"]["device"] in said


def test_the_listed_recipes_are_those_of_the_method():
    found = listing.recipes()
    assert sorted(name for names in found.values() for name in names) == recipe.shipped_recipes()
    assert found["clove"] == [
        *("clove_r50_continue", "clove_r50_in1k_50ep", "clove_convnext_tiny_in1k_100ep", "clove_vit_small_in1k_100ep"),
        *("clove_r50_in1k_200ep", "clove_r50_in1k_400ep", "demo"),
    ]
    assert found["pixpro"] == ["pixpro_r50_in1k_100ep", "pixpro_r50_in1k_400ep"]


def test_the_costs_are_those_that_a_benchmark_has_left():
    """Of every method, and all from the same run."""
    shipped = listing.measured()
    assert set(shipped["methods"]) == set(METHODS)
    assert shipped["methods"]["clove"] == {"speed": 1, "memory": 1}
    results = [json.loads(file.read_text()) for file in (ROOT / "benchmarks" / "results").glob("methods_*.json")]
    assert shipped in [result["shipped"] for result in results]


@pytest.mark.slow
def test_the_benchmark_measures_every_method(tmp_path):
    sizes = ["method.global_size=128", "backbone.model=test_resnet", "batch.total=4", "data.workers=0"]
    written = ["--results", tmp_path, "--ship", tmp_path / "costs.json"]
    run("methods", "--device", "cpu", "--rounds", 1, *written, *sizes)
    shipped = json.loads((tmp_path / "costs.json").read_text())
    assert shipped == json.loads((tmp_path / "methods_cpu.json").read_text())["shipped"]
    assert set(shipped["methods"]) == set(METHODS)
    assert all(cost["speed"] > 0 and cost["memory"] > 0 for cost in shipped["methods"].values())
    assert shipped["setting"]["batch"] == 4


def test_the_documentations_table_is_current():
    page = (ROOT / "docs/methods/README.md").read_text()
    block = re.search(r"<!-- clove-hub methods --markdown -->\n(.*?)\n<!-- end -->", page, re.DOTALL)
    assert block is not None
    assert block[1] == listing.table(markdown=True), (
        "paste what clove-hub methods --markdown prints between the two comments"
    )
