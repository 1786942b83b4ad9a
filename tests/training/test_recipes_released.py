"""Recipes beside the scripts that were released with the papers: a table of facts, and what each recipe's head says of it.

A fact is the value that a key of ours has there, and the file and flag that say so; where a script leaves a flag out it is
the parser's default. `S` stands for the script of the recipe.
"""

import re
from typing import Any

import pytest

from clove_hub.settings import flat
from clove_hub.training import recipe

Facts = dict[str, tuple[Any, str]]

# ---- CLoVE (github.com/sthalles/CLoVE) -------------------------------------------------------------------------------


def clove(epochs: int, crop: float, decay: float) -> Facts:
    """tools/clove_base_r50_{epochs}ep.sh; flags of PixPro's in it are those of CLoVE's that have the same meaning."""
    return {
        "method.global_views": (2, "contrast/data/dataset.py"),
        "method.global_size": (224, "contrast/option.py --image-size"),
        "method.global_scale": ([crop, 1.0], "S --crop"),
        "method.local_views": (6, "contrast/data/dataset.py, a loop"),
        "method.local_size": (96, "contrast/data/transform.py transform_3"),
        "method.local_scale": ([0.08, 0.3], "contrast/data/transform.py transform_3"),
        "method.interpolation": ("bicubic", "contrast/data/transform.py"),
        "method.projector_hidden": (4096, "contrast/models/CLoVE.py Proj_Head"),
        "method.feature_dim": (256, "contrast/option.py --feature-dim"),
        "method.attention": ("standard", "contrast/models/CLoVE.py nn.MultiheadAttention"),
        "method.attention_heads": (8, "contrast/option.py --clove-attn-heads"),
        "method.attention_temperature": (0.2, "contrast/option.py --attn-temp, unused"),
        "method.match_distance": (0.7, "S --pixpro-pos-ratio"),
        "method.positive_weight": (2.0, "S --lamb"),
        "method.margin": (100.0, "contrast/loss.py TripletLoss"),
        "method.hard_negatives": (10, "contrast/loss.py topk"),
        "backbone.model": ("resnet50", "S --arch"),
        "backbone.zero_init_last": (True, "contrast/resnet.py"),
        "batch.total": (2048, "S --batch-size 256, 4 processes, --grad-accumulation-steps 2"),
        "batch.norm_group": (1024, "main_pretrain.py convert_sync_batchnorm, 4 processes x 256"),
        "optimizer.name": ("lars", "S --optimizer"),
        "optimizer.learning_rate": (1.0, "S --base-lr"),
        "optimizer.weight_decay": (decay, "S --weight-decay"),
        "optimizer.decay_all": (False, "contrast/lars.py add_weight_decay"),
        "optimizer.momentum": (0.9, "contrast/option.py --momentum"),
        "optimizer.trust": (0.001, "contrast/lars.py trust_coef"),
        "optimizer.eps": (1e-8, "contrast/lars.py eps"),
        "schedule.epochs": (epochs, "S --epochs"),
        "schedule.warmup_epochs": (5, "S --warmup-epoch"),
        "schedule.warmup_to_peak": (True, "contrast/util.py cosine_scheduler, np.linspace"),
        "schedule.decay": ("step", "main_pretrain.py train"),
        "schedule.start_factor": (0.01, "contrast/option.py --warmup-multiplier 100"),
        "schedule.final_factor": (0.01, "main_pretrain.py cosine_scheduler"),
        "schedule.teacher_momentum": (0.99, "S --pixpro-momentum"),
        "schedule.final_teacher_momentum": (1.0, "main_pretrain.py cosine_scheduler"),
        "run.precision": ("fp16", "main_pretrain.py autocast, GradScaler"),
    }


CLOVE_400 = {
    "method.match_distance": (2.0, "S --clove-pos-ratio"),
    "batch.total": (64, "S --batch-size 32, 1 process, --grad-accumulation-steps 2"),
    "batch.norm_group": (32, "S --batch-size 32, 1 process"),
    "schedule.teacher_momentum": (0.99, "S --clove-momentum"),
}

# ---- SlotCon (github.com/CVMI-Lab/SlotCon) ---------------------------------------------------------------------------


def slotcon(epochs: int, prototypes: int) -> Facts:
    """scripts/slotcon_{coco,cocoplus,imagenet}_r50_{epochs}ep.sh."""
    return {
        "method.global_size": (224, "main_pretrain.py --image-size"),
        "method.global_scale": ([0.08, 1.0], "main_pretrain.py --min-scale"),
        "method.overlap": (0.01, "data/transforms.py get_params_conditioned"),
        "method.interpolation": ("bicubic", "data/transforms.py CustomDataAugmentation"),
        "method.projector_hidden": (4096, "S --dim-hidden"),
        "method.feature_dim": (256, "S --dim-out"),
        "method.prototypes": (prototypes, "S --num-prototypes"),
        "method.student_temperature": (0.1, "main_pretrain.py --student-temp"),
        "method.teacher_temperature": (0.07, "S --teacher-temp"),
        "method.center_momentum": (0.9, "main_pretrain.py --center-momentum"),
        "method.contrast_temperature": (0.2, "models/slotcon.py ctr_loss_filtered, tau"),
        "method.group_loss_weight": (0.5, "S --group-loss-weight"),
        "backbone.model": ("resnet50", "S --arch"),
        "backbone.zero_init_last": (True, "models/resnet.py"),
        "batch.total": (512, "S --batch-size"),
        "batch.norm_group": (512, "models/slotcon.py convert_sync_batchnorm"),
        "optimizer.name": ("lars", "S --optimizer"),
        "optimizer.learning_rate": (1.0, "S --base-lr"),
        "optimizer.weight_decay": (1e-5, "S --weight-decay"),
        "optimizer.decay_all": (False, "utils/lars.py, p.ndim != 1"),
        "optimizer.momentum": (0.9, "main_pretrain.py --momentum"),
        "optimizer.trust": (0.001, "utils/lars.py eta"),
        "optimizer.eps": (0.0, "utils/lars.py"),
        "schedule.epochs": (epochs, "S --epochs"),
        "schedule.warmup_epochs": (5, "S --warmup-epoch"),
        "schedule.warmup_to_peak": (False, "utils/lr_scheduler.py GradualWarmupScheduler.get_lr"),
        "schedule.decay": ("step", "main_pretrain.py train"),
        "schedule.start_factor": (0.01, "main_pretrain.py --warmup-multiplier 100"),
        "schedule.final_factor": (1e-6 / 2, "utils/lr_scheduler.py eta_min, of a peak of 512 / 256"),
        "schedule.teacher_momentum": (0.99, "S --teacher-momentum"),
        "schedule.final_teacher_momentum": (1.0, "models/slotcon.py _momentum_update_key_encoder"),
        "run.precision": ("fp16", "S --fp16"),
    }


# ---- PixPro (github.com/zdaxie/PixPro) -------------------------------------------------------------------------------


def pixpro(epochs: int) -> Facts:
    """tools/pixpro_base_r50_{epochs}ep.sh."""
    return {
        "method.global_size": (224, "contrast/option.py --image-size"),
        "method.global_scale": ([0.08, 1.0], "S --crop"),
        "method.interpolation": ("bilinear", "contrast/data/transform_coord.py RandomResizedCropCoord"),
        "method.projector_hidden": (4096, "contrast/models/PixPro.py Proj_Head"),
        "method.feature_dim": (256, "contrast/models/PixPro.py Proj_Head"),
        "method.sharpness": (2.0, "S --pixpro-p"),
        "method.match_distance": (0.7, "S --pixpro-pos-ratio"),
        "method.instance_weight": (0.0, "S --pixpro-ins-loss-weight"),
        "backbone.model": ("resnet50", "S --arch"),
        "backbone.zero_init_last": (True, "contrast/resnet.py"),
        "batch.total": (1024, "S --batch-size 128, 8 processes"),
        "batch.norm_group": (1024, "contrast/models/PixPro.py convert_sync_batchnorm, 8 processes x 128"),
        "optimizer.name": ("lars", "S --optimizer"),
        "optimizer.learning_rate": (1.0, "S --base-lr"),
        "optimizer.weight_decay": (1e-5, "S --weight-decay"),
        "optimizer.decay_all": (False, "contrast/lars.py add_weight_decay"),
        "optimizer.momentum": (0.9, "contrast/option.py --momentum"),
        "optimizer.trust": (0.001, "contrast/lars.py trust_coef"),
        "optimizer.eps": (1e-8, "contrast/lars.py eps"),
        "schedule.epochs": (epochs, "S --epochs"),
        "schedule.warmup_epochs": (5, "S --warmup-epoch"),
        "schedule.warmup_to_peak": (False, "contrast/lr_scheduler.py GradualWarmupScheduler.get_lr"),
        "schedule.decay": ("step", "main_pretrain.py train"),
        "schedule.start_factor": (0.01, "contrast/option.py --warmup-multiplier 100"),
        "schedule.final_factor": (1e-6 / 4, "contrast/lr_scheduler.py eta_min, of a peak of 1024 / 256"),
        "schedule.teacher_momentum": (0.99, "S --pixpro-momentum"),
        "schedule.final_teacher_momentum": (1.0, "contrast/models/PixPro.py _momentum_update_key_encoder"),
        "run.precision": ("fp16", "S --amp-opt-level O1"),
    }


# ---- MoCo and MoCo-kNN (github.com/wvangansbeke/Revisiting-Contrastive-SSL) ------------------------------------------


def moco(epochs: int) -> Facts:
    """scripts/moco_coco_{epochs}ep.sh."""
    return {
        "method.global_size": (224, "S --size_crops"),
        "method.global_scale": ([0.2, 1.0], "S --min_scale_crops, --max_scale_crops"),
        "method.local_views": (0, "S --num_crops 2"),
        "method.auto_augment": (0.0, "main.py --auto-augment"),
        "method.overlap": (0.0, "main.py --constrained-cropping"),
        "method.interpolation": ("bilinear", "main.py transforms.RandomResizedCrop"),
        "method.projector_hidden": (2048, "builder/builder.py dim_mlp, of a ResNet-50"),
        "method.feature_dim": (128, "main.py --moco-dim"),
        "method.queue": (65536, "main.py --moco-k"),
        "method.temperature": (0.2, "S --moco-t"),
        "method.key_norm": ("shuffled", "builder/builder.py _batch_shuffle_ddp"),
        "method.knn_weight": (0.0, "builder/builder.py"),
        "backbone.model": ("resnet50", "S -a"),
        "backbone.zero_init_last": (False, "main.py torchvision.models"),
        "batch.total": (256, "S --batch-size"),
        "batch.norm_group": (128, "2 GPUs x 128, says the paper; no convert_sync_batchnorm"),
        "optimizer.name": ("sgd", "main.py torch.optim.SGD"),
        "optimizer.learning_rate": (0.3, "S --lr, for a batch of 256"),
        "optimizer.weight_decay": (1e-4, "main.py --wd"),
        "optimizer.decay_all": (True, "main.py model.parameters()"),
        "optimizer.momentum": (0.9, "main.py --momentum"),
        "schedule.epochs": (epochs, "S --epochs"),
        "schedule.warmup_epochs": (0, "main.py adjust_learning_rate"),
        "schedule.decay": ("epoch", "main.py adjust_learning_rate, S --cos"),
        "schedule.final_factor": (0.0, "main.py adjust_learning_rate"),
        "schedule.teacher_momentum": (0.999, "main.py --moco-m"),
        "schedule.final_teacher_momentum": (0.999, "main.py --moco-m"),
        "run.precision": ("fp32", "main.py"),
    }


def moco_knn(epochs: int) -> Facts:
    """scripts/ours_coco_{epochs}ep.sh."""
    return moco(epochs) | {
        "method.global_size": (160, "S --size_crops"),
        "method.local_views": (4, "S --num_crops 2 4"),
        "method.local_size": (96, "S --size_crops"),
        "method.local_scale": ([0.05, 0.14], "S --min_scale_crops, --max_scale_crops"),
        "method.auto_augment": (0.5, "S --auto-augment 0 2 3 4 5, main_ours.py RandomChoice"),
        "method.overlap": (0.1, "S --constrained-cropping, utils/constrained_cropping.py"),
        "method.interpolation": ("bilinear", "utils/constrained_cropping.py CustomMultiCropping"),
        "method.knn_weight": (0.4, "S --aux-weight"),
        "method.knn_neighbors": (20, "S --aux-topk"),
        "method.knn_order": ("enqueue_first", "builder/builder_ours.py forward"),
        "method.knn_warmup_epochs": (0.0, "main_ours.py"),
        "schedule.teacher_momentum": (0.995, "S --moco-m"),
        "schedule.final_teacher_momentum": (0.995, "S --moco-m"),
    }


def moco_knn_warmup(epochs: int, warmup: float) -> Facts:
    """scripts/ours_warmup_coco_{epochs}ep.sh."""
    return moco_knn(epochs) | {
        "method.knn_order": ("look_first", "builder/builder_ours_warmup.py forward"),
        "method.knn_warmup_epochs": (warmup, "S --warmup-epochs"),
    }


RELEASED: dict[str, Facts] = {
    "clove_r50_in1k_50ep": clove(50, 0.24, 1e-5),
    "clove_r50_in1k_200ep": clove(200, 0.2, 2e-5),
    "clove_r50_in1k_400ep": clove(200, 0.2, 2e-5) | CLOVE_400,
    "moco_knn_r50_coco_200ep": moco_knn(200),
    "moco_knn_r50_coco_200ep_warmup": moco_knn_warmup(200, 5.0),
    "moco_knn_r50_coco_800ep": moco_knn(800),
    "moco_knn_r50_coco_800ep_warmup": moco_knn_warmup(800, 20.0),
    "moco_r50_coco_200ep": moco(200),
    "moco_r50_coco_800ep": moco(800),
    "pixpro_r50_in1k_100ep": pixpro(100),
    "pixpro_r50_in1k_400ep": pixpro(400),
    "slotcon_r50_coco_800ep": slotcon(800, 256),
    "slotcon_r50_cocoplus_800ep": slotcon(800, 256),
    "slotcon_r50_in1k_100ep": slotcon(100, 2048),
    "slotcon_r50_in1k_200ep": slotcon(200, 2048),
}


def test_every_recipe_of_a_released_method_has_its_facts() -> None:
    methods = {name.split("_r50_")[0] for name in RELEASED}
    assert {
        name for name in recipe.shipped_recipes() if name.split("_r50_")[0] in methods and "continue" not in name
    } == set(RELEASED)


@pytest.mark.parametrize("name", RELEASED)
def test_a_recipe_is_the_released_script_but_for_what_its_head_says(name: str) -> None:
    ours = flat(recipe.as_sections(recipe.load(name, ["data.path=x"])))
    head = (recipe.SHIPPED / f"{name}.yaml").read_text().split("\nmethod:")[0]
    said = re.search(r"^# differs from the release in ((?:.*\n#   )*.*)$", head, re.MULTILINE)
    assert said, "a line '# differs from the release in ...', or in nothing"
    named = set(re.findall(r"\b(?:method|backbone|data|batch|optimizer|schedule|run)\.\w+", said[1]))
    differing = {key for key, (value, _) in RELEASED[name].items() if ours[key] != value}
    assert named == differing
    assert bool(differing) != said[1].startswith("nothing")
