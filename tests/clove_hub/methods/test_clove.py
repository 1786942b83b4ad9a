import dataclasses

import numpy as np
import pytest
import torch
from trajectories import golden_weight, released_names

from clove_hub.backbones import create_backbone, feature_shape
from clove_hub.methods import Clove, CloveSettings
from clove_hub.training.optimizer import LARS, parameter_groups
from clove_hub.views import Jitter, Views
from clove_hub.zoo.released import read_released

SMALL = CloveSettings(
    global_size=128, local_size=64, local_views=3, projector_hidden=32, feature_dim=16, attention_heads=4, queue=50
)


def random_views(settings: CloveSettings, batch: int, seed: int = 0, dtype=torch.float32) -> list[Views]:
    generator = torch.Generator().manual_seed(seed)

    def group(count: int, size: int, side: float) -> Views:
        low = torch.rand(count, batch, 2, generator=generator) * (1 - side)
        boxes = torch.cat([low, low + side], -1)
        pixels = torch.randn(count, batch, 3, size, size, generator=generator)
        return Views(pixels.to(dtype), boxes.to(dtype), torch.zeros(count, batch, dtype=torch.bool))

    if settings.global_size == settings.local_size:
        return [group(settings.global_views + settings.local_views, settings.global_size, 0.6)]
    groups = [group(settings.global_views, settings.global_size, 0.7)]
    return groups + ([group(settings.local_views, settings.local_size, 0.4)] if settings.local_views else [])


def build(settings: CloveSettings = SMALL, model: str = "test_resnet") -> Clove:
    torch.manual_seed(0)
    return Clove(create_backbone(model), settings)


# ---- golden numbers ----------------------------------------------------------------------------------------------


def test_loss_and_gradients_equal_the_released_code(golden):
    g = golden["clove_loss"]

    def cells(name: str, views: int) -> torch.Tensor:  # (V * N, C, H, W) -> (V, N, H * W, C)
        maps = torch.from_numpy(g[name])
        return maps.unflatten(0, (views, -1)).flatten(-2).transpose(-2, -1)

    boxes = torch.from_numpy(g["boxes"])
    flipped = torch.zeros(boxes.shape[:2], dtype=torch.bool)
    groups = [Views(torch.empty(0), boxes[:2], flipped[:2]), Views(torch.empty(0), boxes[2:], flipped[2:])]
    method = build(CloveSettings(projector_hidden=8))
    for i, distance in enumerate(g["pos_ratio"]):
        method.settings = dataclasses.replace(method.settings, match_distance=float(distance))
        large = cells("global_predictions", 2).requires_grad_()
        small = cells("local_predictions", 6).requires_grad_()
        target = cells("global_targets", 2)
        loss, _ = method.loss(groups, [(large, (7, 7)), (small, (3, 3))], target, (7, 7))
        loss.backward()
        assert float(loss.detach()) == pytest.approx(float(g["loss"][i]), rel=1e-5)
        for ours, name, grid in ((large, "grad_global", (7, 7)), (small, "grad_local", (3, 3))):
            gradient = ours.grad.transpose(-2, -1).unflatten(-1, grid).flatten(0, 1).numpy()
            assert np.abs(gradient - g[name][i]).max() <= 1e-5 * np.abs(g[name][i]).max()


def golden_views(rng: np.random.Generator, batch: int) -> list[Views]:
    groups: list[list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = [[], []]
    for view in range(8):
        size, low, high = (160, 0.5, 0.9) if view < 2 else (96, 0.28, 0.5)
        pixels = rng.standard_normal((batch, 3, size, size)).astype(np.float32)
        side = rng.uniform(low, high, (batch, 2))
        xy = rng.uniform(0, 1, (batch, 2)) * (1 - side)
        box = np.concatenate([xy, xy + side], 1).astype(np.float32)
        flip = rng.uniform(size=batch) < 0.5
        box[flip] = box[flip][:, [2, 1, 0, 3]]
        groups[view >= 2].append((pixels, box, flip))
    return [
        Views(
            torch.from_numpy(np.stack([p for p, _, _ in group])).double(),
            torch.from_numpy(np.stack([b for _, b, _ in group])).double(),
            torch.from_numpy(np.stack([f for _, _, f in group])),
        )
        for group in groups
    ]


@pytest.mark.slow
def test_five_steps_of_training_equal_the_released_code_in_float64(golden, tmp_path):
    g = golden["clove_trajectory"]
    seed, batch = int(g["seed"]), int(g["batch"])
    settings = CloveSettings(global_size=160, attention="standard")
    method = Clove(create_backbone("resnet50"), settings).double()

    # The weights come in through the reader of released checkpoints, in their names and in float64.
    names = released_names(method, "clove")
    student = {
        theirs: golden_weight(theirs, method.state_dict()[ours].shape, seed)
        for ours, theirs in names.items()
        if ours.startswith("student.")
    }
    copies = {
        theirs: student[theirs.replace("encoder_k.", "encoder.").replace("projector_k.", "projector.")]
        for ours, theirs in names.items()
        if ours.startswith("teacher.")
    }
    torch.save({"model": {f"module.{k}": v for k, v in (student | copies).items()}, "epoch": 0}, tmp_path / "ckpt.pth")
    method.load_state_dict(read_released(tmp_path / "ckpt.pth").tensors)

    optimizer = LARS(parameter_groups(method, float(g["weight_decay"])), lr=0.0)
    for step, (lr, momentum) in enumerate(zip(g["lr"], g["momentum"], strict=True)):
        method.begin_step(float(momentum), epoch=0.0)
        loss, _ = method(golden_views(np.random.default_rng([seed, 1000 + step]), batch))
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = float(lr)
        optimizer.step()
        assert float(loss.detach()) == pytest.approx(float(g["loss"][step]), abs=1e-7)

    final = {
        names[ours]: tensor for ours, tensor in method.state_dict().items() if not ours.endswith("num_batches_tracked")
    }
    assert set(final) == set(g["names"].tolist())
    for name, norm, mean in zip(g["names"].tolist(), g["norm"], g["mean"], strict=True):
        assert float(final[name].norm()) == pytest.approx(float(norm), rel=1e-6), name
        root_mean_square = float(norm) / final[name].numel() ** 0.5
        assert float(final[name].mean()) == pytest.approx(float(mean), abs=1e-6 * root_mean_square), name


# ---- behavior ---------------------------------------------------------------------------------------------------


def step(method: Clove, views: list[Views]) -> torch.Tensor:
    loss, logs = method(views)
    assert loss.isfinite()
    assert {"embedding_spread", "positive_cosine", "negative_cosine"} <= logs.keys()
    assert all(value.isfinite() and not value.requires_grad for value in logs.values())
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention": "standard"},
        {"loss": "per_pair"},
        {"loss": "l2"},
        {"negatives": "inter"},
        {"negatives": "inter_avg"},
        {"local_views": 0},
        {"global_views": 1},
        {"global_views": 3, "local_views": 1},
        {"local_size": 128},
        {"global_size": 160, "local_size": 96},
    ],
    ids=str,
)
def test_every_setting_trains_the_student_and_nothing_else(changes):
    settings = dataclasses.replace(SMALL, **changes)
    method = build(settings)
    step(method, random_views(settings, batch=3))
    for name, parameter in method.named_parameters():
        trained = name.startswith("student.")
        assert parameter.requires_grad == trained, name
        assert (parameter.grad is not None) == trained, name
        if trained:
            assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("model", ["resnet18", "resnet50", "convnext_atto", "regnetx_002", "mobilenetv3_small_050"])
def test_other_families_of_timm_train_too(model):
    method = build(model=model)
    step(method, random_views(SMALL, batch=2))
    asking = [name for name, p in method.student.named_parameters() if p.requires_grad and p.grad is None]
    assert asking == []  # distributed training would wait for these for ever


def test_a_channels_last_backbone_of_timm_gives_its_map_channels_first():
    torch.manual_seed(0)
    backbone = create_backbone("swin_tiny_patch4_window7_224")
    assert feature_shape(backbone, 224) == (768, 7, 7)


def test_the_teacher_moves_by_exactly_the_momentum():
    method = build()
    with torch.no_grad():
        for parameter in method.student.parameters():
            parameter.add_(torch.randn_like(parameter))
    before = {name: p.clone() for name, p in method.teacher.named_parameters()}
    method.begin_step(0.9, epoch=0.0)
    students = dict(method.student.named_parameters())
    for name, parameter in method.teacher.named_parameters():
        assert torch.allclose(parameter, 0.9 * before[name] + 0.1 * students[name], atol=1e-6)
    after = {name: p.clone() for name, p in method.teacher.named_parameters()}
    method.begin_step(1.0, epoch=0.0)
    assert all(torch.equal(p, after[name]) for name, p in method.teacher.named_parameters())


def test_the_teacher_keeps_batch_norm_statistics_of_its_own():
    method = build()
    step(method, random_views(SMALL, batch=3))
    student, teacher = (method.get_submodule(f"{part}.projector.bn1") for part in ("student", "teacher"))
    assert int(student.num_batches_tracked) == 2  # a forward pass for each size of view
    assert int(teacher.num_batches_tracked) == 1  # global views alone
    before = teacher.running_mean.clone()
    method.begin_step(0.5, epoch=0.0)
    assert torch.equal(teacher.running_mean, before)


def test_a_view_never_meets_itself():
    """With the same box for all views every pair matches perfectly; only pairs of different views may count."""
    settings = dataclasses.replace(SMALL, local_views=0, global_views=2, match_distance=0.1, loss="l2")
    method = build(settings)
    boxes = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(2, 1, 4)
    views = [Views(torch.empty(0), boxes, torch.zeros(2, 1, dtype=torch.bool))]
    cells = torch.nn.functional.normalize(torch.randn(2, 1, 16, 16), dim=-1)
    own, _ = method.loss(views, [(cells, (4, 4))], cells, (4, 4))
    expected = (cells[0] - cells[1]).square().sum(-1).mean()
    assert float(own) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("negatives", ["inter", "inter_avg"])
def test_the_queue_takes_in_the_newest_teacher_embeddings(negatives):
    settings = dataclasses.replace(SMALL, negatives=negatives, queue=10)  # 2 views x 3 images: it wraps
    method = build(settings)
    views = random_views(settings, batch=3)
    for seed in range(3):
        before = method.queue.clone()
        start = int(method.queue_start)
        torch.manual_seed(seed)
        method(views)
        places = [(start + i) % 10 for i in range(6)]
        with torch.no_grad():
            cells = method.embed(views[0].pixels)[0].flatten(0, 1)  # (6, N, C); batch norm is in training mode
        for i, place in enumerate(places):
            if negatives == "inter":
                assert any(torch.allclose(method.queue[place], cell, atol=1e-6) for cell in cells[i])
            else:
                mean = cells[i].mean(0)
                assert torch.allclose(method.queue[place], mean / mean.norm(), atol=1e-6)
        untouched = [i for i in range(10) if i not in places]
        assert torch.equal(method.queue[untouched], before[untouched])
        assert int(method.queue_start) == (start + 6) % 10


def test_negatives_of_other_images_come_from_the_queue_alone():
    settings = dataclasses.replace(SMALL, negatives="inter", margin=0.0, positive_weight=0.0, hard_negatives=4)
    method = build(settings)
    views = random_views(settings, batch=2)
    cells = torch.nn.functional.normalize(torch.randn(2, 2, 16, 16), dim=-1)
    few = torch.nn.functional.normalize(torch.randn(3, 2, 4, 16), dim=-1)
    loss, _ = method.loss(views, [(cells, (4, 4)), (few, (2, 2))], cells, (4, 4))

    # With no margin and no positive part a term is max(0, 2 * mean of the 2nd to 4th largest cosines).
    def term(view: torch.Tensor) -> torch.Tensor:
        top = (view @ method.queue.T).topk(4).values[..., 1:].mean((-1, -2))  # (B)
        return (2 * top).relu()

    expected = torch.stack([term(cells[0]), term(cells[1])] + [term(v) for v in few for _ in range(2)]).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_the_loss_falls_on_a_small_fixed_set():
    method = build(dataclasses.replace(SMALL, margin=100.0))
    views = random_views(SMALL, batch=4)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    losses = []
    for _ in range(12):
        method.begin_step(0.99, epoch=0.0)
        optimizer.zero_grad()
        losses.append(float(step(method, views)))
        optimizer.step()
    assert losses[-1] < losses[0] - 0.3


def test_half_precision_leaves_the_loss_in_float32():
    method = build()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = method(random_views(SMALL, batch=2))
    assert loss.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "linear"}, "method.attention='linear': choose one of normalized, standard"),
        ({"hard_negatives": 1}, "method.hard_negatives=1: must be at least 2"),
        ({"match_distance": 0.0}, "method.match_distance=0.0: must be above 0"),
        ({"attention_heads": 3}, "heads=3 does not divide the feature dimension 16"),
        ({"hard_negatives": 17}, "4x4 = 16 cells, fewer than method.hard_negatives=17"),
        ({"global_views": 1, "local_views": 0}, "leaves no second view"),
        ({"global_scale": (0.5, 0.2)}, "scale"),
    ],
)
def test_settings_that_cannot_work_are_named(changes, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        build(dataclasses.replace(SMALL, **changes))


def test_the_views_are_those_of_the_released_code():
    spec = Clove(create_backbone("resnet18"), CloveSettings(projector_hidden=8)).view_spec
    assert [view.size for view in spec.views] == [224, 224] + [96] * 6
    assert [view.blur for view in spec.views] == [1.0, 0.1] + [0.5] * 6
    assert [view.solarize for view in spec.views] == [0.0, 0.2] + [0.0] * 6
    assert all(view.gray == 0.2 and view.flip == 0.5 for view in spec.views)
    assert all(view.jitter == Jitter(0.4, 0.4, 0.2, 0.1, 0.8) for view in spec.views)
