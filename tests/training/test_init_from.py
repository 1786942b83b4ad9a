"""Continued pre-training: runs that begin with a state that others left."""

import pytest
import torch
from safetensors.torch import load_file
from training_runs import last_checkpoint, overrides

from clove_hub import runs
from clove_hub.cli import main


@pytest.fixture(scope="module")
def first(made_photos, tmp_path_factory):
    """A finished run of two steps."""
    run = tmp_path_factory.mktemp("first") / "run"
    assert main(["pretrain", "demo", *overrides(made_photos, run, schedule__steps=2)]) == 0
    return run


def test_a_run_begins_with_the_weights_that_another_ended_with(first, made_photos, tmp_path, capsys):
    still = {"optimizer__learning_rate": 0, "schedule__steps": 1, "schedule__teacher_momentum": 1}
    changes = {"schedule__warmup_epochs": 0, **still}
    assert main(["pretrain", "demo", *overrides(made_photos, tmp_path / "run", run__init_from=first, **changes)]) == 0
    assert f", from {first}\n" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "bundle")]) == 0
    assert "- **Started from:** `run`\n" in (tmp_path / "bundle" / "README.md").read_text()
    old, new = (load_file(last_checkpoint(run) / "model.safetensors") for run in (first, tmp_path / "run"))
    moved = {key.rpartition(".")[2] for key in old if not torch.equal(old[key], new[key])}
    assert moved == {"running_mean", "running_var", "num_batches_tracked"}
    assert runs.read_state(last_checkpoint(tmp_path / "run"))["step"] == 1


def test_started_again_it_goes_on_with_its_own_weights(first, made_photos, tmp_path):
    """Stopped in between or not: the same run, which looks at what it began from only once."""
    arguments = ["demo", *overrides(made_photos, tmp_path / "run", run__init_from=first)]
    assert main(["pretrain", *arguments]) == 0
    whole = load_file(last_checkpoint(tmp_path / "run") / "model.safetensors")
    newest = last_checkpoint(tmp_path / "run")
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    assert last_checkpoint(tmp_path / "run").name == "step_00000002"
    assert main(["pretrain", *arguments]) == 0
    again = load_file(last_checkpoint(tmp_path / "run") / "model.safetensors")
    assert all(torch.equal(whole[key], again[key]) for key in whole)


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        ("nowhere", {}, "nowhere' does not exist"),
        ("empty", {}, "found neither a bundle"),
        ("first", {"method__feature_dim": 32}, "mis-shaped tensors"),
        ("first", {"method__attention_heads": 1, "method__negatives": "inter"}, "missing tensors (queue, queue_start)"),
        ("first", {"backbone__model": "test_resnet2"}, "test_resnet"),
        ("hf-hub:nobody/nothing", {}, "hf-hub:nobody/nothing: cannot fetch hf-hub:nobody/nothing"),
    ],
)
def test_a_state_that_does_not_fit_is_named(first, made_photos, tmp_path, capsys, source, changes, message):
    (tmp_path / "empty").mkdir()
    source = {"first": first, "hf-hub:nobody/nothing": source}.get(source, tmp_path / source)
    assert main(["pretrain", "demo", *overrides(made_photos, tmp_path / "run", run__init_from=source, **changes)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(source) in error or "backbone.model" in error
