"""Batch norm over groups of images: the equation, and that processes, forward passes and devices change nothing."""

import copy
import itertools
import multiprocessing

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import distributed as dist
from torch import multiprocessing as mp
from torch import nn

from clove_hub.batch_norm import (
    GroupedBatchNorm,
    MaskedBatchNorm,
    NormGroups,
    batch_norms,
    group_batch_norms,
    groups_in_pass,
    settle_statistics,
)

IMAGES = 16


def one_process(images: int, group: int) -> NormGroups:
    return NormGroups(images, group, rank=0, world=1, processes=None)


def filled(layer: nn.BatchNorm2d) -> nn.BatchNorm2d:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in layer.parameters():
            value.normal_(generator=generator)
    return layer


# ---- one process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("views", "group"), [(1, 2), (2, 2), (3, 3), (2, 6)])
def test_each_image_is_normalized_with_its_group_as_the_equation_says(views, group):
    x = torch.randn(views * 6, 3, 4, 5, dtype=torch.float64)
    layer = filled(nn.BatchNorm2d(3).double())
    ours = GroupedBatchNorm(layer, one_process(6, group))(x)
    for view, image, channel in itertools.product(range(views), range(6), range(3)):
        first = image // group * group
        company = [other * 6 + i for other in range(views) for i in range(first, first + group)]
        values = x[company, channel]
        mean = values.sum() / values.numel()
        variance = ((values - mean) ** 2).sum() / values.numel()
        expected = (x[view * 6 + image, channel] - mean) / (variance + 1e-5) ** 0.5
        expected = expected * layer.weight[channel] + layer.bias[channel]
        assert torch.allclose(ours[view * 6 + image, channel], expected, rtol=1e-10, atol=1e-12)


def test_the_gradient_is_that_of_the_equation():
    layer = GroupedBatchNorm(filled(nn.BatchNorm2d(2).double()), one_process(4, 2))
    x = torch.randn(2 * 4, 2, 2, 1, dtype=torch.float64, requires_grad=True)

    def through(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(through, (x, layer.weight, layer.bias))


def test_channels_last_stays_channels_last():
    layer = GroupedBatchNorm(nn.BatchNorm2d(3), one_process(4, 2))
    x = torch.randn(8, 3, 4, 4)
    last = x.to(memory_format=torch.channels_last)
    assert layer(last).is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(layer(last), layer(x), atol=1e-6)


def test_running_statistics_are_those_of_one_group_after_the_other():
    """Over two forward passes of two sizes of views each, as if every group had been a forward pass of its own."""
    plain = nn.BatchNorm2d(3, momentum=0.3).double()
    ours = nn.Sequential(copy.deepcopy(plain))
    group_batch_norms(ours, group=2, images=4)
    passes = [[torch.randn(views * 4, 3, 2, 2, dtype=torch.float64) + views for views in (1, 3)] for _ in range(2)]
    for sizes in passes:
        for x in sizes:
            ours(x)
    assert int(ours[0].num_batches_tracked) == 0  # the step has not ended
    settle_statistics(ours, len(passes))
    for sizes in passes:
        for group in range(2):
            for x in sizes:
                plain(torch.cat([view[2 * group : 2 * group + 2] for view in x.split(4)]))
    for name, value in plain.named_buffers():
        assert torch.allclose(ours[0].get_buffer(name), value, rtol=1e-12), name
    settle_statistics(ours, len(passes))  # nothing is left
    assert torch.equal(ours[0].num_batches_tracked, plain.num_batches_tracked)


@pytest.mark.parametrize("model", ["test_resnet", "test_efficientnet"])
def test_a_whole_network_keeps_its_tensors_names_and_activations(model):
    """The second has timm's norms with an activation, and some of them a dropout."""
    torch.manual_seed(0)
    network = timm.create_model(model, num_classes=0).double()
    expected = copy.deepcopy(network)
    group_batch_norms(network, group=2, images=4)
    assert all(isinstance(norm, GroupedBatchNorm) for norm in batch_norms(network))
    assert any(isinstance(norm, BatchNormAct2d) for norm in batch_norms(expected)) == (model == "test_efficientnet")
    assert list(network.state_dict()) == list(expected.state_dict())
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    alone = torch.cat([expected(part) for part in images.split(2)])
    assert torch.allclose(network(images), alone, rtol=1e-10, atol=1e-12)
    settle_statistics(network, 1)
    for name, value in expected.named_buffers():
        assert torch.allclose(network.get_buffer(name).double(), value.double(), rtol=1e-10), name
    assert torch.allclose(copy.deepcopy(network).eval()(images), expected.eval()(images), rtol=1e-10, atol=1e-12)


def test_a_forward_pass_that_is_a_group_needs_nothing_of_ours():
    network = nn.Sequential(nn.BatchNorm2d(3))
    group_batch_norms(network, group=4, images=4)
    assert type(network[0]) is nn.BatchNorm2d
    assert groups_in_pass(network) == 1
    group_batch_norms(network, group=2, images=8)
    assert groups_in_pass(network) == 4
    assert groups_in_pass(nn.Sequential(nn.LayerNorm(3))) == 0


def test_a_tensor_that_is_no_number_of_views_is_refused():
    network = nn.Sequential(nn.BatchNorm2d(3))
    group_batch_norms(network, group=2, images=4)
    with pytest.raises(ValueError, match="tensor of 6 views, but a forward pass has 4 images"):
        network(torch.randn(6, 3, 2, 2))


def test_rows_that_count_are_normalized_with_those_of_their_group():
    generator = torch.Generator().manual_seed(0)
    norm = nn.Sequential(MaskedBatchNorm(3).double())
    group_batch_norms(norm, group=2, images=4)
    x = torch.randn(4 * 5, 3, dtype=torch.float64, generator=generator)  # five slots of each image
    counts = torch.rand(20, generator=generator) < 0.6
    counts[10:] = False
    counts[13] = True  # of the second group one row alone counts
    ours, plain = norm[0](x, counts), MaskedBatchNorm(3).double()
    for part in (slice(0, 10), slice(10, 20)):
        assert torch.allclose(ours[part], plain(x[part], counts[part]), rtol=1e-12)
    settle_statistics(norm, 1)
    assert norm[0].running_mean.abs().min() > 0
    assert torch.isfinite(norm[0].running_var).all()


# ---- processes and forward passes ------------------------------------------------------------------------------------


class Small(nn.Module):
    """Two sizes of views, the larger twice an image, as methods pass them; the loss is a mean over images."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
            *(nn.Conv2d(4, 4, 1), BatchNormAct2d(4), nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3, affine=False)),
        )
        self.slots = MaskedBatchNorm(3)

    def forward(self, large: torch.Tensor, small: torch.Tensor) -> torch.Tensor:
        maps = self.body(large.flatten(0, 1)).unflatten(0, large.shape[:2])  # (2, B, C, H, W)
        pooled = self.body(small).mean((2, 3))
        rows = maps[0].flatten(2).mT.flatten(0, 1)  # (B * N, C)
        slots = self.slots(rows, rows[:, 0] > 0).view(len(small), -1)
        return (maps[1].cos().mean((1, 2, 3)) * pooled.sin().sum(1) + slots.cos().mean(1)).mean()


def train_step(rank: int, world: int, passes: int, group: int) -> dict[str, torch.Tensor]:
    """Loss, gradients and statistics of a step of `IMAGES` images, of which this process takes its share."""
    torch.manual_seed(0)
    network = Small().double()
    large = torch.randn(2, IMAGES, 2, 6, 6, dtype=torch.float64)
    small = torch.randn(IMAGES, 2, 4, 4, dtype=torch.float64)
    micro = IMAGES // world // passes
    group_batch_norms(network, group, micro)
    losses = []
    for number in range(passes):
        first = (number * world + rank) * micro
        loss = network(large[:, first : first + micro], small[first : first + micro]) / passes
        loss.backward()
        losses.append(loss.detach())
    settle_statistics(network, passes)
    found = {"loss": torch.stack(losses).sum()} | {name: p.grad for name, p in network.named_parameters()}
    if world > 1:
        for value in found.values():
            dist.all_reduce(value)
            value /= world
    return found | dict(network.named_buffers())


def alone(group: int, images: int, rank: int = 0, world: int = 1) -> torch.Tensor:
    """What a layer makes of this process's images, in float32."""
    network = nn.Sequential(nn.BatchNorm2d(3))
    group_batch_norms(network, group, images // world)
    x = torch.randn(2, images, 3, 5, 5, generator=torch.Generator().manual_seed(7))
    x = x[:, rank * images // world : (rank + 1) * images // world]
    return network(x.flatten(0, 1)).view_as(x).detach()


def of_a_process(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    steps = {
        (passes, group): train_step(rank, world, passes, group)
        for passes, group in itertools.product((1, 2), (2, 4, 8, 16))
        if group * passes <= IMAGES
    }
    layers = {group: alone(group, 128, rank, world) for group in (32, 64, 128)}
    torch.save((steps, layers), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def together(request, tmp_path_factory):
    """What each of several processes has found."""
    multiprocessing.set_forkserver_preload(["clove_hub.training.loop"])
    folder, world = tmp_path_factory.mktemp("processes"), request.param
    mp.start_processes(of_a_process, args=(world, str(folder)), nprocs=world, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-9, atol=1e-13), name


def test_processes_and_passes_change_nothing(together):
    """Loss, gradients and running statistics of a step are those of one process and one pass, for every size of group."""
    reference = {group: train_step(0, 1, 1, group) for group in (2, 4, 8, 16)}
    for steps, _ in together:
        for (_, group), found in steps.items():
            assert_same(found, reference[group])
    assert abs(reference[2]["loss"] - reference[16]["loss"]) > 1e-3  # the size is no matter of rounding


@pytest.mark.parametrize(("passes", "group"), [(2, 2), (2, 8), (4, 4), (8, 2)])
def test_passes_of_one_process_change_nothing(passes, group):
    """Where a pass is one group torch's own layers are at work."""
    assert_same(train_step(0, 1, passes, group), train_step(0, 1, 1, group))


def test_groups_within_processes_are_normalized_bit_for_bit_alike(together):
    world = len(together)
    for group in (32, 64, 128):
        found = torch.cat([layers[group] for _, layers in together], 1)
        if group <= 128 // world:
            assert torch.equal(found, alone(group, 128))
        else:
            assert torch.allclose(found, alone(group, 128), atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_torchs_kernels_for_groups_over_gpus_give_what_the_cpu_gives(tmp_path):
    """With one process, which suffices for the kernels."""
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        over_gpus = NormGroups(4, 4, rank=0, world=1, processes=dist.group.WORLD)
        x = torch.randn(8, 3, 5, 5, dtype=torch.float64)
        found = []
        for device, groups in (("cpu", one_process(4, 4)), ("cuda", over_gpus)):
            network = nn.Sequential(GroupedBatchNorm(filled(nn.BatchNorm2d(3).double()).to(device), groups))
            y = x.to(device).requires_grad_()
            out = network(y)
            out.cos().sum().backward()
            settle_statistics(network, 1)
            found.append([out, y.grad, *(p.grad for p in network.parameters()), *network.buffers()])
        for ours, expected in zip(found[1], found[0], strict=True):
            assert torch.allclose(ours.cpu().double(), expected.double(), rtol=1e-9, atol=1e-12)
    finally:
        dist.destroy_process_group()
