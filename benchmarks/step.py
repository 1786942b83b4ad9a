"""One training step, and its parts: `python -m benchmarks.step [--reference CLONE]`.

Loss with matching; LARS and the teacher's moving average; the whole step with and without channels_last and on views
that are ready. The released step gets ready views; ours makes them on the device, as it does in training. Photos are not
needed: the crops are made up.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from clove_hub.backbones import feature_shape
from clove_hub.training.optimizer import LARS
from clove_hub.training.recipe import Recipe
from clove_hub.training.step import TrainState
from clove_hub.views import Views

from . import report
from .measure import Sample, by_turns, timed
from .released import Released, ReleasedStep, open_released, tried_convolutions
from .setting import arguments, command, made_crops, make_accelerator, positive, settings, sized
from .train_state import (
    MOMENTUM,
    RATE,
    bare_backbones,
    make_train_state,
    peak_memory,
    roofline,
    several,
    shares,
    step,
    step_on,
)

TUNED = "cudnn.benchmark=true"


def main(given: list[str] | None = None) -> None:
    parser = arguments("step", "Measures the training step and its parts.", data=False)
    parser.add_argument(
        "--loss-batch", type=int, help="images of the loss alone (default: 32 on a CPU, else batch.total)"
    )
    parser.add_argument("--steps", type=int, help="steps of a turn (default: 1 on a CPU, 5 on a GPU)")
    parser.add_argument(
        "--variant",
        action="append",
        default=None,
        metavar="section.key=value",
        help="also measure the step with this change (default: run.channels_last=false)",
    )
    options = parser.parse_args(given)
    steps = options.steps or (1 if options.device == "cpu" else 5)
    recipe = sized(options)
    loss_batch = options.loss_batch or (32 if options.device == "cpu" else recipe.batch.total)
    positive([("--rounds", options.rounds), ("--steps", steps), ("--loss-batch", loss_batch)])
    variants = {change: sized(options, change) for change in options.variant or ["run.channels_last=false"]}
    accelerator = make_accelerator(recipe, options.device)
    device = accelerator.device
    train_state = make_train_state(recipe, accelerator)
    spec = train_state.method.view_spec
    released = open_released(options.reference, spec)
    released_step = ReleasedStep(released, recipe, device) if released else None

    rows = []
    # ---- the parts -----------------------------------------------------------------------------------------------
    sides, losses = loss_sides(train_state, released, recipe, loss_batch)
    seconds = by_turns({name: timed(side, device) for name, side in sides.items()}, 3 * options.rounds)
    rows.append(report.milliseconds(f"loss with matching, there and back, batch {loss_batch}", seconds))

    crops = made_crops(spec, recipe.batch.total).to(device)
    views = train_state.make_views(crops)
    parts: dict[str, Callable[[], object]] = {
        "views": lambda: train_state.make_views(crops),
        "loss": loss_sides(train_state, None, recipe, recipe.batch.total)[0]["ours"],
        "predictor": predictor(train_state, recipe.batch.total),
    }
    alone = {name: by_turns({name: timed(part, device)}, options.rounds)[name] for name, part in parts.items()}

    seconds = by_turns(update_sides(train_state, released_step), 3 * options.rounds)
    rows.append(report.milliseconds("LARS and the teacher's average", seconds))

    # ---- the whole step ------------------------------------------------------------------------------------------
    bare = bare_backbones(train_state, views)
    train_states = {change: make_train_state(variant, accelerator) for change, variant in variants.items()}
    whole: dict[str, Callable[[], object]] = {
        "ours": lambda: step(train_state, crops),
        "ready": lambda: step_on(train_state, views, crops),
        **{change: partial(step, other, crops) for change, other in train_states.items()},
        "bare": bare,
    }
    if device.type == "cuda":  # the released code has it on, the product leaves it as it is
        whole[TUNED] = partial(tuned, partial(step, train_state, crops))
    if released_step:
        images, boxes = as_released(views)
        whole["released"] = lambda: released_step(images, boxes, RATE, MOMENTUM)
    seconds = by_turns({name: several(side, device, steps) for name, side in whole.items()}, options.rounds)
    batch = recipe.batch.total
    rows.append(report.images_per_second(f"whole step, batch {batch}, {recipe.run.precision}", seconds, batch))
    rows.append(report.images_per_second("  on ready views", seconds, batch, "ready"))
    rows += [
        report.images_per_second(f"  with {change}", seconds, batch, change)
        for change in (*train_states, TUNED)
        if change in seconds
    ]
    limit = {"ours": seconds["bare"]}
    rows.append(report.images_per_second("bare backbones, ready views (the limit)", limit, batch))
    memory = {name: peak_memory(side, device) for name, side in whole.items()}

    # ---- where the time goes -------------------------------------------------------------------------------------
    whole_step = statistics.median(seconds["ours"])
    ranges = shares(whole["ours"], device, max(3, steps))
    rates = {name: batch / statistics.median(seconds[name]) for name in ("ours", "bare")}
    assert all(bool(one.finite) for one in (train_state, *train_states.values())), (
        "a step that is not finite is not a step"
    )
    part_shares = {name: statistics.median(values) / whole_step for name, values in alone.items()}
    print_shares("share of the step, by its ranges:   ", ranges)
    print_shares("measured alone, there and back:     ", part_shares)
    roof = roofline(train_state, rates["ours"], rates["bare"], memory["ours"], options.rounds)
    report.write(
        options.name,
        device,
        rows,
        settings(recipe, spec, loss_batch=loss_batch, steps=steps, rounds=options.rounds),
        options.reference,
        options.results,
        ranges=ranges,
        parts=part_shares,
        roofline=roof,
        peak_memory_gb=memory,
        losses=losses,
    )


def tuned(action: Callable[[], object]) -> None:
    with tried_convolutions():
        action()


# ---- the sides -------------------------------------------------------------------------------------------------------


def loss_sides(
    train_state: TrainState, released: Released | None, recipe: Recipe, batch: int
) -> tuple[dict[str, Callable[[], object]], dict[str, float]]:
    """Loss with matching, forward and backward, from embeddings of random cells; and what each says it is."""
    method, device = train_state.method, train_state.accelerator.device
    boxes = [group.to(device) for group in made_crops(method.view_spec, batch).boxes]
    channels = method.settings.feature_dim
    grids = [grid_of(train_state, view) for view in sizes(train_state)]
    torch.manual_seed(0)
    maps = [  # (V * B, C, H, W), of unit length over the channels
        F.normalize(torch.randn(len(box) * batch, channels, *grid, device=device), dim=1)
        for box, grid in zip(boxes, grids, strict=True)
    ]
    large = method.settings.global_views
    targets = F.normalize(torch.randn(large * batch, channels, *grids[0], device=device), dim=1)

    def cells(x: Tensor, views: int) -> Tensor:
        """(V * B, C, H, W) -> (V, B, N, C)."""
        return x.flatten(2).transpose(1, 2).reshape(views, batch, -1, channels).contiguous()

    ours = [cells(one, len(box)).requires_grad_() for one, box in zip(maps, boxes, strict=True)]
    target = cells(targets, large)
    views = [Views(torch.empty(0), box, torch.empty(0)) for box in boxes]

    def our_loss() -> Tensor:
        loss: Tensor = method.loss(views, list(zip(ours, grids, strict=True)), target, grids[0])[0]
        return loss

    forwards: dict[str, Callable[[], Tensor]] = {"ours": our_loss}
    theirs = [one.clone().requires_grad_() for one in maps]
    if released:
        criterion = released.loss.TripletLoss(method.settings.positive_weight, method.settings.match_distance)
        coordinates = [box for group in boxes for box in group]
        forwards["released"] = lambda: criterion(*theirs, targets, coordinates)

    inputs = {"ours": ours, "released": theirs}

    def there_and_back(name: str) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forwards[name](), inputs[name])

    values = {name: float(forward().detach()) for name, forward in forwards.items()}
    return {name: there_and_back(name) for name in forwards}, values


def sizes(train_state: TrainState) -> list[int]:
    spec = train_state.method.view_spec
    return [spec.views[group.start].size for group in spec.groups]


def grid_of(train_state: TrainState, size: int) -> tuple[int, int]:
    """Cells of the feature map of a view of `size` pixels."""
    _, height, width = feature_shape(train_state.method.student["backbone"], size)
    return height, width


def predictor(train_state: TrainState, batch: int) -> Callable[[], None]:
    """The predictor alone, forward and backward, on all views' cells."""
    method, device = train_state.method, train_state.accelerator.device
    cells = []
    for group, size in zip(method.view_spec.groups, sizes(train_state), strict=True):
        height, width = grid_of(train_state, size)
        count = (group.stop - group.start) * batch
        cells.append(torch.randn(count, height * width, method.settings.feature_dim, device=device, requires_grad=True))

    def action() -> None:
        with train_state.accelerator.autocast():
            out = [method.student["predictor"](one) for one in cells]
        torch.autograd.backward(out, [torch.ones_like(one) for one in out])
        method.student["predictor"].zero_grad()

    return action


def update_sides(train_state: TrainState, released: ReleasedStep | None) -> dict[str, Sample]:
    """The optimizer's step and the teacher's, on gradients that are made anew for each."""
    device = train_state.accelerator.device

    def fill(parameters: list[Tensor]) -> Callable[[], None]:
        gradients = [torch.randn_like(one) * 1e-3 for one in parameters]

        def before() -> None:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.clone()

        return before

    optimizer = train_state.optimizer
    assert isinstance(optimizer, LARS)
    if device.type != "cpu":  # as a step has it
        optimizer.gate = train_state.finite

    def ours() -> None:
        for group in optimizer.param_groups:
            group["lr"] = RATE
        optimizer.step()
        train_state.method.begin_step(MOMENTUM, 0.0)

    sides = {"ours": timed(ours, device, fill([p for p in train_state.method.parameters() if p.requires_grad]))}
    if released:

        def theirs() -> None:
            for group in released.optimizer.param_groups:
                group["lr"] = RATE
            released.optimizer.step()
            released.model._update_momentum_encoder(MOMENTUM)

        sides["released"] = timed(theirs, device, fill([p for p in released.model.parameters() if p.requires_grad]))
    return sides


def as_released(views: list[Views]) -> tuple[list[Tensor], list[Tensor]]:
    """Views as the released loader gives them: for each a batch of images and one of boxes, planes apart."""
    images = [view.contiguous() for group in views for view in group.pixels]
    return images, [box for group in views for box in group.boxes]


def print_shares(title: str, found: dict[str, float]) -> None:
    print(title + ", ".join(f"{name} {100 * share:.1f} %" for name, share in found.items()))


if __name__ == "__main__":
    command(main)
