"""DenseCL and BYOL: their losses beside the papers' equations, written out image by image in float64."""

import math

import pytest
import torch
from torch.nn import functional as F

from clove_hub.backbones import create_backbone
from clove_hub.methods.byol import Byol, ByolSettings
from clove_hub.methods.densecl import DenseCl, DenseClSettings
from clove_hub.views import Views

SMALL = {"global_size": 64, "projector_hidden": 24, "feature_dim": 8}


def views(batch: int) -> list[Views]:
    torch.manual_seed(3)
    pixels = torch.randn(2, batch, 3, 64, 64, dtype=torch.float64)
    return [Views(pixels, torch.rand(2, batch, 4, dtype=torch.float64), torch.zeros(2, batch, dtype=torch.bool))]


def densecl(**changes: object) -> DenseCl:
    torch.manual_seed(0)
    method = DenseCl(create_backbone("test_resnet"), DenseClSettings(**SMALL, queue=10, **changes)).double()
    method.shuffles = False
    return method.eval()  # batch norm is tested where it is made


def info_nce(query: torch.Tensor, positive: torch.Tensor, queue: torch.Tensor, temperature: float) -> float:
    logits = [float((query @ key).detach()) / temperature for key in (positive, *queue)]
    return -logits[0] + math.log(sum(math.exp(logit) for logit in logits))


@pytest.mark.parametrize("weight", [0.5, 0.2])
def test_densecls_loss_is_the_papers(weight):
    method, (pair,) = densecl(dense_weight=weight), views(3)
    queue, dense_queue = method.queue.clone(), method.dense_queue.clone()
    loss, logs = method([pair])
    student, teacher, expected = method.student, method.teacher, 0.0
    keys, dense_keys = [], []
    for image in range(3):
        f, g = (net["backbone"].forward_features(pair.pixels[view, image][None])
                for view, net in ((0, student), (1, teacher)))  # fmt: skip
        q, k = (F.normalize(net["projector"](x.mean((2, 3)))[0], dim=0) for net, x in ((student, f), (teacher, g)))
        r, t = (
            F.normalize(net["dense_projector"](x)[0].flatten(1).T, dim=1) for net, x in ((student, f), (teacher, g))
        )
        f, g = (F.normalize(x[0].flatten(1).T, dim=1) for x in (f, g))
        expected += (1 - weight) * info_nce(q, k, queue, 0.2) / 3
        for cell in range(len(r)):
            nearest = max(range(len(t)), key=lambda other: float(f[cell] @ g[other]))
            expected += weight * info_nce(r[cell], t[nearest], dense_queue, 0.2) / len(r) / 3
        keys.append(k)
        dense_keys.append(F.normalize(t.mean(0), dim=0))
    assert float(loss) == pytest.approx(expected, abs=1e-12)
    assert torch.allclose(method.queue[:3], torch.stack(keys), atol=1e-12)
    assert torch.allclose(method.dense_queue[:3], torch.stack(dense_keys), atol=1e-12)
    assert torch.equal(method.queue[3:], queue[3:])
    assert logs["embedding_spread"] > 0


def test_densecls_gradient_goes_through_both_heads_and_not_through_the_match():
    method, pair = densecl(), views(2)
    method(pair)[0].backward()
    with_gradient = {name.split(".")[0] for name, p in method.student.named_parameters() if p.grad is not None}
    assert with_gradient == {"backbone", "projector", "dense_projector"}
    assert all(p.grad is None for p in method.teacher.parameters())


@pytest.mark.parametrize(("setting", "value"), [("dense_weight", 1.5), ("temperature", 0.0), ("queue", 0)])
def test_what_densecl_cannot_use_is_named(setting, value):
    with pytest.raises(ValueError, match=rf"method\.{setting}={value}"):
        DenseClSettings(**{setting: value})


def test_byols_loss_is_the_papers():
    torch.manual_seed(0)
    method, (pair,) = Byol(create_backbone("test_resnet"), ByolSettings(**SMALL)).double(), views(3)
    loss, logs = method([pair])
    reference = Byol(create_backbone("test_resnet"), ByolSettings(**SMALL)).double()
    reference.load_state_dict(method.state_dict())
    expected = 0.0
    for query, key in ((0, 1), (1, 0)):
        student, teacher = reference.student, reference.teacher
        z = student["projector"](student["backbone"].forward_features(pair.pixels[query]).mean((2, 3)))
        p = student["predictor"](z)
        target = teacher["projector"](teacher["backbone"].forward_features(pair.pixels[key]).mean((2, 3)))
        expected += float(
            ((p / p.norm(dim=1, keepdim=True) - target / target.norm(dim=1, keepdim=True)) ** 2).sum(1).mean()
        )
    assert float(loss) == pytest.approx(expected, rel=1e-10)
    assert float(loss) == pytest.approx(4 - 4 * float(logs["positive_cosine"]), rel=1e-10)
