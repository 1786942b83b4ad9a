"""What is asked of a GPU (`python -m benchmarks.gpu`): on one where there is one, and rehearsed on a CPU."""

import json
import time
from pathlib import Path

import pytest
import torch
from benchmark_runs import run
from scenes import segmented_images

from benchmarks.gpu import check
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.place import Place
from clove_hub.methods import METHODS

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
    said = run("gpu", "--rehearse", "--minutes", 10, *given)
    counts = {}
    for part in ("check", "speed", "learn", "finetune"):
        record = json.loads((tmp_path / "results" / f"gpu_{part}.json").read_text())
        assert not {name: item for name, item in record["items"].items() if not item["ok"]}, said
        counts[part] = len(record["items"])
    assert counts["check"] > 20
    assert counts["speed"] > 20
    assert (counts["learn"], counts["finetune"]) == (6, 3)
    learned = json.loads((tmp_path / "results" / "gpu_learn.json").read_text())["items"]["learning by clove"]["result"]
    assert set(learned["evaluated"]) == {"correspond", "dense-probe"}


def items(path: Path) -> dict[str, dict]:
    return json.loads(path.read_text())["items"]


def test_an_item_that_fails_or_hangs_costs_no_other(tmp_path):
    path, said = tmp_path / "a.json", {}
    journal = Journal(path, 1.0, benchmark="a")

    def late() -> None:
        try:
            time.sleep(30)
        except Exception:  # what is broken off is not kept by somebody who catches everything
            time.sleep(30)

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
