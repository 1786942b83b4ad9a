"""One optimizer step: what it computes, and what becomes of one that went wrong."""

import pytest
import torch
import torchvision
from accelerate import Accelerator
from training_runs import TINY

from clove_hub.training import recipe
from clove_hub.training.step import TrainState, assemble, prepare, take_step
from clove_hub.views import CropBatch, allocate, draw, write_sample


@pytest.fixture
def train_state() -> TrainState:
    loaded = recipe.load("demo", [f"{key}={value}" for key, value in TINY.items()] + ["data.path=x"])
    train_state = assemble(loaded, Accelerator(cpu=True, mixed_precision="no"))
    prepare(train_state)
    return train_state


def crops(train_state: TrainState, seed: int, count: int = 4) -> CropBatch:
    spec = train_state.method.view_spec
    batch = allocate(spec, count)
    generator = torch.Generator().manual_seed(seed)
    for position in range(count):
        image = torch.randint(0, 256, (80, 100, 3), generator=generator, dtype=torch.uint8).numpy()
        write_sample(batch, position, image, draw(spec, seed, 0, position, 80, 100))
    return batch


def weights(train_state: TrainState) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in train_state.method.student.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def poison(train_state: TrainState) -> None:
    """Makes the loss of the steps to come NaN, as an overflow in the backbone would."""
    train_state.method.student["projector"].register_forward_hook(lambda module, args, out: out * float("nan"))


def test_a_step_moves_the_weights_and_tells_loss_and_norm(train_state):
    before = weights(train_state)
    logs = take_step(train_state, [crops(train_state, 0)], 1, rate=0.1, momentum=0.99, epoch=0.0)
    assert not same(before, weights(train_state))
    loss, norm = train_state.figures.tolist()
    assert loss == pytest.approx(100, abs=2)
    assert norm > 0
    assert bool(train_state.finite)
    assert logs["embedding_spread"].ndim == 0
    assert all(p.grad is None for p in train_state.method.parameters())


def test_deferring_the_decision_to_the_device_computes_the_same(train_state):
    state = {key: value.clone() for key, value in train_state.method.state_dict().items()}
    results = []
    for deferred in (False, True):
        train_state.method.load_state_dict(state)
        train_state.optimizer.state.clear()
        train_state.deferred, train_state.optimizer.gate = deferred, None
        for seed in range(3):
            take_step(train_state, [crops(train_state, seed)], 1, rate=0.1, momentum=0.99, epoch=0.0)
        results.append(weights(train_state))
    assert same(*results)


@pytest.mark.parametrize("deferred", [False, True])
def test_no_step_follows_a_loss_that_is_not_finite(train_state, deferred):
    train_state.deferred = deferred
    for seed in range(2):
        take_step(train_state, [crops(train_state, seed)], 1, rate=0.1, momentum=0.99, epoch=0.0)
    before = weights(train_state)
    poison(train_state)
    for seed in range(2, 5):  # the host has not looked yet
        take_step(train_state, [crops(train_state, seed)], 1, rate=0.1, momentum=0.99, epoch=0.0)
    assert same(before, weights(train_state))
    assert not bool(train_state.finite)
    assert int(train_state.steps) == 2  # the third was the first that went wrong
    assert train_state.figures.isnan().any()


def test_accumulation_averages_loss_and_gradient(train_state):
    """Two micro-batches of the same images are a step of those images."""
    state = {key: value.clone() for key, value in train_state.method.state_dict().items()}
    results = []
    for parts in (1, 2):
        train_state.method.load_state_dict(state)
        train_state.optimizer.state.clear()
        take_step(train_state, [crops(train_state, 0)] * parts, parts, rate=0.1, momentum=1.0, epoch=0.0)
        results.append((train_state.figures.clone(), weights(train_state)))
    (figures, one), (figures_of_two, two) = results
    assert torch.allclose(figures, figures_of_two, rtol=1e-5)
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)


def test_sgd_is_lars_that_adapts_nothing_and_may_decay_everything():
    overrides = [f"{key}={value}" for key, value in TINY.items()]
    chosen = ["optimizer.name=sgd", "optimizer.decay_all=true", "optimizer.weight_decay=1e-4", "data.path=x"]
    loaded = recipe.load("demo", [*overrides, *chosen])
    train_state = assemble(loaded, Accelerator(cpu=True, mixed_precision="no"))
    assert [group["adapt"] for group in train_state.optimizer.param_groups] == [False, False]
    assert [group["weight_decay"] for group in train_state.optimizer.param_groups] == [1e-4, 1e-4]


@pytest.mark.parametrize("zero", [True, False])
def test_the_first_scales_and_lars_eps_are_the_recipes(zero):
    """timm starts a residual branch at 0; torchvision, whose network MoCo trains, at 1, and all else as timm."""
    wanted = [f"backbone.zero_init_last={str(zero).lower()}", "optimizer.eps=0", "backbone.model=resnet18"]
    loaded = recipe.load("demo", [*(f"{key}={value}" for key, value in TINY.items()), *wanted, "data.path=x"])
    train_state = assemble(loaded, Accelerator(cpu=True, mixed_precision="no"))
    assert {group["eps"] for group in train_state.optimizer.param_groups} == {0.0}
    theirs = torchvision.models.resnet18(zero_init_residual=zero).state_dict()
    ours = train_state.method.student["backbone"].state_dict()
    for name, tensor in ours.items():
        if tensor.ndim == 1:
            assert torch.equal(tensor, theirs[name]), name
        elif tensor.ndim == 4:
            assert tensor.std() == pytest.approx(float(theirs[name].std()), rel=0.05), name
