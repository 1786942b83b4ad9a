"""A backbone as a model: its weights, its mode, its preprocessing."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from synthetic import write_checkpoint

from clove_hub.weights import load_backbone


def test_random_weights_follow_the_seed_and_nothing_else():
    first = load_backbone("random:test_resnet", seed=1).model.state_dict()
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again, other = (load_backbone("random:test_resnet", seed=seed).model.state_dict() for seed in (1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first["conv1.0.weight"], again["conv1.0.weight"])
    assert not torch.equal(first["conv1.0.weight"], other["conv1.0.weight"])


def test_a_bundle_is_read_by_timm_with_its_preprocessing(tmp_path):
    model = timm.create_model("test_resnet", num_classes=0)
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    cfg = dict(model.pretrained_cfg) | {"input_size": [3, 96, 96], "mean": [0.1, 0.2, 0.3], "crop_pct": 0.9}
    cfg = {key: cfg[key] for key in ("input_size", "mean", "std", "crop_pct", "interpolation")} | {"num_classes": 0}
    config = {"architecture": "test_resnet", "num_classes": 0, "pretrained_cfg": cfg}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for source in (str(tmp_path), f"local-dir:{tmp_path}"):
        backbone = load_backbone(source)
        assert torch.equal(backbone.model.state_dict()["conv1.0.weight"], model.state_dict()["conv1.0.weight"])
        assert (backbone.preprocessing.size, backbone.preprocessing.mean) == (96, (0.1, 0.2, 0.3))
        assert backbone.preprocessing.crop_pct == 0.9


def test_of_a_run_the_exported_encoder_is_read(tmp_path):
    teacher = timm.create_model("test_resnet", num_classes=0).state_dict()
    seen = {"size": 64, "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}
    checkpoints, state = tmp_path / "checkpoints", {"exported": "teacher", "preprocessing": seen}
    write_checkpoint(checkpoints / "step_00000007", teacher, "test_resnet", 7, **state)
    backbone = load_backbone(str(tmp_path))
    for name, tensor in backbone.model.state_dict().items():
        assert torch.equal(tensor, teacher[name]), name
    assert (backbone.preprocessing.size, backbone.preprocessing.std) == (64, (0.2, 0.2, 0.2))
    assert backbone.name.endswith("(step 7)")
    assert not any(p.requires_grad or m.training for m in backbone.model.modules() for p in m.parameters())

    del teacher["conv1.0.weight"]
    write_checkpoint(checkpoints / "step_00000008", teacher, "test_resnet", 8, **state)
    with pytest.raises(
        ValueError, match=r"the teacher of the run .*test_resnet\): 1 missing tensor \(conv1\.0\.weight\)"
    ):
        load_backbone(str(tmp_path))


def test_what_is_no_backbone_is_refused_with_a_way_out(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for source, reason in (
        (tmp_path / "weights.pth", "is an empty file, not a file with weights"),
        (tmp_path, "neither a bundle"),
        (tmp_path / "run", "has no complete checkpoint"),
        (tmp_path / "absent", "absent' does not exist"),
        ("local-dir:/absent", "the folder /absent does not exist"),
    ):
        with pytest.raises(ValueError, match=reason):
            load_backbone(str(source))
