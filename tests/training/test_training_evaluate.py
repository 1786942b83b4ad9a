"""Evaluation while a run goes on: what it finds, and that the run is none the wiser."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import last_checkpoint, launch, overrides, rows

from clove_hub.cli import main
from clove_hub.evaluation.run import run_protocol
from clove_hub.weights import load_backbone

SETTINGS = {"size": 64, "images": 12, "batch": 5}


def asked(photos: Path, **changes: object) -> str:
    entry = {"protocol": "correspond", "data": str(photos), "every": 3, "settings": SETTINGS}
    return "evaluate=" + json.dumps([entry | changes])


def train(photos: Path, run: Path, *more: str, **changes: object) -> int:
    return main(["pretrain", "demo", *overrides(photos, run, **changes), *more])


def evaluations(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]


def figures(run: Path) -> dict[int, float]:
    return {row["step"]: row["record"]["metrics"]["correspond"] for row in evaluations(run)}


@pytest.fixture(scope="module")
def evaluated(made_photos, tmp_path_factory) -> Path:
    """A run of four steps with evaluations every three."""
    run = tmp_path_factory.mktemp("evaluated") / "run"
    assert train(made_photos, run, asked(made_photos)) == 0
    return run


def same_weights(one: Path, other: Path) -> bool:
    a, b = (load_file(last_checkpoint(run) / "model.safetensors") for run in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_run_is_bit_for_bit_the_same_with_and_without(evaluated, made_photos, tmp_path):
    assert train(made_photos, tmp_path / "run") == 0
    for key in ("loss", "gradient_norm", "embedding_spread"):
        assert [row[key] for row in rows(evaluated)] == [row[key] for row in rows(tmp_path / "run")]
    assert same_weights(evaluated, tmp_path / "run")


def test_the_figures_are_those_of_the_command_before_the_first_step_every_so_many_and_after_the_last(
    evaluated, made_photos
):
    assert list(figures(evaluated)) == [0, 3, 4]
    backbone = load_backbone(str(evaluated))
    record = run_protocol("correspond", backbone.model, backbone.preprocessing, made_photos, SETTINGS)
    last = evaluations(evaluated)[-1]["record"]
    assert last["metrics"] == record.metrics
    assert last["data"]["fingerprint"] == record.data.fingerprint
    assert last["model"] == f"{evaluated} (step 4)"
    assert last["weights"] == record.weights
    assert len({row["record"]["weights"] for row in evaluations(evaluated)}) == 3
    assert last["preprocessing"] == record.preprocessing


def test_the_newest_step_is_a_result_beside_what_was_evaluated_afterwards(evaluated, made_photos, tmp_path, capsys):
    """The same weights and the same seed, so that the table has one row."""
    out = tmp_path / "result.json"
    settings = [f"{key}={value}" for key, value in SETTINGS.items()]
    arguments = ["--model", str(evaluated), "--data", str(made_photos), "--json", str(out), *settings]
    assert main(["evaluate", "correspond", *arguments]) == 0
    capsys.readouterr()
    assert main(["results", str(evaluated), str(out)]) == 0
    table = capsys.readouterr().out
    assert "### correspond (version 1, rule own) on made_photos0" in table
    assert f"| {figures(evaluated)[4]:.2f} | " in table
    assert table.count("(step 4)") == table.count("(step ") == 1


def test_a_kill_while_evaluating_loses_no_step_and_no_row(evaluated, made_photos, tmp_path, monkeypatch):
    from clove_hub.training import evaluating

    class Killed(BaseException):
        pass

    def killed(protocol, model, *arguments):
        if arguments[-2].endswith("(step 3)"):
            raise Killed
        return run_protocol(protocol, model, *arguments)

    run = tmp_path / "run"
    monkeypatch.setattr(evaluating, "run_protocol", killed)
    with pytest.raises(Killed):
        train(made_photos, run, asked(made_photos))
    assert last_checkpoint(run).name == "step_00000003"
    with (run / "evaluations.jsonl").open("a") as file:
        file.write('{"step": 3, "asked"')  # cut off as it was written
    monkeypatch.undo()
    assert train(made_photos, run, asked(made_photos)) == 0
    assert figures(run) == figures(evaluated)
    assert same_weights(run, evaluated)


def test_what_a_finished_run_was_not_asked_it_is_asked_afterwards(made_photos, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(made_photos, run) == 0
    assert not (run / "evaluations.jsonl").exists()
    assert train(made_photos, run, asked(made_photos, every=100)) == 0
    assert list(figures(run)) == [4]
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4]
    capsys.readouterr()
    assert train(made_photos, run, asked(made_photos, every=100)) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert list(figures(run)) == [4]


@pytest.mark.slow
def test_two_processes_find_what_one_finds(evaluated, made_photos, tmp_path):
    """Of the same random weights, and after steps in which each has its own batch norm statistics, of those saved."""
    run = tmp_path / "two"
    result = launch("demo", *overrides(made_photos, run, batch__per_device=2), asked(made_photos), processes=2)
    assert result.returncode == 0, result.stderr
    found = figures(run)
    assert found[0] == figures(evaluated)[0]
    backbone = load_backbone(str(run))
    record = run_protocol("correspond", backbone.model, backbone.preprocessing, made_photos, SETTINGS)
    assert found[4] == record.metrics["correspond"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protocol": "corespond"}, "evaluate[0]: there is no protocol 'corespond' (did you mean 'correspond'?)"),
        ({"settings": {"sise": 3}}, "evaluate[0]: unknown key correspond.sise (did you mean 'size'?)"),
        ({"data": "/does/not/exist"}, "evaluate[0].data='/does/not/exist' is not a folder"),
        ({"every": 0}, "every=0 of correspond: must be at least 1"),
        ({"evry": 3}, "unknown key evaluate[0].evry (did you mean 'every'?)"),
        ({"settings": 3}, "evaluate[0].settings=3 is a int, expected dict[str, typing.Any]"),
    ],
)
def test_wrong_evaluations_are_named_before_the_first_step(made_photos, tmp_path, capsys, change, message):
    assert train(made_photos, tmp_path / "run", asked(made_photos, **change)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_broken_data_is_named_before_the_first_step(made_photos, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert train(made_photos, tmp_path / "run", asked(tmp_path / "empty")) == 2
    assert str(tmp_path / "empty") in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluate=knn", "evaluate='knn': expected a list"),
        ("evaluate.every=3", "is not of the form section.key=value"),
        ("evaluate=[{protocol: knn}]", "evaluate[0].data is not set"),
    ],
)
def test_a_list_of_evaluations_that_is_none_is_named(made_photos, tmp_path, capsys, override, message):
    assert train(made_photos, tmp_path / "run", override) == 2
    assert message in capsys.readouterr().err


def test_one_folder_is_not_asked_about_twice_by_a_protocol(made_photos, tmp_path, capsys):
    entry = {"protocol": "correspond", "data": str(made_photos), "every": 3}
    assert train(made_photos, tmp_path / "run", f"evaluate={json.dumps([entry, entry])}") == 2
    assert "evaluate has correspond/" in capsys.readouterr().err
