import dataclasses
import zlib

import numpy as np
import pytest
import torch
from clove_hub.training.optimizer import LARS, parameter_groups

from clove_hub.backbones import create_backbone
from clove_hub.methods import Clove, CloveSettings
from clove_hub.views import Views
from clove_hub.zoo.released import CLOVE_PARTS, read_released

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


def build(settings: CloveSettings = SMALL, model: str = "resnet18") -> Clove:
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
    for i, distance in enumerate(g["pos_ratio"]):
        method = build(dataclasses.replace(CloveSettings(projector_hidden=8), match_distance=float(distance)))
        large = cells("global_predictions", 2).requires_grad_()
        small = cells("local_predictions", 6).requires_grad_()
        target = cells("global_targets", 2)
        loss, _ = method.loss(groups, [(large, (7, 7)), (small, (3, 3))], target, (7, 7))
        loss.backward()
        assert float(loss.detach()) == pytest.approx(float(g["loss"][i]), rel=1e-5)
        for ours, name, grid in ((large, "grad_global", (7, 7)), (small, "grad_local", (3, 3))):
            gradient = ours.grad.transpose(-2, -1).unflatten(-1, grid).flatten(0, 1).numpy()
            assert np.abs(gradient - g[name][i]).max() <= 1e-5 * np.abs(g[name][i]).max()


def released_names(method: Clove) -> dict[str, str]:
    """Our name of each tensor of a full state -> the released one, without `module.`."""
    return {
        ours: theirs + ours[len(prefix) :]
        for ours in method.state_dict()
        for theirs, prefix in CLOVE_PARTS.items()
        if ours.startswith(prefix)
    }


def golden_weight(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if name.endswith("num_batches_tracked"):
        return torch.zeros((), dtype=torch.long)
    if len(shape) > 1:
        value = rng.standard_normal(tuple(shape)) * np.sqrt(2 / np.prod(shape[1:]))
    elif name.endswith("running_mean"):
        value = np.zeros(shape)
    elif name.endswith("running_var"):
        value = np.ones(shape)
    elif name.endswith("weight"):
        value = rng.uniform(0.5, 1.5, tuple(shape))
    else:
        value = rng.standard_normal(tuple(shape)) * 0.1
    return torch.from_numpy(value.astype(np.float32)).double()


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


def test_five_steps_of_training_equal_the_released_code_in_float64(golden, tmp_path):
    g = golden["clove_trajectory"]
    seed, batch = int(g["seed"]), int(g["batch"])
    settings = CloveSettings(global_size=160, attention="standard")
    method = Clove(create_backbone("resnet50"), settings).double()

    # The weights come in through the reader of released checkpoints, in their names and in float64.
    names = released_names(method)
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
        method.refresh_teacher(float(momentum))
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
