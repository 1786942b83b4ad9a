"""SlotCon against the numbers of the released code, and against its equations written out."""

import multiprocessing
import os
import tempfile

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.nn import functional as F

from clove_hub import losses
from clove_hub.backbones import create_backbone
from clove_hub.geometry import resample, shared_region
from clove_hub.methods.slotcon import SlotCon, SlotConSettings, winners
from clove_hub.views import Views


@pytest.fixture
def recorded(golden):
    """A SlotCon with the recorded prototypes and centre, whose slots are predicted as they are; and the recording."""
    g = {key: torch.from_numpy(np.array(value)) for key, value in golden["slotcon_loss"].items()}
    method = SlotCon(
        create_backbone("test_resnet"),
        SlotConSettings(global_size=64, projector_hidden=8, feature_dim=16, prototypes=12),
    )
    method.student["predictor"] = nn.Identity()
    with torch.no_grad():
        method.student["prototypes"].weight.copy_(g["prototypes_student"])
        method.teacher["prototypes"].weight.copy_(g["prototypes_teacher"])
    method.center.copy_(g["center"])
    return method, g


def regions(g):
    """The recorded boxes, in which a flipped view is walked from right to left."""
    boxes = g["boxes"].clone()
    boxes[..., 0], boxes[..., 2] = (
        torch.where(g["flips"], g["boxes"][..., 2], g["boxes"][..., 0]),
        torch.where(g["flips"], g["boxes"][..., 0], g["boxes"][..., 2]),
    )
    return boxes


def close(found, expected):
    return (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_losses_gradients_and_centre_are_those_of_the_released_code(recorded):
    method, g = recorded
    inputs = [g[f"student_{view}"].clone().requires_grad_() for view in (1, 2)]
    student = [method.student["prototypes"](x) for x in inputs]
    teacher = [method.teacher["prototypes"](g[f"teacher_{view}"]) for view in (1, 2)]
    assert close(student[0][0], g["slots_student_1"])
    boxes = regions(g)
    assert close(resample(student[0][1], boxes[0]), g["aligned_student_1"])
    assert close(resample(teacher[0][1], boxes[0]), g["aligned_teacher_1"])

    shared = torch.ones(len(boxes[0]), dtype=torch.bool)
    group = method.aligned_group_loss([s for _, s in student], [t for _, t in teacher], boxes, shared)
    slot = method.slot_loss(*student[0], *teacher[1]) + method.slot_loss(*student[1], *teacher[0])
    method.update_centre([scores for _, scores in teacher])
    assert close(group, g["group_loss"])
    assert close(slot, g["slot_loss"])
    assert close(method.center, g["center_after"])
    loss = (group + slot) / 2
    assert close(loss, g["loss"])
    loss.backward()
    for view, x in enumerate(inputs, start=1):
        assert close(x.grad, g[f"grad_student_{view}"])


def test_a_view_and_its_mirror_image_share_the_same_region_of_the_image():
    """What two crops of one picture show of its shared part is the same picture, flipped or not."""
    side = 64
    ramp = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).double() / (side - 1)
    one, two = (8, 4, 40, 36), (20, 10, 60, 50)  # x0, y0, x1, y1 in pixels, the last included

    def view(box, flip):
        x0, y0, x1, y1 = box
        crop = ramp[:, y0 : y1 + 1, x0 : x1 + 1]
        corners = torch.tensor([x1, y0, x0, y1] if flip else [x0, y0, x1, y1], dtype=torch.float64) / (side - 1)
        return crop.flip(-1)[None] if flip else crop[None], corners[None]

    seen = []
    for flip in (False, True):
        (a, box_a), (b, box_b) = view(one, flip), view(two, not flip)
        (region_a, shared), (region_b, _) = shared_region(box_a, box_b), shared_region(box_b, box_a)
        assert shared.all()
        seen.append((resample(a, region_a), resample(b, region_b)))
    assert torch.allclose(seen[0][0], seen[1][0], atol=1e-9)
    assert torch.allclose(seen[0][1], seen[1][1], atol=1e-9)
    # The same shared part: both columns rise from left to right over the same range, but for half a pixel at the ends.
    for a, b in seen:
        middle = [x[0, 1, x.shape[2] // 2] for x in (a, b)]
        assert all((row.diff() >= 0).all() for row in middle)
        assert abs(float(middle[0].mean() - middle[1].mean())) < 1 / side


def test_views_that_share_nothing_are_seen_and_left_out(recorded):
    boxes = torch.tensor([[0.0, 0.0, 0.4, 0.4], [0.5, 0.5, 0.9, 0.9], [0.9, 0.1, 0.3, 0.6]])
    _, shared = shared_region(boxes, boxes[[1, 2, 0]])
    assert shared.tolist() == [False, True, True]
    method, g = recorded
    scores = [method.student["prototypes"](g[f"student_{view}"])[1] for view in (1, 2)]
    inside = regions(g)
    keep = torch.tensor([True, True, False, True])
    whole = method.aligned_group_loss(scores, scores, inside, keep)
    without = method.aligned_group_loss(
        [s[keep] for s in scores], [s[keep] for s in scores], inside[:, keep], keep[keep]
    )
    assert torch.allclose(whole, without)
    nothing = method.aligned_group_loss(scores, scores, inside, torch.zeros(4, dtype=torch.bool))
    assert float(nothing.detach()) == 0


@pytest.mark.parametrize("side", [7, 5])
def test_resampling_is_roi_align(side):
    torch.manual_seed(0)
    maps = torch.randn(6, 3, side, side, dtype=torch.float64)
    low = torch.rand(6, 2, dtype=torch.float64) * 0.6
    boxes = torch.cat([low, low + torch.rand(6, 2, dtype=torch.float64) * 0.4], -1)
    rois = torch.cat([torch.arange(6.0)[:, None].double(), boxes * side], 1)
    expected = torchvision.ops.roi_align(maps, rois, (side, side), aligned=True)
    assert torch.allclose(resample(maps, boxes), expected, atol=1e-12)


def test_the_slot_contrast_is_the_naive_one_over_the_active_slots():
    torch.manual_seed(0)
    query, keys = (F.normalize(torch.randn(n, 5, dtype=torch.float64), dim=1) for n in (4, 9))
    active = torch.tensor([1, 0, 1, 1, 0, 1, 1, 0, 1], dtype=torch.bool)
    positive = torch.tensor([0, 3, 5, 8])
    total = 0.0
    for q, p in zip(query, positive, strict=True):
        logits = {j: float(q @ keys[j]) / 0.2 for j in range(9) if active[j]}
        total += np.log(sum(np.exp(v) for v in logits.values())) - logits[int(p)]
    found = losses.slot_contrast(query, keys, positive, active, 0.2)
    assert float(found) == pytest.approx(0.4 * total / 4, abs=1e-12)


def test_winners_are_prototypes_that_are_best_somewhere():
    scores = torch.tensor([[[[0.9, 0.1]], [[0.2, 0.8]], [[0.5, 0.5]]]])  # three prototypes, two cells
    assert winners(scores).tolist() == [[True, True, False]]


def test_its_second_view_overlaps_the_first_and_both_are_seen_at_once():
    spec = SlotCon(create_backbone("test_resnet"), SlotConSettings(global_size=64, projector_hidden=8)).view_spec
    assert spec.views[0].overlap is None
    assert (spec.views[1].overlap.view, spec.views[1].overlap.share) == (0, 0.01)
    assert spec.views[1].solarize == 0.2


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"prototypes": 1}, "at least 2"), ({"student_temperature": 0}, "above 0"), ({"overlap": 2}, "between 0 and 1")],
)
def test_wrong_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        SlotConSettings(**changes)


def one_process(rank, world, file, queue):
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    method, pair = example(nn.Identity())
    share = slice(rank * 4 // world, (rank + 1) * 4 // world)
    loss, _ = method([Views(pair.pixels[:, share], pair.boxes[:, share], pair.flipped[:, share])])
    loss = loss.detach()
    if world > 1:
        dist.all_reduce(loss)
        queue.put((rank, float(loss) / world, method.center.tolist()))
        dist.destroy_process_group()
    else:
        queue.put((rank, float(loss), method.center.tolist()))


def example(predictor):
    """A SlotCon without batch norm, which without synchronisation would see other images; and two views of four."""
    torch.manual_seed(0)
    settings = SlotConSettings(global_size=64, projector_hidden=8, feature_dim=16, prototypes=4)
    method = SlotCon(create_backbone("test_resnet"), settings).eval()
    method.student["predictor"] = predictor
    boxes = torch.tensor([[0.0, 0.0, 0.8, 0.8], [0.9, 0.1, 0.2, 0.9]])[:, None].expand(2, 4, 4)
    return method, Views(torch.randn(2, 4, 3, 64, 64), boxes, torch.tensor([[False] * 4, [True] * 4]))


def test_two_processes_have_the_same_negatives_and_centre_as_one():
    context = multiprocessing.get_context("spawn")
    results = {}
    for world in (1, 2):
        queue = context.Queue()
        with tempfile.TemporaryDirectory() as folder:
            file = os.path.join(folder, "store")
            started = [context.Process(target=one_process, args=(r, world, file, queue)) for r in range(world)]
            for process in started:
                process.start()
            results[world] = sorted(queue.get(timeout=120) for _ in started)
            for process in started:
                process.join(30)
    (_, loss, centre) = results[1][0]
    for _, found, found_centre in results[2]:
        assert np.allclose(found_centre, centre, atol=1e-6)
        # The mean over processes of means over slots: equal where each process has as many slots.
        assert found == pytest.approx(loss, rel=2e-2)
