"""What is asked of a GPU (`python -m benchmarks.gpu`): on one where there is one, and rehearsed on a CPU."""

import json
import os
import time
from pathlib import Path

import pytest
import torch
from benchmark_runs import run
from patience import PATIENCE
from scenes import segmented_images

from benchmarks.curves import RECIPE
from benchmarks.gpu import check, learn
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.place import Place
from clove_hub.methods import METHODS
from clove_hub.training.recipe import load

CHECKS = check.telling() | check.of_methods(tuple(METHODS))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHECKS)
def test_a_gpu_does_what_it_should(name, tmp_path, made_photos):
    check.alone(CHECKS[name], Place(torch.device("cuda"), False, tmp_path, made_photos))


@pytest.mark.slow
def test_all_parts_are_rehearsed(tmp_path, made_photos):
    streets = segmented_images(tmp_path / "streets")
    (streets / "val.txt").write_text((streets / "test.txt").read_text())
    given = ["--photos", made_photos, "--segmentation", streets, "--results", tmp_path / "results"]
    said = run("gpu", "--rehearse", "--minutes", 60, *given)
    counts = {}
    for part in ("check", "speed", "learn", "finetune"):
        record = json.loads((tmp_path / "results" / f"gpu_{part}.json").read_text())
        assert not {name: item for name, item in record["items"].items() if not item["ok"]}, said
        counts[part] = len(record["items"])
    assert counts["check"] > 15
    assert counts["speed"] > 20
    assert (counts["learn"], counts["finetune"]) == (6, 3)
    learned = json.loads((tmp_path / "results" / "gpu_learn.json").read_text())["items"]["learning by clove"]["result"]
    assert set(learned["evaluated"]) == {"correspond", "dense-probe"}


def test_an_ablation_is_told_from_the_run_of_the_same_seed():
    def item(finished: bool, correspond: float) -> dict:
        return {
            "result": {
                "finished": finished,
                "evaluated": {"correspond": {"0": {"correspond": 9}, "4": {"correspond": correspond}}},
            }
        }

    items = {
        "as it is, seed 0": item(True, 50),
        "as it is, seed 1": item(True, 60),
        "as it is, seed 2": item(False, 70),
    }
    items |= {f"plain attention, seed {seed}": item(True, 40) for seed in range(3)}
    items |= {"T_pos 1.4, seed 1": {"ok": False, "error": "why"}}
    assert learn.differences(items) == {"plain attention": {"correspond": [-10, -20]}}


def test_ablations_are_settings_that_clove_has():
    for name, changes in learn.ABLATIONS.items():
        recipe = load(
            RECIPE["clove"], [f"{key}={value}" for key, value in changes.items()] + ["data.path=x", "run.output=x"]
        )
        assert (recipe.method == load(RECIPE["clove"], ["data.path=x", "run.output=x"]).method) == (name == "as it is")


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("CLOVE_CLONE"), reason="CLOVE_CLONE names no clone of the released code")
def test_the_released_code_learns_beside_ours(tmp_path, made_photos):
    given = ["--photos", made_photos, "--results", tmp_path, "--reference", os.environ["CLOVE_CLONE"]]
    said = run("gpu", "--rehearse", "--part", "learn", *given)
    found = items(tmp_path / "gpu_learn.json")
    pair = [found[name]["result"] for name in ("ours beside the released code", "the released code")]
    assert all(one["evaluated"]["correspond"].keys() == {"0", "2", "4"} for one in pair), said
    assert all(one["losses"]["4"] == pytest.approx(100, abs=6) for one in pair)


def items(path: Path) -> dict[str, dict]:
    return json.loads(path.read_text())["items"]


def test_an_item_that_fails_or_hangs_costs_no_other(tmp_path):
    path, said = tmp_path / "a.json", {}
    journal = Journal(path, 1.0, benchmark="a")

    def late() -> None:
        try:
            time.sleep(PATIENCE)
        except Exception:  # what is broken off is not kept by somebody who catches everything
            time.sleep(PATIENCE)

    assert journal.item("good", lambda: {"figure": 1 / 3}) == {"figure": 1 / 3}
    assert journal.item("bad", lambda: 1 / 0) is None
    assert journal.item("late", late, limit=1.0) is None
    assert journal.item("exits", lambda: exit(3)) is None
    said = items(path)
    assert said["good"]["result"] == {"figure": 0.33333}
    assert said["bad"]["error"] == "ZeroDivisionError: division by zero"
    assert said["late"]["error"] == "OutOfTime: not done after 1 seconds"
    assert said["late"]["seconds"] < 20
    assert [said[name]["ok"] for name in ("good", "bad", "late", "exits")] == [True, False, False, False]


def test_what_is_done_stands_in_the_file_before_the_next_begins(tmp_path):
    path = tmp_path / "a.json"
    journal = Journal(path, 1.0)
    journal.item("first", lambda: 1)
    before = journal.item("second", lambda: items(path))
    assert before["first"]["result"] == 1
    assert before["second"]["error"] == "the process ended within this item"


def test_another_process_goes_on_with_the_next_item(tmp_path):
    path = tmp_path / "a.json"
    Journal(path, 1.0).item("first", lambda: 1)
    again = Journal(path, 1.0)
    assert again.item("first", lambda: 2) == 1
    assert again.item("second", lambda: 3) == 3


def test_no_item_begins_without_time(tmp_path):
    journal = Journal(tmp_path / "a.json", 0.01)
    assert journal.item("late", lambda: 1, least=5.0) is None
    assert items(tmp_path / "a.json")["late"]["ok"] is None
