"""PixPro against its equations, written out cell by cell in float64, and beside CLoVE."""

import dataclasses

import pytest
import torch

from clove_hub.backbones import create_backbone
from clove_hub.heads import PixelPropagation, dense_projector
from clove_hub.methods import Clove, CloveSettings, Pixpro, PixproSettings
from clove_hub.views import Jitter, Views

SMALL = PixproSettings(global_size=96, projector_hidden=32, feature_dim=16)


def build(**changes) -> Pixpro:
    torch.manual_seed(0)
    return Pixpro(create_backbone("test_resnet"), dataclasses.replace(SMALL, **changes))


def random_boxes(batch: int, seed: int = 0) -> torch.Tensor:
    """(2, B, 4) in float64; some flipped, and the last image's two views far apart."""
    generator = torch.Generator().manual_seed(seed)
    side = 0.4 + 0.3 * torch.rand(2, batch, 2, generator=generator, dtype=torch.float64)
    low = torch.rand(2, batch, 2, generator=generator, dtype=torch.float64) * (1 - side)
    boxes = torch.cat([low, low + side], -1)
    boxes[0, ::2] = boxes[0, ::2][:, [2, 1, 0, 3]]
    boxes[0, -1] = torch.tensor([0.0, 0.0, 0.2, 0.2])
    boxes[1, -1] = torch.tensor([0.8, 0.8, 1.0, 1.0])
    return boxes


def unit_cells(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def naive_loss(boxes, prediction, target, grid, distance: float) -> float:
    """Equations 1 and 5, both directions, one pair of cells after the other."""
    height, width = grid
    total = 0.0
    for one, other in ((0, 1), (1, 0)):
        for image in range(prediction.shape[1]):
            sides = []
            for view in (one, other):
                x0, y0, x1, y1 = boxes[view, image].tolist()
                cell = ((x1 - x0) / width, (y1 - y0) / height)
                centers = [
                    (x0 + (c + 0.5) * cell[0], y0 + (r + 0.5) * cell[1]) for r in range(height) for c in range(width)
                ]
                sides.append((centers, (cell[0] ** 2 + cell[1] ** 2) ** 0.5))
            (a, a_diagonal), (b, b_diagonal) = sides
            cosines = [
                float(prediction[one, image, i] @ target[other, image, j])
                for i, (ax, ay) in enumerate(a)
                for j, (bx, by) in enumerate(b)
                if ((ax - bx) ** 2 + (ay - by) ** 2) ** 0.5 / max(a_diagonal, b_diagonal) < distance
            ]
            if cosines:
                total += -2 * sum(cosines) / len(cosines) / prediction.shape[1]
    return total


@pytest.mark.parametrize("distance", [0.5, 0.7])
@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_the_loss_is_that_of_the_equations(grid, distance):
    boxes = random_boxes(5)
    prediction, target = (unit_cells(2, 5, grid[0] * grid[1], 16, seed=seed) for seed in (1, 2))
    loss, logs = build(match_distance=distance).loss(boxes, prediction, target, grid)
    # matched_mean divides by the number of pairs plus 1e-6.
    assert float(loss) == pytest.approx(naive_loss(boxes, prediction, target, grid, distance), rel=1e-5)
    assert 0 < float(logs["matched_cells"]) < 1


@pytest.mark.parametrize("sharpness", [1.0, 2.0])
def test_propagation_is_the_sum_over_similar_cells(sharpness):
    torch.manual_seed(0)
    module = PixelPropagation(8, sharpness).double()
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    weight, bias = module.value_transform.weight, module.value_transform.bias
    expected = torch.zeros_like(x)
    for b in range(2):
        for i in range(6):
            for j in range(6):
                similarity = torch.dot(x[b, i], x[b, j]) / (x[b, i].norm() * x[b, j].norm())
                value = weight @ x[b, j] + bias
                expected[b, i] += similarity.clamp(min=0) ** sharpness * value / value.norm()
    assert torch.allclose(module(x), expected, rtol=1e-12)


def test_the_whole_forward_pass_is_the_equations():
    """Backbone maps through projector, propagation and matching, with the instance branch, written out."""
    method = build(instance_weight=0.5).double().eval()
    boxes = random_boxes(3)
    pixels = torch.randn(2, 3, 3, 96, 96, dtype=torch.float64)
    with torch.no_grad():
        for parameter in method.teacher.parameters():
            parameter.mul_(1.1)
        loss, logs = method([Views(pixels, boxes, torch.zeros(2, 3, dtype=torch.bool))])
        unit = torch.nn.functional.normalize
        cosines, predictions, targets = [], [], []
        for view in range(2):
            maps = method.student["backbone"].forward_features(pixels[view])
            projected = method.student["projector"](maps).flatten(2).mT
            predictions.append(unit(method.student["predictor"](projected), dim=-1))
            targets.append(
                unit(method.teacher["projector"](method.teacher["backbone"].forward_features(pixels[view])), dim=1)
            )
            instance = method.student["instance_predictor"](method.student["instance_projector"](maps))
            other = method.teacher["backbone"].forward_features(pixels[1 - view])
            other = method.teacher["instance_projector"](other)
            cosines.append((unit(instance.mean((2, 3))) * unit(other.mean((2, 3)))).sum(-1))
    grid = tuple(targets[0].shape[2:])
    dense = naive_loss(boxes, torch.stack(predictions), torch.stack(targets).flatten(3).mT, grid, 0.7)
    instance = -2 * (cosines[0] + cosines[1]).mean()
    assert float(loss) == pytest.approx(dense + 0.5 * float(instance), rel=1e-5)
    assert float(logs["instance_cosine"]) == pytest.approx(float(torch.stack(cosines).mean()))


def test_cloves_predictor_swapped_for_propagation_is_pixpro():
    """The two share matching and averaging: CLoVE with BYOL's regression is 2 - 2 cos, the mean of two directions.

    With fixed statistics: in training CLoVE's views share those of a batch, and PixPro's each have their own.
    """
    pixpro = build(feature_dim=16)
    settings = CloveSettings(
        global_size=96, local_views=0, projector_hidden=32, feature_dim=16, attention_heads=4, loss="l2"
    )
    torch.manual_seed(0)
    clove = Clove(create_backbone("test_resnet"), settings)
    clove.student["predictor"] = pixpro.student["predictor"]
    for part in ("student", "teacher"):
        getattr(clove, part)["backbone"] = getattr(pixpro, part)["backbone"]
        getattr(clove, part)["projector"] = getattr(pixpro, part)["projector"]
    boxes = random_boxes(4)[:, :3].float()  # images whose views overlap: CLoVE's loss of one without is zero, not 2
    views = [Views(torch.randn(2, 3, 3, 96, 96), boxes, torch.zeros(2, 3, dtype=torch.bool))]
    ours, logs = pixpro.eval()(views)
    theirs, clove_logs = clove.eval()(views)
    assert float(ours.detach()) == pytest.approx(2 * float(theirs.detach()) - 4, abs=1e-4)
    for name in ("positive_cosine", "matched_cells", "embedding_spread"):
        assert float(logs[name]) == pytest.approx(float(clove_logs[name]), abs=1e-5)  # means of cosines near 0


def test_the_instance_branch_adds_its_parts_and_only_when_asked_for():
    assert set(build().student) == {"backbone", "projector", "predictor"}
    with_it = build(instance_weight=1.0)
    assert set(with_it.student) == {"backbone", "projector", "predictor", "instance_projector", "instance_predictor"}
    assert set(with_it.teacher) == {"backbone", "projector", "instance_projector"}


def test_the_projector_has_biases_and_ends_without_a_norm():
    projector = dense_projector(8, 16, 4, biased=True)
    assert list(projector._modules) == ["linear1", "bn1", "relu1", "linear2"]
    assert projector.linear1.bias is not None
    assert projector.linear2.bias is not None


def test_the_views_are_those_of_the_released_code():
    first, second = build(global_size=96).view_spec.views
    assert first.scale == second.scale == (0.08, 1.0)
    assert (first.blur, first.solarize) == (1.0, 0.0)
    assert (second.blur, second.solarize) == (0.1, 0.2)
    assert first.jitter == second.jitter == Jitter(0.4, 0.4, 0.2, 0.1, 0.8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sharpness": 0.0}, "method.sharpness=0.0: must be above 0"),
        ({"match_distance": -1.0}, "method.match_distance=-1.0: must be above 0"),
        ({"instance_weight": -0.1}, "method.instance_weight=-0.1: must be at least 0"),
        ({"global_scale": (0.5, 0.2)}, "scale"),
    ],
)
def test_settings_that_cannot_work_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)
