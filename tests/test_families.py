"""Every family of timm's models that gives feature maps: two steps, the teacher moves, the bundle, timm, the dense probe."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import load_file
from scenes import segmented_images
from training_runs import TINY, last_checkpoint

import clove_hub
from clove_hub.backbones import create_backbone

ONE_SIZE = {"method.global_size": 224, "method.local_views": 0}
"""For models that take images of just one size."""
SMALL = {"method.global_size": 64, "method.local_views": 0, "backbone.args": {"img_size": 64}}
"""For those of them that timm can make for a size of 64."""
FAMILIES: dict[str, dict[str, object]] = {
    # Convolutional networks.
    "test_resnet": {},
    "resnetv2_18": {},
    "test_byobnet": {},
    "test_convnext": {},
    "convmixer_768_32": {},
    "cs3darknet_focus_s": {},
    "cspnext_tiny": {},
    "densenet121": {},
    "dla46x_c": {},
    "dpn48b": {},
    "test_efficientnet": {},
    "fasternet_t0": {},
    "ghostnet_050": {},
    "hgnetv2_b0": {},
    "hrnet_w18_small": {},
    "inception_next_atto": {},
    "inception_v3": {"method.global_size": 160, "method.local_size": 96},
    "lcnet_035": {},
    "mobilenetv3_small_050": {},
    "test_nfnet": {},
    "regnetx_002": {},
    "repghostnet_050": {},
    "repvit_m1": {},
    "res2next50": {},
    "resnest14d": {},
    "rexnet_100": {},
    "selecsls42": {"method.global_size": 128, "method.local_size": 64},
    "legacy_seresnet18": {},
    "skresnet18": {},
    "starnet_s050": {},
    "vgg11": {},
    "ese_vovnet19b_slim_dw": {},
    "xception41p": {},
    # Stages with attention.
    "davit_tiny": {},
    "edgenext_xx_small": {},
    "efficientvit_b0": {},
    "fastvit_t8": {},
    "focalnet_tiny_srf": {},
    "iformer_t": {},
    "test_mambaout": {},
    "poolformerv2_s12": {},
    "mobilevit_xxs": {},
    "mvitv2_tiny": {},
    "nextvit_small": {},
    "pvt_v2_b0": {},
    "swiftformer_xs": {},
    "swin_tiny_patch4_window7_224": {},
    "swinv2_tiny_window8_256": {},
    "swinv2_cr_tiny_224": {},
    "tiny_vit_5m_224": {},
    "twins_svt_small": {},
    "sam2_hiera_tiny": {},
    "test_coatnet": SMALL,
    "maxvit_rmlp_pico_rw_256": {"method.global_size": 192, "method.local_size": 96, "backbone.args": {"img_size": 96}},
    "halonet_h1": {"method.global_size": 256, "method.local_views": 0},
    "crossvit_tiny_240": {},
    "efficientformerv2_s0": ONE_SIZE,
    "efficientvim_m1": {"method.global_size": 128, "method.local_size": 64},
    "efficientvit_m0": {"method.global_size": 128, "method.local_size": 64},
    "shvit_s1": {"method.global_size": 128, "method.local_size": 64},
    "hiera_tiny_224": ONE_SIZE,
    "nest_tiny": ONE_SIZE,
    "gcvit_xxtiny": ONE_SIZE,
    "efficientformer_l1": ONE_SIZE,
    "levit_128s": ONE_SIZE,
    "pit_ti_224": ONE_SIZE,
    "visformer_tiny": ONE_SIZE,
    # Vision transformers.
    "vit_tiny_patch16_224": {},
    "vit_small_patch14_reg4_dinov2": {"method.global_size": 98, "method.local_size": 42},
    "vit_tiny_patch16_dinov3_qkvb": {},
    "deit3_small_patch16_224": {},
    "eva02_tiny_patch14_224": {"method.global_size": 98, "method.local_size": 42},
    "xcit_nano_12_p8_224": {},
    "vit_tiny_r_s16_p8_224": {},
    "vitamin_small_224": {},
    "beit_base_patch16_224": SMALL,
    "cait_xxs24_224": SMALL,
    "convit_tiny": SMALL,
    "gmlp_ti16_224": SMALL,
    "volo_d1_224": ONE_SIZE,
    "tnt_s_legacy_patch16_224": SMALL,
    "test_vit_relpos": SMALL,
}
ONE_SIZE_ALONE = {
    "halonet_h1": "its blocks of 8 cells have to divide every map",
    "hiera_tiny_224": "position embeddings that are not resampled",
    "nest_tiny": "blocks that have to divide the image",
    "gcvit_xxtiny": "windows that have to divide every map",
    "efficientformer_l1": "attention biases for one size",
    "levit_128s": "attention biases for one size",
    "pit_ti_224": "position embeddings that are not resampled",
    "visformer_tiny": "position embeddings that are not resampled",
    "volo_d1_224": "position embeddings that are not resampled",
}
"""Models whose views all need one size, and why; with any other the message names that size."""
CANNOT = {"coat_tiny": "shares tensors between layers"}
"""Models that cannot be trained at all, with what the message says."""
QUICK = ("test_resnet", "test_convnext", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224")


@pytest.fixture(scope="module")
def labeled(tmp_path_factory: pytest.TempPathFactory):
    return segmented_images(tmp_path_factory.mktemp("labeled") / "data", train=2, test=1)


@pytest.mark.parametrize(
    "name", [one if one in QUICK else pytest.param(one, marks=pytest.mark.slow) for one in FAMILIES]
)
def test_a_family_goes_the_whole_road(name, made_photos, labeled, tmp_path):
    settings = TINY | {
        "backbone.model": name,
        "data.path": str(made_photos),
        "run.output": str(tmp_path / "run"),
        "run.precision": "fp32",
        "batch.total": 2,
        "batch.per_device": 2,
        "batch.norm_group": 2,
        "schedule.steps": 2,
        "schedule.warmup_epochs": 0,
        "schedule.teacher_momentum": 0.5,
        "optimizer.name": "adamw",
        "optimizer.learning_rate": 0.01,
        "run.save_every": 1,
    }
    settings |= FAMILIES[name]
    result = clove_hub.pretrain("clove_r50_in1k_200ep", **settings)
    assert result.finished

    first, last = (load_file(path / "model.safetensors") for path in sorted((tmp_path / "run/checkpoints").iterdir()))
    moments = load_file(last_checkpoint(tmp_path / "run") / "optimizer.safetensors")
    torch.manual_seed(0)
    created = create_backbone(name, args=settings.get("backbone.args"))
    trained = {key for key, value in created.named_parameters() if value.requires_grad}
    # Distributed training waits for every parameter that asks for a gradient: all of them get one.
    assert {f"exp_avg.student.backbone.{key}" for key in trained} <= moments.keys()
    for encoder in ("student", "teacher"):
        changed = (
            key for key in trained if not torch.equal(*(one[f"{encoder}.backbone.{key}"] for one in (first, last)))
        )
        # In a branch that begins with scale 0 nothing else moves in the first step, and the teacher is a step behind.
        assert len(list(changed)) > (0.7 if encoder == "student" else 0.1) * len(trained), encoder

    bundle = clove_hub.export_run(tmp_path / "run", tmp_path / "bundle")
    loaded = timm.create_model(f"local-dir:{bundle}", pretrained=True)
    found = loaded.state_dict()
    prefix = "student.backbone."
    expected = {key.removeprefix(prefix): value for key, value in last.items() if key.startswith(prefix)}
    assert found.keys() == expected.keys()
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []

    size = settings["method.global_size"]
    smaller = {"height": size, "width": size, "epochs": 1, "seeds": 1, "batch": 2}
    record = clove_hub.evaluate("dense-probe", bundle, labeled, device="cpu", **smaller)
    assert 0 <= record.metrics["mIoU"] <= 100


@pytest.mark.parametrize("name", ONE_SIZE_ALONE)
def test_a_size_that_a_model_does_not_take_is_refused_with_one_that_it_takes(name):
    size = timm.get_pretrained_cfg(name).input_size[-1]
    with pytest.raises(ValueError, match=rf"method.local_size=96: .*choose .*{size}"):
        clove_hub.create_method("clove", name, global_size=size, local_views=2, hard_negatives=2)


@pytest.mark.parametrize("name", CANNOT)
def test_a_model_that_cannot_be_trained_is_refused_with_the_reason(name):
    with pytest.raises(ValueError, match=CANNOT[name]):
        create_backbone(name)
