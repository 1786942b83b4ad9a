"""Every recipe that is shipped runs through the real command line, on photos, with its sizes cut."""

import json
import re

import pytest
import yaml
from small_methods import run_command
from starting import saved
from training_runs import last_checkpoint, rows

from benchmarks.small import small
from clove_hub.methods import METHODS
from clove_hub.training import recipe, same_run
from clove_hub.training.run.sampler import divide_batch, divide_norms

RECIPES = recipe.shipped_recipes()
OURS = ("demo", "clove_convnext_tiny_in1k_100ep", "clove_r50_continue", "clove_vit_small_in1k_100ep")
"""Recipes that no paper has."""


def sections(name: str) -> dict[str, dict]:
    return yaml.safe_load((recipe.SHIPPED / f"{name}.yaml").read_text())


def one_of_each_method() -> list:
    """Every recipe; all but the first of each method are slow tests."""
    seen: set[str] = set()
    found = []
    for name in RECIPES:
        method = sections(name)["method"]["name"]
        found.append(pytest.param(name, marks=[pytest.mark.slow] if method in seen else []))
        seen.add(method)
    return found


@pytest.mark.parametrize("name", one_of_each_method())
def test_it_runs_three_steps_on_photos(name, photos, tmp_path):
    run = tmp_path / "run"
    said = sections(name)
    cut = small(said["method"]["name"], schedule__steps=3, batch__total=4, batch__per_device=4)
    # The precision and the rest of the schedule are the recipe's own.
    cut = [one for one in cut if not one.startswith("run.precision")]
    if said["backbone"].get("pretrained"):
        cut.append(f"backbone.pretrained={saved(tmp_path / 'saved', 'test_resnet')}")
    assert run_command("pretrain", name, *cut, f"data.path={photos}", f"run.output={run}") == 0
    found = rows(run)
    assert [row["step"] for row in found] == [1, 2, 3]
    assert found[0]["teacher_momentum"] == said["schedule"].get("teacher_momentum", 0.99)
    if "final_teacher_momentum" in said["schedule"]:
        assert found[-1]["teacher_momentum"] == said["schedule"]["final_teacher_momentum"]
    state = json.loads((last_checkpoint(run) / "state.json").read_text())
    assert state["finished"]
    assert state["method"] == said["method"]["name"]
    # What was not cut arrived.
    for section in ("method", "optimizer", "batch"):
        for key, value in said.get(section, {}).items():
            if not any(one.startswith(f"{section}.{key}=") for one in cut):
                assert state["recipe"][section][key] == value, f"{section}.{key}"


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in OURS])
def test_its_head_and_its_name_say_what_is_in_it(name):
    text = (recipe.SHIPPED / f"{name}.yaml").read_text()
    head = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    for word in ("Paper:", "Command:", "Cost:", "Expected:"):
        assert f"# {word}" in head, word
    assert re.search(rf"-m clove_hub\.training {name} .*data\.path=", head)
    said = sections(name)
    assert said["run"]["output"] == f"runs/{name}"
    assert name.startswith(f"{said['method']['name']}_r50_")
    assert said["backbone"]["model"] == "resnet50"
    assert f"_{said['schedule']['epochs']}ep" in name
    assert f", {said['schedule']['epochs']} epochs" in head


@pytest.mark.parametrize(
    ("method", "gpus", "group"),
    [("clove", 4, 1024), ("slotcon", 8, 512), ("pixpro", 8, 1024), ("moco", 2, 128), ("moco_knn", 2, 128)],
)
def test_batch_norm_has_the_groups_of_the_released_runs_on_their_gpus_and_on_eight(method, gpus, group):
    """SyncBN over 4 x 256, 8 x 64 and 8 x 128 images; each of two GPUs by itself, with 128."""
    found = [name for name in RECIPES if name not in OURS and sections(name)["method"]["name"] == method]
    assert found
    for name in found:
        batch = recipe.load(name, ["data.path=x"]).batch
        assert batch.norm_group == group
        for world in (gpus, 8):
            micro, _ = divide_batch(batch.total, batch.per_device, world)
            assert divide_norms(batch.norm_group, batch.total, micro, world) == group


@pytest.mark.parametrize("name", [name for name in OURS if name != "demo"])
def test_a_recipe_of_ours_says_so_and_why_its_values_are_these(name):
    text = (recipe.SHIPPED / f"{name}.yaml").read_text()
    for word in ("Paper:", "Command:", "Cost:", "Expected:", "Why these values:"):
        assert f"# {word}" in text, word
    assert re.search(rf"-m clove_hub\.training {name} .*data\.path=", text)
    assert sections(name)["run"]["output"] == f"runs/{name}"
    if "continue" not in name:
        assert "Ours: no paper trained it" in text
        assert sections(name)["schedule"]["epochs"] == 100


def test_every_method_has_recipes():
    assert {sections(name)["method"]["name"] for name in RECIPES} == set(METHODS)


def test_a_run_of_a_version_without_a_setting_goes_on_as_it_began():
    """What its recipe does not say is what was computed then; what is asked for now may be something else."""
    now = recipe.as_sections(recipe.load("moco_knn_r50_coco_200ep", ["data.path=x"]))
    old = {name: dict(values) for name, values in now.items() if name != "evaluate"} | {"evaluate": []}
    for key in same_run.UNSAID:
        section, name = key.split(".")
        old[section].pop(name)
    assert same_run.differences(old, now) == [
        "backbone.zero_init_last: true -> false",
        "method.interpolation: bicubic -> bilinear",
        "method.knn_order: look_first -> enqueue_first",
        "schedule.decay: step -> epoch",
    ]
    as_then = {**now, "backbone": {**now["backbone"], "zero_init_last": True}}
    as_then["method"] = {**now["method"], "interpolation": "bicubic", "knn_order": "look_first"}
    as_then["schedule"] = {**now["schedule"], "decay": "step"}
    assert same_run.differences(old, as_then) == []
    assert same_run.differences(now, now) == []


def test_the_learning_rate_is_the_papers_at_the_papers_batch():
    """What `optimizer.learning_rate` means depends on the batch: for 256 images."""
    loaded = recipe.load("pixpro_r50_in1k_100ep", ["data.path=x"])
    assert loaded.optimizer.learning_rate * loaded.batch.total / 256 == 4.0
