"""MoCo and MoCo-kNN: the losses against recorded numbers and naive ones, the queue, the keys' batch norm, the views."""

import dataclasses
import math
import warnings

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from small_methods import run_command
from torch import distributed as dist
from training_runs import rows

from benchmarks.small import small
from clove_hub import losses
from clove_hub.backbones import create_backbone
from clove_hub.batch_norm import group_batch_norms
from clove_hub.methods import METHODS, Moco, MocoKnnSettings, MocoSettings
from clove_hub.methods.base import unit
from clove_hub.methods.moco import pooled, queries
from clove_hub.views import Jitter, Overlap, Views

SMALL = MocoKnnSettings(
    global_size=64, local_size=32, local_views=2, projector_hidden=24, feature_dim=16, queue=50, knn_neighbors=5
)


def build(model: str = "test_resnet", **changes) -> Moco:
    torch.manual_seed(0)
    return Moco(create_backbone(model), dataclasses.replace(SMALL, **changes))


def random_views(method: Moco, batch: int, seed: int = 0) -> list[Views]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Views(
            torch.randn(group.stop - group.start, batch, 3, size, size, generator=generator),
            torch.empty(0),
            torch.empty(0),
        )
        for group in method.view_spec.groups
        for size in [method.view_spec.views[group.start].size]
    ]


# ---- the losses ------------------------------------------------------------------------------------------------------


def test_losses_and_gradient_equal_the_released_code(golden):
    g = golden["moco_knn_loss"]
    queue, features = (torch.from_numpy(g[name]).T.contiguous() for name in ("queue", "queue_backbone"))
    method = build(
        feature_dim=queue.shape[1],
        queue=len(queue),
        temperature=float(g["temperature"]),
        knn_neighbors=int(g["topk"]),
        knn_weight=float(g["aux_weight"]),
    )
    method.queue, method.queue_features = queue, features
    query = torch.from_numpy(g["query"]).transpose(0, 1).contiguous().requires_grad_()  # (V, B, C)
    neighbors = method.neighbors(torch.from_numpy(g["query_backbone"]).transpose(0, 1))
    loss, logs = method.loss(query, torch.from_numpy(g["key"]), method.queue, neighbors)
    loss.backward()
    assert float(logs["contrast"]) == pytest.approx(float(g["nce_loss"]), rel=1e-5)
    assert float(logs["neighbor_contrast"]) == pytest.approx(float(g["knn_loss"]), rel=1e-5)
    assert float(loss.detach()) == pytest.approx(float(g["loss"]), rel=1e-5)
    gradient = query.grad.transpose(0, 1).numpy()
    assert np.abs(gradient - g["grad_query"]).max() <= 1e-5 * np.abs(g["grad_query"]).max()


def test_the_contrast_is_a_softmax_with_the_positive_in_its_sum():
    generator = torch.Generator().manual_seed(0)
    positive = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    negative = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64)
    ours = losses.queue_contrast(positive, negative)
    for v in range(2):
        for b in range(3):
            total = math.exp(positive[v, b]) + sum(math.exp(x) for x in negative[v, b])
            assert float(ours[v, b]) == pytest.approx(-math.log(math.exp(positive[v, b]) / total), rel=1e-12)


def test_the_neighbors_contrast_is_a_mean_of_log_probabilities_over_the_queue_alone():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64)
    chosen = torch.stack([torch.randperm(7, generator=generator)[:4] for _ in range(6)]).view(2, 3, 4)
    ours = losses.neighbor_contrast(logits, chosen)
    for v in range(2):
        for b in range(3):
            total = sum(math.exp(x) for x in logits[v, b])
            terms = [-math.log(math.exp(logits[v, b, k]) / total) for k in chosen[v, b].tolist()]
            assert float(ours[v, b]) == pytest.approx(sum(terms) / 4, rel=1e-12)


def test_large_cosines_do_not_overflow():
    positive, negative = torch.tensor([200.0]), torch.full((1, 9), 200.0)
    assert float(losses.queue_contrast(positive, negative)) == pytest.approx(math.log(10), rel=1e-4)


def test_neighbors_are_the_nearest_in_the_backbones_features():
    method = build()
    features = torch.nn.functional.normalize(torch.randn(3, 2, method.queue_features.shape[1]), dim=-1)
    found = method.neighbors(features)
    for v in range(3):
        for b in range(2):
            cosines = [float(features[v, b] @ entry) for entry in method.queue_features]
            nearest = sorted(range(50), key=lambda i: cosines[i], reverse=True)[:5]
            assert sorted(found[v, b].tolist()) == sorted(nearest)


# ---- what is a query and what a key ----------------------------------------------------------------------------------


@pytest.mark.parametrize("local_size", [32, 64])
def test_queries_are_all_views_but_the_second_and_that_one_is_the_key(local_size):
    method = build(local_size=local_size, key_norm="synchronized")
    views = random_views(method, batch=3)
    seen = torch.cat([view.mean((-3, -2, -1)) for view in queries(views)])
    every = torch.cat([group.pixels.mean((-3, -2, -1)) for group in views])
    assert torch.equal(seen, every[[0, 2, 3]])
    with torch.no_grad():
        key, features = method.embed(views[0].pixels[1])
        start = int(method.queue_start)
        method(views)
    assert torch.allclose(method.queue[start : start + 3], key, atol=1e-6)
    assert torch.allclose(method.queue_features[start : start + 3], features, atol=1e-6)


def test_a_step_without_extras_is_moco_v2_written_out():
    method = build(knn_weight=0.0, local_views=0, key_norm="synchronized").double()
    pixels = torch.randn(2, 4, 3, 64, 64, dtype=torch.float64)
    queue = method.queue.clone()
    loss, logs = method([Views(pixels, torch.empty(0), torch.empty(0))])
    with torch.no_grad():
        q = method.student["projector"](method.student["backbone"].forward_features(pixels[0]).mean((2, 3)))
        k = method.teacher["projector"](method.teacher["backbone"].forward_features(pixels[1]).mean((2, 3)))
    q, k = q / q.norm(dim=1, keepdim=True), k / k.norm(dim=1, keepdim=True)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / 0.2
    expected = torch.nn.functional.cross_entropy(logits, torch.zeros(4, dtype=torch.long))
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-9)
    assert set(logs) == {"positive_cosine", "negative_cosine", "embedding_spread"}


# ---- queue and warm-up -----------------------------------------------------------------------------------------------


def test_the_queue_need_not_be_a_multiple_of_the_batch():
    method = build(queue=10, key_norm="synchronized")
    expected = list(method.queue.clone())
    for step in range(4):  # 4 images a step in 10 places
        views = random_views(method, batch=4, seed=step)
        with torch.no_grad():
            key, _ = method.embed(views[0].pixels[1])
            method(views)
        for i in range(4):
            expected[(4 * step + i) % 10] = key[i]
        assert torch.allclose(method.queue, torch.stack(expected), atol=1e-6)
        assert int(method.queue_start) == 4 * (step + 1) % 10


def test_a_batch_larger_than_the_queue_leaves_its_last_keys():
    method = build(queue=5, key_norm="synchronized")
    views = random_views(method, batch=8)
    with torch.no_grad():
        key, _ = method.embed(views[0].pixels[1])
        method(views)
    assert torch.allclose(method.queue, key[3:], atol=1e-6)


@pytest.mark.parametrize("order", ["enqueue_first", "look_first"])
def test_neighbors_are_looked_for_among_the_steps_own_keys_or_before_these_join(order):
    """Their probabilities are those of the keys that waited before, in either order."""
    method = build(knn_order=order, key_norm="synchronized")
    views = random_views(method, batch=4)
    queue, features = method.queue.clone(), method.queue_features.clone()
    with torch.no_grad():
        _, logs = method(views)
        where = {"enqueue_first": method.queue_features, "look_first": features}
        seen = torch.cat([pooled(method.student, pixels) for pixels in queries(views)])
        expected = {}
        for name, entries in where.items():
            neighbors = (unit(seen) @ entries.T).topk(5).indices
            _, found = method.loss(unit(method.student["projector"](seen)), queue[:4], queue, neighbors)
            expected[name] = float(found["neighbor_contrast"])
    assert float(logs["neighbor_contrast"]) == pytest.approx(expected.pop(order), rel=1e-5)
    assert float(logs["neighbor_contrast"]) != pytest.approx(*expected.values(), rel=1e-3)


def test_the_neighbors_come_in_after_the_warm_up():
    method = build(knn_warmup_epochs=5.0)
    for epoch, expected in ((0.0, False), (4.99, False), (5.0, True), (7.5, True)):
        method.begin_step(0.99, epoch)
        loss, logs = method(random_views(method, batch=4))
        assert (float(logs["neighbor_contrast"]) > 0) == expected
        total = float(logs["contrast"]) + 0.4 * float(logs["neighbor_contrast"])
        assert float(loss.detach()) == pytest.approx(total, rel=1e-6)


def test_the_loop_tells_the_method_when_the_warm_up_is_over(made_photos, tmp_path):
    """24 photos, 8 a step: the second epoch starts with the fourth step."""
    overrides = small("moco_knn", schedule__steps=6, method__knn_warmup_epochs=1, run__output=tmp_path / "run")
    recipe = "moco_knn_r50_coco_200ep"
    assert run_command("pretrain", recipe, *overrides, f"data.path={made_photos}") == 0
    assert [row["neighbor_contrast"] > 0 for row in rows(tmp_path / "run")] == [False] * 3 + [True] * 3


# ---- batch norm of the keys ------------------------------------------------------------------------------------------


def grouped(images: int, group: int, **changes) -> Moco:
    method = build(**changes)
    group_batch_norms(method, group, images)
    return method


def test_keys_are_shuffled_over_the_groups_of_batch_norm():
    method, images = grouped(12, 3), torch.randn(12, 3, 32, 32)
    with torch.no_grad():
        one, other = (method.keys(images)[0] for _ in range(2))
        fixed, again = (grouped(12, 3, key_norm="synchronized").keys(images)[0] for _ in range(2))
    assert not torch.allclose(one, other, atol=1e-3)
    assert torch.equal(fixed, again)


def test_shuffling_gives_each_image_its_own_key():
    """With fixed statistics the company does not matter, so the keys are those of one pass."""
    method, images = grouped(12, 3).eval(), torch.randn(12, 3, 32, 32)
    with torch.no_grad():
        for ours, expected in zip(method.keys(images), method.embed(images), strict=True):
            assert torch.allclose(ours, expected, atol=1e-5)


def test_shuffling_within_a_single_group_is_not_silent():
    with pytest.warns(UserWarning, match="lower batch.norm_group"):
        build().keys(torch.randn(4, 3, 32, 32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grouped(4, 2).keys(torch.randn(4, 3, 32, 32))
        build("test_convnext").keys(torch.randn(4, 3, 32, 32))  # without batch norm nothing needs shuffling
        build(key_norm="synchronized").keys(torch.randn(4, 3, 32, 32))


def test_what_version_0_1_called_split_is_shuffled():
    assert build(key_norm="split", key_norm_images=32).shuffles


def shuffled_keys(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    method = build(key_norm="shuffled")
    torch.manual_seed(rank)  # as the loop seeds each process
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(5))[4 * rank : 4 * rank + 4]
    with torch.no_grad():
        fixed, features = method.eval().keys(images)
        expected = method.embed(images)[0]
        method.enqueue(fixed, features)
        alone = method.train().embed(images)[0]
        shuffled = method.keys(images)[0]
    torch.save((fixed, expected, alone, shuffled, method.queue), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_shuffled_keys_come_back_to_the_process_of_their_image(tmp_path):
    mp.start_processes(shuffled_keys, args=(str(tmp_path),), nprocs=2, start_method="forkserver")
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for fixed, expected, alone, shuffled, _ in results:
        assert torch.allclose(fixed, expected, atol=1e-5)
        assert not torch.allclose(shuffled, alone, atol=1e-3)  # normalized in another company than its own
    # Both processes hold the same queue: the keys of all images in the order of the ranks.
    (first, *_, queue), (second, *_, other) = results
    assert torch.equal(queue, other)
    assert torch.equal(queue[:8], torch.cat([first, second]))


# ---- views and settings ----------------------------------------------------------------------------------------------


def views_of(**changes):
    return build(**changes).view_spec.views


def test_moco_v2_has_one_pair_of_like_views():
    torch.manual_seed(0)
    query, key = Moco(create_backbone("test_resnet"), MocoSettings(queue=8)).view_spec.views
    assert query == key
    assert (key.size, key.scale, key.gray, key.blur, key.solarize) == (224, (0.2, 1.0), 0.2, 0.5, 0.0)
    assert key.jitter == Jitter(0.4, 0.4, 0.4, 0.1, 0.8)


def test_moco_knn_has_three_invariances():
    torch.manual_seed(0)
    settings = MocoKnnSettings(queue=20)
    query, key, *small = Moco(create_backbone("test_resnet"), settings).view_spec.views
    assert (query.size, key.size, [view.size for view in small]) == (160, 160, [96] * 4)
    assert all(view.scale == (0.05, 0.14) and view.overlap == Overlap(view=1, share=0.1) for view in small)
    assert key.auto_augment == 0
    assert all(view.auto_augment == 0.5 for view in (query, *small))
    assert settings.knn_weight == 0.4


def test_each_invariance_is_switched_alone():
    assert len(views_of(local_views=0)) == 2
    assert all(view.overlap is None for view in views_of(overlap=0.0))
    assert all(view.auto_augment == 0 for view in views_of(auto_augment=0.0))
    without = build(knn_weight=0.0)
    assert "queue_features" not in without.state_dict()
    _, logs = without(random_views(without, batch=4))
    assert "neighbor_contrast" not in logs


def test_the_two_names_differ_in_their_defaults_alone():
    assert METHODS["moco"].build is METHODS["moco_knn"].build
    changed = {
        field.name
        for field in dataclasses.fields(MocoSettings)
        if getattr(MocoSettings(), field.name) != getattr(MocoKnnSettings(), field.name)
    }
    assert changed == {"global_size", "local_views", "overlap", "auto_augment", "knn_weight"}


def test_the_head_has_two_layers_of_the_papers_sizes():
    torch.manual_seed(0)
    projector = Moco(create_backbone("resnet50"), MocoSettings(queue=8)).student["projector"]
    assert [tuple(p.shape) for p in projector.parameters()] == [(2048, 2048), (2048,), (128, 2048), (128,)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key_norm": "shuffle"}, "method.key_norm='shuffle': choose one of shuffled, synchronized, split"),
        ({"queue": 0}, "method.queue=0: must be at least 1"),
        ({"temperature": 0.0}, "method.temperature=0.0: must be above 0"),
        ({"knn_weight": -1.0}, "method.knn_weight=-1.0: must not be negative"),
        ({"knn_order": "first"}, "method.knn_order='first': choose one of enqueue_first, look_first"),
        ({"knn_neighbors": 51}, "method.knn_neighbors=51 is more than method.queue=50"),
        ({"auto_augment": 2.0}, "auto_augment"),
        ({"overlap": 2.0}, "share"),
    ],
)
def test_settings_that_cannot_work_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)
