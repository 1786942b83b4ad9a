"""SlotCon against the numbers of the released code, and against its equations written out."""

import multiprocessing
import socket
from collections.abc import Mapping

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torchvision
from patience import PATIENCE
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.nn import functional as F

from clove_hub import losses
from clove_hub.backbones import create_backbone
from clove_hub.batch_norm import MaskedBatchNorm, group_batch_norms, settle_statistics
from clove_hub.geometry import resample, shared_region
from clove_hub.heads import SlotPredictor, pool_slots, slotcon_projector
from clove_hub.methods.slotcon import SlotCon, SlotConSettings, used, winners
from clove_hub.views import Views

SMALL = SlotConSettings(global_size=64, projector_hidden=8, feature_dim=16, prototypes=12)


def build(settings: SlotConSettings = SMALL) -> SlotCon:
    torch.manual_seed(0)
    return SlotCon(create_backbone("test_resnet"), settings)


# ---- golden numbers --------------------------------------------------------------------------------------------------


class AsTheyAre(nn.Module):
    """In place of the predictor."""

    def forward(self, slots: Tensor, counts: Tensor) -> Tensor:
        return slots


@pytest.fixture
def recorded(golden) -> tuple[SlotCon, dict[str, Tensor]]:
    """A SlotCon with the recorded prototypes and center, whose slots are predicted as they are; and the recording."""
    g = {key: torch.from_numpy(np.array(value)) for key, value in golden["slotcon_loss"].items()}
    method = build()
    method.student["predictor"] = AsTheyAre()
    with torch.no_grad():
        method.student["prototypes"].weight.copy_(g["prototypes_student"])
        method.teacher["prototypes"].weight.copy_(g["prototypes_teacher"])
    method.center.copy_(g["center"])
    return method, g


def walked(g: Mapping[str, Tensor]) -> Tensor:
    """The recorded boxes, in which a flipped view is walked from right to left."""
    return torch.where(g["flips"].unsqueeze(-1), g["boxes"][..., [2, 1, 0, 3]], g["boxes"])


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


def test_losses_gradients_and_center_are_those_of_the_released_code(recorded):
    method, g = recorded
    maps = [g[f"student_{view}"].clone().requires_grad_() for view in (1, 2)]
    key_maps = [g[f"teacher_{view}"] for view in (1, 2)]
    student = [method.student["prototypes"](x) for x in maps]
    teacher = [method.teacher["prototypes"](x) for x in key_maps]
    everyone = torch.arange(12).expand(4, -1)
    assert close(pool_slots(maps[0], student[0], everyone, 0.07), g["slots_student_1"])
    regions = walked(g)
    assert close(resample(student[0], regions[0]), g["aligned_student_1"])
    assert close(resample(teacher[0], regions[0]), g["aligned_teacher_1"])

    group = method.group_loss(student, teacher, regions, torch.ones(4, dtype=torch.bool))
    pairs = [method.slots(maps[q], student[q], key_maps[k], teacher[k]) for q, k in ((0, 1), (1, 0))]
    slot = sum(method.slot_loss(pair.query.flatten(0, 1), pair) for pair in pairs)
    method.update_center(teacher)
    assert close(group, g["group_loss"])
    assert close(slot, g["slot_loss"])
    assert close(method.center, g["center_after"])
    loss = (group + slot) / 2
    assert close(loss, g["loss"])
    loss.backward()
    for x, name in zip(maps, ("grad_student_1", "grad_student_2"), strict=True):
        assert close(x.grad, g[name])


# ---- the shared region -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 7), (5, 9)], ids=str)
def test_resampling_is_an_aligned_roi_align(shape):
    torch.manual_seed(0)
    height, width = shape
    maps = torch.randn(64, 3, *shape, dtype=torch.float64, requires_grad=True)
    low = torch.rand(64, 2, dtype=torch.float64) * 0.9
    boxes = torch.cat([low, low + torch.rand(64, 2, dtype=torch.float64) * (1 - low)], -1)
    scale = torch.tensor([width, height, width, height])
    rois = torch.cat([torch.arange(64.0).unsqueeze(1).double(), boxes * scale], 1)
    expected = torchvision.ops.roi_align(maps, rois, shape, aligned=True)
    found = resample(maps, boxes)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(found)
    gradients = [torch.autograd.grad(out, maps, weights)[0] for out in (found, expected)]
    assert torch.allclose(*gradients, rtol=0, atol=1e-12)
    mirrored = resample(maps.flip(-1), torch.stack([1 - boxes[:, 0], boxes[:, 1], 1 - boxes[:, 2], boxes[:, 3]], 1))
    assert torch.allclose(mirrored, expected, rtol=0, atol=1e-12), "a flipped view is not walked from right to left"


@pytest.mark.parametrize("flips", [(False, False), (True, False), (False, True), (True, True)], ids=str)
def test_what_two_views_share_is_the_same_picture_whichever_is_flipped(flips):
    """Maps that hold where in the source image each cell lies: of the same place both views must tell the same."""
    grid = 40
    boxes = torch.tensor([[0.1, 0.05, 0.7, 0.55], [0.3, 0.2, 0.95, 0.8]], dtype=torch.float64)
    boxes = torch.where(torch.tensor(flips).unsqueeze(1), boxes[:, [2, 1, 0, 3]], boxes)
    centers = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    x, y = (boxes[:, i, None] + (boxes[:, i + 2] - boxes[:, i]).unsqueeze(1) * centers for i in (0, 1))  # (2, grid)
    maps = torch.stack([x.unsqueeze(1).expand(2, grid, grid), y.unsqueeze(2).expand(2, grid, grid)], 1)
    regions, shared = shared_region(boxes, boxes.flip(0))
    assert shared.all()
    one, other = resample(maps, regions)
    inner = (slice(None), slice(1, -1), slice(1, -1))  # at the border of a view its last cell's value holds
    assert torch.allclose(one[inner], other[inner], rtol=0, atol=1e-12)
    assert torch.allclose(one[0, 5], 0.3 + 0.4 * centers, rtol=0, atol=0.6 / grid)


def test_views_that_share_nothing_have_no_say(recorded):
    boxes = torch.tensor([[0.0, 0.0, 0.4, 0.4], [0.5, 0.5, 0.9, 0.9], [0.9, 0.1, 0.3, 0.6]])
    regions, shared = shared_region(boxes, boxes[[1, 2, 0]])
    assert shared.tolist() == [False, True, True]
    assert regions.isfinite().all()
    method, g = recorded
    scores = [method.student["prototypes"](g[f"student_{view}"]) for view in (1, 2)]
    inside = walked(g)
    keep = torch.tensor([True, True, False, True])
    whole = method.group_loss(scores, scores, inside, keep)
    without = method.group_loss([s[keep] for s in scores], [s[keep] for s in scores], inside[:, keep], keep[keep])
    assert torch.allclose(whole, without)
    assert method.group_loss(scores, scores, inside, torch.zeros(4, dtype=torch.bool)).detach() == 0


# ---- slots -----------------------------------------------------------------------------------------------------------


def test_the_slot_contrast_is_the_naive_one_over_the_active_slots():
    torch.manual_seed(0)
    query, keys = (F.normalize(torch.randn(n, 5, dtype=torch.float64), dim=1) for n in (4, 9))
    active = torch.tensor([1, 0, 1, 1, 0, 1, 1, 0, 1], dtype=torch.bool)
    positive = torch.tensor([0, 3, 5, 8])
    found = losses.slot_contrast(query, keys, positive, active, 0.2)
    for q, p, term in zip(query, positive, found, strict=True):
        logits = {j: float(q @ keys[j]) / 0.2 for j in range(9) if active[j]}
        expected = np.log(sum(np.exp(v) for v in logits.values())) - logits[int(p)]
        assert float(term) == pytest.approx(2 * 0.2 * expected, abs=1e-12)


def naive_slot_loss(method: SlotCon, maps: Tensor, key_maps: Tensor, mlp: nn.Module) -> Tensor:
    """The slot loss of one direction with every slot of every image, the active ones picked out by their numbers."""

    def grouped(prototypes: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        cosine = torch.stack([F.cosine_similarity(x, p.view(1, -1, 1, 1), dim=1) for p in prototypes], 1)
        share = (cosine / method.settings.teacher_temperature).exp()
        share = share / share.sum(1, keepdim=True) + 1e-6
        slots = torch.stack(
            [(x * share[:, k : k + 1]).sum((2, 3)) / share[:, k].sum((1, 2))[:, None] for k in range(len(prototypes))],
            1,
        )
        wins = torch.stack([(cosine.argmax(1) == k).any(2).any(1) for k in range(len(prototypes))], 1)
        return slots.flatten(0, 1), wins.flatten()

    slots, wins = grouped(method.student["prototypes"].weight, maps)
    keys, key_wins = grouped(method.teacher["prototypes"].weight, key_maps)
    both, kept = (wins & key_wins).nonzero().squeeze(1), key_wins.nonzero().squeeze(1)
    predicted = F.normalize(mlp(slots[both]), dim=1)
    logits = predicted @ F.normalize(keys[kept], dim=1).T / 0.2
    labels = torch.tensor([kept.tolist().index(number) for number in both.tolist()])
    return F.cross_entropy(logits, labels) * 2 * 0.2


def test_the_masked_slot_loss_is_the_one_with_picked_slots_in_float64():
    """With the predictor's batch norm, which must see the picked slots alone."""
    method = build().double()
    maps, key_maps = (torch.randn(5, 16, 4, 3, dtype=torch.float64) for _ in range(2))
    mlp = nn.Sequential(
        *(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.GELU()),
        nn.Linear(8, 16),
    ).double()
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.normal_()
    method.student["predictor"].mlp.load_state_dict(mlp.state_dict())

    x = maps.clone().requires_grad_()
    expected = naive_slot_loss(method, x, key_maps, mlp)
    expected.backward()
    y = maps.clone().requires_grad_()
    prototype_gradient = method.student["prototypes"].weight.grad.clone()
    method.zero_grad()
    with torch.no_grad():
        key_scores = method.teacher["prototypes"](key_maps)
    slots = method.slots(y, method.student["prototypes"](y), key_maps, key_scores)
    assert 5 < int(slots.contrasted.sum()) < int(slots.active.sum()) < slots.active.numel()
    found = method.slot_loss(method.student["predictor"](slots.query.flatten(0, 1), slots.contrasted.flatten()), slots)
    found.backward()

    assert not slots.key.requires_grad
    assert float(found.detach()) == pytest.approx(float(expected.detach()), abs=1e-12)
    assert torch.allclose(y.grad, x.grad, rtol=0, atol=1e-12)
    assert torch.allclose(method.student["prototypes"].weight.grad, prototype_gradient, rtol=0, atol=1e-12)
    ours = method.student["predictor"].mlp
    for (name, parameter), other in zip(ours.named_parameters(), mlp.parameters(), strict=True):
        assert torch.allclose(parameter.grad, other.grad, rtol=0, atol=1e-11), name
    for name, buffer in mlp.named_buffers():
        assert torch.allclose(ours.get_buffer(name), buffer, rtol=0, atol=1e-12), name


def test_a_step_without_a_single_contrasted_slot_is_finite_and_leaves_the_predictor_alone():
    method = build()
    torch.manual_seed(0)
    slots = method.slots(*(torch.randn(2, c, 3, 3) for c in (16, 12, 16, 12)))
    nothing = slots._replace(query=slots.query.requires_grad_(), contrasted=torch.zeros_like(slots.contrasted))
    predicted = method.student["predictor"](nothing.query.flatten(0, 1), nothing.contrasted.flatten())
    loss = method.slot_loss(predicted, nothing)
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(not p.grad.any() for p in method.student["predictor"].parameters())
    norm = method.student["predictor"].mlp[1]
    assert isinstance(norm, MaskedBatchNorm)
    assert not norm.running_mean.any()
    assert (norm.running_var == 1).all()
    assert norm.num_batches_tracked == 0


def test_outside_training_the_norm_keeps_to_its_running_statistics():
    norm, plain = MaskedBatchNorm(3).eval(), nn.BatchNorm1d(3).eval()
    state = {
        "weight": torch.rand(3),
        "bias": torch.rand(3),
        "running_mean": torch.rand(3),
        "running_var": torch.rand(3),
    }
    for module in (norm, plain):
        module.load_state_dict(state | {"num_batches_tracked": torch.tensor(1)})
    x = torch.randn(4, 3)
    assert torch.allclose(norm(x, torch.zeros(4, dtype=torch.bool)), plain(x), atol=1e-6)


def test_winners_and_used_prototypes_are_those_that_are_best_somewhere():
    scores = torch.tensor([[[[0.9, 0.1]], [[0.2, 0.8]], [[0.5, 0.5]]]])  # three prototypes, two cells
    assert winners(scores).tolist() == [[0, 1]]
    assert float(used(winners(scores), 3)) == pytest.approx(2 / 3)


# ---- the whole method ------------------------------------------------------------------------------------------------


def pair(batch: int, size: int = 64, dtype: torch.dtype = torch.float32) -> Views:
    """Two views of each image; those of the first image share nothing."""
    generator = torch.Generator().manual_seed(1)
    boxes = torch.tensor([[0.0, 0.0, 0.8, 0.8], [0.9, 0.1, 0.2, 0.9]]).unsqueeze(1).repeat(1, batch, 1)
    boxes[0, 0], boxes[1, 0] = torch.tensor([0.0, 0.0, 0.4, 0.4]), torch.tensor([0.9, 0.5, 0.5, 0.9])
    pixels = torch.randn(2, batch, 3, size, size, generator=generator)
    return Views(pixels.to(dtype), boxes.to(dtype), torch.tensor([[False] * batch, [True] * batch]))


@pytest.mark.slow
def test_the_shapes_of_a_step_depend_on_no_data():
    """So that the host never waits for a device to tell it how many slots there are."""
    method = build()
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = Views(torch.empty(2, 4, 3, 64, 64), torch.empty(2, 4, 4), torch.empty(2, 4, dtype=torch.bool))
        loss, _ = method([fake])
        loss.backward()
        with pytest.raises(DynamicOutputShapeException):
            fake.flipped.nonzero()


def test_the_logs_tell_of_a_collapse():
    method = build()
    method.teacher["prototypes"].weight.requires_grad_(False).copy_(torch.ones(12, 16))
    _, logs = method([pair(3)])
    assert float(logs["active_slots"]) == 1
    assert float(logs["used_prototypes"]) == pytest.approx(1 / 12)
    assert {"group_loss", "slot_loss", "contrasted_slots", "embedding_spread"} <= logs.keys()


def test_the_layers_bear_the_names_and_start_as_those_of_the_released_code():
    leaves = [
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
        "3.weight",
        "3.bias",
        "4.weight",
        "4.bias",
        "6.weight",
        "6.bias",
    ]
    torch.manual_seed(0)
    projector, predictor = slotcon_projector(24, 64, 16), SlotPredictor(16, 64)
    assert [name for name, _ in projector.named_parameters()] == leaves
    assert [name for name, _ in predictor.named_parameters()] == [f"mlp.{leaf}" for leaf in leaves]
    assert projector(torch.randn(2, 24, 3, 5)).shape == (2, 16, 3, 5)
    for mlp in (projector, predictor.mlp):
        assert float(mlp[3].weight.detach().std()) == pytest.approx(0.02, rel=0.1)
        assert not mlp[3].bias.any()
    names = build().state_dict()
    assert names["center"].shape == (1, 12)
    assert names["student.prototypes.weight"].shape == names["teacher.prototypes.weight"].shape == (12, 16)


def test_the_second_view_overlaps_the_first():
    first, second = build().view_spec.views
    assert first.overlap is None
    assert (second.overlap.view, second.overlap.share) == (0, 0.01)
    assert (first.blur, second.blur, first.solarize, second.solarize) == (1.0, 0.1, 0.0, 0.2)
    assert build(SlotConSettings(global_size=64, projector_hidden=8, overlap=0)).view_spec.views[1].overlap is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prototypes": 1}, "method.prototypes=1: .*at least 2"),
        ({"student_temperature": 0}, "method.student_temperature=0: must be above 0"),
        ({"overlap": 2}, "method.overlap=2: must be between 0 and 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SlotConSettings(**changes)


def share_of_a_step(rank: int, world: int, port: int, folder: str) -> None:
    """Loss, gradients and state after this process's share of six images, in float64."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    method = build().double()
    with torch.no_grad():
        for parameter in method.student["predictor"].parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(3))
    group_batch_norms(method, group=6, images=6 // world)
    everything = pair(6, dtype=torch.float64)
    share = slice(rank * 6 // world, (rank + 1) * 6 // world)
    loss, _ = method([Views(*(x[:, share] for x in everything))])
    loss.backward()
    settle_statistics(method, 1)
    found = {"loss": loss.detach()} | {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    for value in found.values():
        if world > 1:
            dist.all_reduce(value)
        value /= world
    torch.save(found | dict(method.named_buffers()), f"{folder}/{world}_{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_loss_gradients_center_and_predictor_of_one(tmp_path):
    """Though the processes have different numbers of slots, and one an image whose views share nothing."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["clove_hub.methods"])
    started = [
        context.Process(target=share_of_a_step, args=(rank, world, port, str(tmp_path)))
        for world in (1, 2)
        for rank in range(world)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(PATIENCE)
        assert process.exitcode == 0
    one, *two = (torch.load(tmp_path / f"{file}.pt", weights_only=True) for file in ("1_0", "2_0", "2_1"))
    assert {"loss", "center", "student.predictor.mlp.1.running_var", "student.prototypes.weight"} <= one.keys()
    for found in two:
        for name, value in one.items():
            assert torch.allclose(found[name].double(), value.double(), rtol=1e-9, atol=1e-12), name
