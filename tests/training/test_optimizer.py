import copy

import numpy as np
import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from clove_hub.training.optimizer import LARS, OF_TIMM, OWN, make_optimizer, norms, parameter_groups, set_rates
from clove_hub.training.recipe import load
from clove_hub.training.run import checkpoints
from clove_hub.training.schedule import weight_decay
from clove_hub.training.settings import OptimizerSettings


def test_lars_follows_the_recorded_steps_of_the_released_code(golden):
    g = golden["lars"]
    module = nn.Module()
    for name in "wcbz":
        setattr(module, name, nn.Parameter(torch.from_numpy(g[f"init_{name}"].copy())))
    optimizer = LARS(
        parameter_groups(module, float(g["weight_decay"])),
        lr=0.0,
        momentum=float(g["momentum"]),
        trust=float(g["trust_coefficient"]),
        eps=float(g["eps"]),
    )
    for step, lr in enumerate(g["lr"]):
        for name in "wcbz":
            getattr(module, name).grad = torch.from_numpy(g[f"grad_{name}"][step].copy())
        for group in optimizer.param_groups:
            group["lr"] = float(lr)
        optimizer.step()
        for name in "wcbz":
            expected = g[f"param_{name}"][step]
            ours = getattr(module, name).detach().numpy()
            assert np.abs(ours - expected).max() <= 1e-5 * np.abs(expected).max(), (name, step)


def random_parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    parameters = [
        nn.Parameter(torch.randn(4, 3, generator=generator)),
        nn.Parameter(torch.randn(5, generator=generator)),
    ]
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)
    return parameters


def test_an_open_gate_changes_nothing():
    free, gated = random_parameters(), random_parameters()
    LARS([{"params": free}], lr=0.1, weight_decay=0.1).step()
    optimizer = LARS([{"params": gated}], lr=0.1, weight_decay=0.1)
    optimizer.gate = torch.tensor(True)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(free, gated, strict=True))


def test_a_closed_gate_keeps_the_weights_whatever_the_gradients_hold():
    parameters = random_parameters()
    optimizer = LARS([{"params": parameters}], lr=0.1, weight_decay=0.1)
    optimizer.gate = torch.tensor(True)
    optimizer.step()
    before = [p.detach().clone() for p in parameters]
    optimizer.gate = torch.tensor(False)
    for bad in (float("nan"), float("inf"), 1.0):
        for p in parameters:
            p.grad = torch.full_like(p, bad)
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))


def test_without_eps_a_gradient_of_zero_is_left_as_it_is():
    parameters = random_parameters()
    before = parameters[0].detach().clone()
    parameters[0].grad = torch.zeros_like(parameters[0])
    LARS([{"params": parameters}], lr=0.1, eps=0.0).step()
    assert torch.equal(parameters[0], before)
    assert all(p.isfinite().all() for p in parameters)


def test_biases_and_norms_neither_decay_nor_adapt():
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2))
    module[2].weight.requires_grad_(False)
    decayed, plain = parameter_groups(module, 0.1)
    assert [p.ndim for p in decayed["params"]] == [4]
    assert decayed["weight_decay"] == 0.1
    assert decayed["adapt"]
    assert all(p.ndim == 1 for p in plain["params"])
    assert len(plain["params"]) == 4
    assert plain["weight_decay"] == 0
    assert not plain["adapt"]


def test_a_step_that_overflowed_in_float16_is_left_out_even_if_it_is_the_first():
    parameters = random_parameters()
    optimizer = LARS([{"params": parameters}], lr=0.1)
    optimizer.gate = torch.tensor(True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))  # makes the scale, as a backward pass does
    before = [p.detach().clone() for p in parameters]
    good = [p.grad.clone() for p in parameters]

    parameters[0].grad = torch.full_like(parameters[0], float("inf"))
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    assert scaler.get_scale() == 2

    for p, gradient in zip(parameters, good, strict=True):
        p.grad = gradient * scaler.get_scale()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    free = random_parameters()
    LARS([{"params": free}], lr=0.1).step()
    assert all(torch.equal(p, f) for p, f in zip(parameters, free, strict=True))


def test_norms_are_those_of_float64_in_any_memory_format():
    torch.manual_seed(0)
    tensors = [
        torch.rand(64, 32, 3, 3),
        torch.rand(64, 32, 3, 3).to(memory_format=torch.channels_last),
        torch.rand(2**21),
        torch.rand(2**23) + 1,  # far from zero: a sum without pairing errs by 1e-3
    ]
    tensors.append(torch.rand(8, 100)[4:])  # a part of a larger memory, as gradients in a bucket are
    for tensor, norm in zip(tensors, norms(tensors), strict=True):
        assert float(norm) == pytest.approx(float(tensor.double().norm()), rel=2e-7)


def test_without_adaptation_it_is_torchs_sgd_with_decay_on_everything():
    """MoCo's optimizer: biases and norms decay too, nothing adapts."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    theirs = copy.deepcopy(ours)
    optimizers = [
        LARS(parameter_groups(ours, 1e-2, adapt=False, decay_all=True), lr=0.1, momentum=0.9),
        torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2),
    ]
    for _ in range(4):
        x = torch.randn(5, 4)
        for module, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


# ---- those of timm, and who gets which rate --------------------------------------------------------------------------


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 4))


def stepped(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    generator = torch.Generator().manual_seed(1)
    pixels, wanted = torch.randn(6, 3, 8, 8, generator=generator), torch.randn(6, 4, generator=generator)
    losses = []
    for step in steps:
        set_rates(optimizer, 0.01 / (1 + step), weight_decay=0.1 / (1 + step))
        optimizer.zero_grad()
        loss = (module(pixels) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", [*OWN, *OF_TIMM])
def test_it_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(name, tmp_path):
    chosen = OptimizerSettings(name=name, weight_decay=0.1)
    module = small_network()
    optimizer = make_optimizer(module, chosen)
    stepped(module, optimizer, range(3))
    folder = tmp_path / "step_00000003"
    checkpoints.write(folder, 3, checkpoints.state_tensors(module, optimizer), {})
    again = small_network()
    other = make_optimizer(again, chosen)
    checkpoints.restore(folder, again, other)
    assert stepped(module, optimizer, range(3, 6)) == stepped(again, other, range(3, 6))
    assert all(
        torch.equal(a, b) for a, b in zip(module.state_dict().values(), again.state_dict().values(), strict=True)
    )


def test_adamw_is_torchs_with_the_decay_of_weights_alone():
    ours, theirs = small_network(), small_network()
    chosen = OptimizerSettings(name="adamw", weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6)
    weights, rest = ([p for p in theirs.parameters() if (p.ndim > 1) == more] for more in (True, False))
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-6)
    reference.param_groups[0] |= {"scale": 1.0, "decays": True}
    reference.param_groups[1] |= {"scale": 1.0, "decays": False}
    assert stepped(ours, make_optimizer(ours, chosen), range(4)) == stepped(theirs, reference, range(4))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto", "resnet18"])
def test_layers_have_the_rates_that_timm_gives_them(name):
    backbone = timm.create_model(name, num_classes=0)
    method = nn.ModuleDict({"backbone": backbone, "head": nn.Linear(4, 4)})
    chosen = OptimizerSettings(name="adamw", layer_decay=0.7, backbone_rate=0.5, weight_decay=0.05)
    optimizer = make_optimizer(method, chosen, {"backbone.": backbone})
    set_rates(optimizer, 1.0)
    found = {p: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    no_decay = backbone.no_weight_decay() if hasattr(backbone, "no_weight_decay") else ()
    for group in param_groups_layer_decay(backbone, 0.05, no_decay, layer_decay=0.7):
        for parameter in group["params"]:
            assert found.pop(parameter) == pytest.approx((0.5 * group["lr_scale"], group["weight_decay"]))
    assert list(found.values()) == [(1.0, 0.05), (1.0, 0.0)]


def test_the_weight_decay_moves_along_half_a_cosine():
    chosen = load(
        "clove_r50_in1k_200ep", ["data.path=.", "optimizer.weight_decay=0.04", "schedule.final_weight_decay=0.4"]
    )
    assert weight_decay(0, 100, chosen) == pytest.approx(0.04)
    assert weight_decay(50, 100, chosen) == pytest.approx(0.22)
    assert weight_decay(100, 100, chosen) == pytest.approx(0.4)
    assert weight_decay(50, 100, load("clove_r50_in1k_200ep", ["data.path=."])) is None
