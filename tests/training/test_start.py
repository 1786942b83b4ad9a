"""What a run begins with: trained backbones through the one door, and what stays of them."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from starting import saved
from training_runs import TINY, assert_same_run, last_checkpoint, launch, overrides

import clove_hub
from clove_hub.backbones import evaluating, feature_map
from clove_hub.evaluation.adaptation import adaptations
from clove_hub.training.evaluating import warn_where_it_hurts
from clove_hub.training.recipe import load
from clove_hub.training.run.peers import Peers
from clove_hub.training.start import begin
from clove_hub.training.step import assemble
from clove_hub.weights.weights import restriction

RECIPE = "clove_r50_in1k_200ep"
VIT = {"backbone.model": "vit_tiny_patch16_224", "batch.total": 4, "batch.norm_group": 4}


def state(run):
    return json.loads((last_checkpoint(run) / "state.json").read_text())


@pytest.mark.parametrize("name", ["test_resnet", "vit_tiny_patch16_224", "test_vit"])
def test_the_features_of_step_0_are_those_of_timms_model(name, tmp_path):
    source = saved(tmp_path / "saved", name)
    changes = {"backbone__model": name, "backbone__pretrained": f"local-dir:{source}", "run__precision": "fp32"}
    recipe = load(RECIPE, overrides(tmp_path, tmp_path / "run", **changes))
    train_state = assemble(recipe, Accelerator(cpu=True))
    told, images = begin(recipe, train_state.method, train_state.optimizer, Peers(1.0), None)
    expected = timm.create_model(f"local-dir:{source}", pretrained=True).eval().to(memory_format=torch.channels_last)
    pixels = torch.randn(2, 3, *expected.pretrained_cfg["input_size"][1:])
    for encoder in ("student", "teacher"):
        backbone = getattr(train_state.method, encoder)["backbone"]
        with evaluating(backbone), torch.no_grad():
            found = feature_map(backbone, pixels)
            theirs = expected.forward_intermediates(pixels, norm=True, intermediates_only=True)[-1]
        assert torch.equal(found, theirs)
    assert told["architecture"] == name
    assert images.mean == tuple(expected.pretrained_cfg["mean"])


@pytest.mark.slow
def test_a_run_goes_on_from_a_backbone_and_remembers_it_when_the_file_is_gone(made_photos, tmp_path):
    source = saved(tmp_path / "saved", "test_resnet", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), license="cc-by-nc-4.0")
    changes = {"backbone__pretrained": source, "optimizer__learning_rate": 0, "schedule__teacher_momentum": 0.5}
    said = launch(RECIPE, *overrides(made_photos, tmp_path / "run", **changes, schedule__steps=4, run__keep=9))
    assert said.returncode == 0, said.stderr
    assert f"starting with the backbone of the bundle {source}; the heads are new" in said.stderr
    assert "is under the license cc-by-nc-4.0, which allows no commercial use" in said.stderr
    expected = load_file(source / "model.safetensors")
    last = load_file(last_checkpoint(tmp_path / "run") / "model.safetensors")
    for encoder in ("student", "teacher"):
        parts = {k.removeprefix(f"{encoder}.backbone."): v for k, v in last.items() if f"{encoder}.backbone." in k}
        assert all(torch.equal(v, expected[k]) for k, v in parts.items() if "running" not in k and "batches" not in k)
    found = state(tmp_path / "run")
    assert found["preprocessing"] == {"size": 64, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    assert found["pretrained"]["license"] == "cc-by-nc-4.0"

    # Stopped after two steps, with the file gone, it ends as the other has.
    whole = last_checkpoint(tmp_path / "run")
    (tmp_path / "again").mkdir()
    run = tmp_path / "again" / "run"
    (tmp_path / "run").rename(run)
    kept = run / "checkpoints" / whole.name
    kept.rename(tmp_path / "whole")
    (source / "model.safetensors").unlink()
    said = launch(RECIPE, *overrides(made_photos, run, **changes, schedule__steps=4, run__keep=9))
    assert said.returncode == 0, said.stderr
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (last_checkpoint(run) / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert state(run)["pretrained"] == found["pretrained"]

    bundle = clove_hub.export_run(run, tmp_path / "bundle", license="cc-by-nc-4.0")
    card = (bundle / "README.md").read_text()
    assert "- **Started from:** `saved`, under cc-by-nc-4.0, which allows no commercial use" in card
    assert "It started from trained weights" in card
    # What goes on from this one knows the whole chain.
    told = clove_hub.load_backbone(bundle).weights.origin["pretrained"]
    assert told["source"] == "saved"


@pytest.mark.slow
def test_two_processes_begin_alike(made_photos, tmp_path):
    source = saved(tmp_path / "saved", "vit_tiny_patch16_224")
    small = {**VIT, "backbone.pretrained": str(source), "run.precision": "fp32"}
    changes = {key.replace(".", "__"): value for key, value in small.items()} | {
        "schedule__steps": 2,
        "schedule__warmup_epochs": 0,
    }
    for count, per_device in ((1, 4), (2, 2)):
        run = tmp_path / f"of{count}"
        arguments = overrides(made_photos, run, **changes, batch__per_device=per_device)
        said = launch(RECIPE, *arguments, processes=count)
        assert said.returncode == 0, said.stderr
    one, two = (load_file(last_checkpoint(tmp_path / name) / "model.safetensors") for name in ("of1", "of2"))
    assert all((one[key] - two[key]).abs().max() < 1e-4 for key in one if one[key].is_floating_point())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"backbone.pretrained": "SAVED", "backbone.model": "resnet18"},
            "is a test_resnet.*set backbone.model=test_resnet",
        ),
        ({"backbone.pretrained": "SAVED", "backbone.args": {"replace_stem_pool": True}}, "set 'backbone.args={}'"),
        ({"backbone.pretrained": "SAVED", "run.init_from": "SAVED"}, "give one of them"),
        ({"backbone.pretrained": "nowhere/at/all"}, "backbone.pretrained=nowhere/at/all: .*does not exist"),
        ({"backbone.pretrained": "no_such_tag"}, "backbone.pretrained=no_such_tag: .*test_resnet"),
        ({"backbone.model": "resnet50.a1_in1k"}, "backbone.model=resnet50 backbone.pretrained=resnet50.a1_in1k"),
        ({"backbone.level": -9}, "backbone.level=-9: test_resnet has 5 feature maps; choose -1 .* to -5"),
        ({"backbone.freeze": 99}, "backbone.freeze=99: test_resnet has . blocks"),
        ({"backbone.freeze_norm": True}, "backbone.pretrained names none: give it, or set backbone.freeze_norm=false"),
        ({"backbone.grad_checkpointing": True}, "test_resnet has batch norm"),
        ({"backbone.args": {"no_such": 1}}, "cannot build test_resnet with the model_args.*no_such"),
        ({"backbone.args": {"pretrained": True}}, "'pretrained' among its model_args"),
        ({"backbone.model": "vit_tiny_patch16_224", "method.local_size": 50}, "method.local_size=50.*choose 48 or 64"),
        ({"backbone.model": "hiera_tiny_224"}, "method.global_size=64.*choose 224"),
        ({"optimizer.name": "adanw"}, "did you mean 'adamw'"),
        ({"optimizer.name": "lamb"}, "keep state that checkpoints would not include"),
        ({"optimizer.name": "adamw", "optimizer.betas": [0.9]}, "adamw has 2"),
        ({"optimizer.layer_decay": 1.5}, "optimizer.layer_decay=1.5: must be above 0 and at most 1"),
        ({"optimizer.clip_norm": 0}, "optimizer.clip_norm=0.0: must be above 0"),
    ],
)
def test_what_does_not_fit_is_said_with_the_way_out(changes, words, made_photos, tmp_path):
    source = saved(tmp_path / "saved", "test_resnet")
    changes = {key: str(source) if value == "SAVED" else value for key, value in changes.items()}
    settings = TINY | {"data.path": str(made_photos), "run.output": str(tmp_path / "run"), "run.precision": "fp32"}
    with pytest.raises(ValueError, match=words):
        clove_hub.pretrain(RECIPE, **settings | changes)


def test_frozen_blocks_keep_weights_and_statistics(made_photos, tmp_path):
    settings = TINY | {"data.path": str(made_photos), "run.output": str(tmp_path / "run"), "run.precision": "fp32"}
    source = saved(tmp_path / "saved", "test_resnet")
    clove_hub.pretrain(RECIPE, **settings | {"backbone.pretrained": str(source), "backbone.freeze": 2})
    before, after = (
        load_file(source / "model.safetensors"),
        load_file(last_checkpoint(tmp_path / "run") / "model.safetensors"),
    )
    frozen = ("conv1.", "bn1.", "layer1.")
    for key, value in before.items():
        if not key.startswith("fc."):
            same = torch.equal(value, after[f"student.backbone.{key}"])
            assert same == key.startswith(frozen), key
    moments = load_file(last_checkpoint(tmp_path / "run") / "optimizer.safetensors")
    assert not [key for key in moments if "backbone.layer1." in key]


@pytest.mark.parametrize("group", [4, 8])
def test_kept_statistics_are_those_of_the_starting_weights_and_all_else_is_trained(group, made_photos, tmp_path):
    settings = TINY | {"data.path": str(made_photos), "run.output": str(tmp_path / "run"), "run.precision": "fp32"}
    source = saved(tmp_path / "saved", "test_resnet")
    batch = {"batch.total": 8, "batch.per_device": 8, "batch.norm_group": group}
    clove_hub.pretrain(RECIPE, **settings | batch | {"backbone.pretrained": str(source), "backbone.freeze_norm": True})
    before = load_file(source / "model.safetensors")
    after = load_file(last_checkpoint(tmp_path / "run") / "model.safetensors")
    for key, value in before.items():
        if not key.startswith("fc."):
            kept = "running_" in key or "num_batches" in key
            assert torch.equal(value, after[f"student.backbone.{key}"]) == kept, key
            if kept:
                assert torch.equal(value, after[f"teacher.backbone.{key}"]), key
    heads = [key for key in after if "running_mean" in key and "backbone" not in key]
    assert heads
    assert all(bool(after[key].any()) for key in heads)  # those of the new heads are learned


@pytest.mark.parametrize("level", [-2, -4])
def test_a_finer_map_is_trained_and_what_lies_behind_it_stays(level, made_photos, tmp_path):
    settings = TINY | {"data.path": str(made_photos), "run.output": str(tmp_path / "run"), "run.precision": "fp32"}
    name = "test_resnet" if level == -2 else "vit_tiny_patch16_224"
    clove_hub.pretrain(RECIPE, **settings | {"backbone.model": name, "backbone.level": level})
    first = clove_hub.create_method("clove", name, level=level, global_size=64, hard_negatives=3).state_dict()
    last = load_file(last_checkpoint(tmp_path / "run") / "model.safetensors")
    behind = ("layer4.",) if level == -2 else ("blocks.9.", "blocks.10.", "blocks.11.")
    for key, value in last.items():
        if key.startswith("student.backbone.") and value.is_floating_point() and value.ndim > 1:
            where = key.removeprefix("student.backbone.")
            assert torch.equal(first[key], value) == where.startswith(behind), key
    bundle = clove_hub.export_run(tmp_path / "run", tmp_path / "bundle", license="mit")
    assert f"The training used the feature map {level}" in (bundle / "README.md").read_text()
    # The whole method opens as it was trained: figures and `run.init_from` need it.
    assert clove_hub.weights.load_method(tmp_path / "run").method is not None


def test_grad_checkpointing_changes_no_bit(made_photos, tmp_path):
    settings = TINY | VIT | {"data.path": str(made_photos), "run.precision": "fp32", "optimizer.name": "adamw"}
    settings["backbone.args"] = {"drop_path_rate": 0.2}
    for on in (False, True):
        more = {"run.output": str(tmp_path / str(on)), "backbone.grad_checkpointing": on}
        clove_hub.pretrain(RECIPE, **settings | more)
    assert_same_run(tmp_path / "False", tmp_path / "True")


def test_position_embeddings_norms_and_registers_survive_bit_for_bit_at_another_size(made_photos, tmp_path):
    """A model for 98 pixels, of which timm resamples the position embeddings where it is not built for that size."""
    args = {"img_size": 98}
    settings = TINY | VIT | {"data.path": str(made_photos), "run.precision": "fp32", "optimizer.name": "adamw"}
    settings |= {
        "backbone.model": "vit_small_patch14_reg4_dinov2",
        "backbone.args": args,
        "schedule.steps": 2,
        "schedule.warmup_epochs": 0,
    }
    settings |= {"method.global_size": 98, "method.local_size": 42, "run.output": str(tmp_path / "run")}
    clove_hub.pretrain(RECIPE, **settings)
    bundle = clove_hub.export_run(tmp_path / "run", tmp_path / "bundle", license="mit")
    loaded = timm.create_model(f"local-dir:{bundle}", pretrained=True).state_dict()
    trained = load_file(last_checkpoint(tmp_path / "run") / "model.safetensors")
    assert loaded["pos_embed"].shape[1] == 49
    for key in ("pos_embed", "reg_token", "cls_token", "norm.weight", "norm.bias", "blocks.0.ls1.gamma"):
        assert torch.equal(loaded[key], trained[f"student.backbone.{key}"]), key
    assert {f"student.backbone.{key}" for key in loaded} <= trained.keys()


def test_licenses_that_forbid():
    assert restriction("apache-2.0") is None
    assert restriction(None) is None
    assert (
        restriction("cc-by-nc-nd-4.0") == "allows no commercial use and does not allow sharing what is trained from it"
    )
    assert "read it" in restriction("other")


def test_a_hostile_state_does_not_build_what_it_likes(made_photos, tmp_path):
    settings = TINY | {"data.path": str(made_photos), "run.output": str(tmp_path / "run"), "run.precision": "fp32"}
    clove_hub.pretrain(RECIPE, **settings | {"schedule.steps": 2})
    path = last_checkpoint(tmp_path / "run") / "state.json"
    said = json.loads(path.read_text())
    said["recipe"]["backbone"]["args"] = {"pretrained": True}
    path.write_text(json.dumps(said))
    with pytest.raises(ValueError, match="'pretrained' among its model_args"):
        clove_hub.load_backbone(tmp_path / "run")


# ---- the guard -------------------------------------------------------------------------------------------------------


def evaluated(*values: float) -> list[dict]:
    asked = {"protocol": "correspond", "data": "/somewhere/photos", "settings": {}, "seed": 0}
    return [
        {"step": 10 * number, "asked": asked, "record": {"metrics": {"correspond": value, "chance": 1.0}}}
        for number, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("values", "verdict"),
    [((40, 35, 45), "helped"), ((40, 50, 30), "hurt"), ((40, 39.5), "no change"), ((40, 39.0), "hurt")],
)
def test_a_figure_below_that_of_the_starting_weights_is_a_loss(values, verdict, tmp_path, caplog):
    (one,) = adaptations(evaluated(*values))
    assert (one.before, one.after, one.verdict) == (40, values[-1], verdict)
    assert one.best == max(values)
    (tmp_path / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evaluated(*values)))
    warn_where_it_hurts(tmp_path)
    assert ("continued training has hurt so far" in caplog.text) == (verdict == "hurt")
    assert adaptations(evaluated(*values)[1:]) == []  # nothing is known of the start


@pytest.mark.slow
def test_a_run_that_goes_on_is_measured_without_being_asked(made_photos, tmp_path):
    source = saved(tmp_path / "saved", "test_resnet")
    settings = TINY | {"data.path": str(made_photos), "run.output": str(tmp_path / "run"), "run.precision": "fp32"}
    clove_hub.pretrain(RECIPE, **settings | {"backbone.pretrained": str(source), "schedule.steps": 20})
    lines = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    assert [row["step"] for row in lines] == list(range(0, 21, 2))
    before = lines[0]["record"]["metrics"]["correspond"]
    again = clove_hub.evaluate("correspond", source, made_photos, device="cpu", images=200)
    assert before == pytest.approx(again.metrics["correspond"], abs=1e-3)  # of the weights as they were
    bundle = clove_hub.export_run(tmp_path / "run", tmp_path / "bundle", license="mit")
    after = lines[-1]["record"]["metrics"]["correspond"]
    table = (bundle / "README.md").read_text()
    assert f"| correspond on {made_photos.name}, correspond | {before:.2f} | {after:.2f} |" in table
    # From random weights nothing is measured that was not asked for.
    clove_hub.pretrain(
        RECIPE, **settings | {"run.output": str(tmp_path / "other"), "schedule.steps": 2, "schedule.warmup_epochs": 0}
    )
    assert not (tmp_path / "other" / "evaluations.jsonl").exists()
