"""LARS as the source papers' released code applies it, SGD as the same without adaptation, and the groups of parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.sgd import sgd


def parameter_groups(
    module: nn.Module, weight_decay: float, adapt: bool = True, decay_all: bool = False
) -> list[dict[str, Any]]:
    """Weights, which decay and adapt, apart from biases and norm scales (one dimension), which do neither.

    Args:
        adapt: false for plain SGD, where nothing adapts.
        decay_all: whether biases and norm scales decay too.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    weights, rest = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    return [
        {"params": weights, "weight_decay": weight_decay, "adapt": adapt},
        {"params": rest, "weight_decay": weight_decay if decay_all else 0.0, "adapt": False},
    ]


class LARS(Optimizer):
    """SGD with momentum and layer-wise adaptive rate scaling (You, Gitman, Ginsburg 2017, arXiv:1708.03888).

    With g the gradient plus weight decay: where a group adapts, g is scaled by trust * |w| / (|g| + eps), or left as
    it is where one of the norms is zero; then momentum <- beta * momentum + g, and w <- w - lr * momentum, which is
    torch's own fused SGD. Decay comes before the norm is taken. Every line handles all tensors of a group in one call,
    and works in the memory of the gradients: a step uses them up.
    """

    gate: Tensor | None = None
    """A boolean scalar on the weights' device. While it is false, steps leave weights and momentum as they are, whatever
    the gradients hold, without a host-device synchronization."""
    found_inf: Tensor | None = None
    """Set by float16's scaler around a step that it wants left out, as for torch's fused optimizers: one, else zero."""
    grad_scale: Tensor | None = None
    """Set by the scaler where gradients are still scaled; ours are not, they were measured before."""
    _step_supports_amp_scaling = True  # read by the scaler; otherwise the host would wait for its decision

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
        eps: float = 1e-8,
        adapt: bool = True,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"trust": trust, "eps": eps, "adapt": adapt})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "LARS takes its gradients as they are"
        assert self.grad_scale is None, "unscale the gradients first"
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            gradients: list[Tensor] = [p.grad for p in weights]
            if group["weight_decay"]:
                torch._foreach_add_(gradients, weights, alpha=group["weight_decay"])
            if group["adapt"]:
                torch._foreach_mul_(gradients, trust_ratios(weights, gradients, group))
            sgd(
                weights,
                gradients,
                [self.momentum(p) for p in weights],
                weight_decay=0.0,
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=0.0,
                nesterov=False,
                maximize=False,
                fused=True,
                found_inf=self.left_out(),
            )

    def momentum(self, parameter: Tensor) -> Tensor:
        """The running sum of a parameter's gradients, zero before its first step."""
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        momentum: Tensor = state["momentum"]
        return momentum

    def left_out(self) -> Tensor | None:
        """One where this step must change nothing, else zero; None where there is neither gate nor scaler."""
        if self.gate is None:
            return self.found_inf
        closed = self.gate.logical_not().float()
        return closed if self.found_inf is None else torch.maximum(closed, self.found_inf)


def trust_ratios(weights: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
    """The factor of each tensor, as scalars on its device, so that nothing waits for the host."""
    weight_norms, gradient_norms = norms(weights), norms(gradients)
    ratios = group["trust"] * weight_norms / (gradient_norms + group["eps"])
    return list(torch.where((weight_norms > 0) & (gradient_norms > 0), ratios, 1.0).unbind())


def norms(tensors: list[Tensor]) -> Tensor:
    """The Euclidean length of each tensor: dense ones of any memory format -> (len(tensors),)."""
    if tensors[0].is_cpu:
        return torch.stack([_cpu_norm(tensor.as_strided((tensor.numel(),), (1,))) for tensor in tensors])
    return torch.stack(list(torch._foreach_norm(tensors)))


_ROW = 8192  # numbers that are summed in the tensor's own type


def _cpu_norm(flat: Tensor) -> Tensor:
    """The length of a vector: that of its rows in float32, and of these lengths in float64.

    torch sums a long vector without pairing, and a dot product errs as the BLAS of the processor does: by 4e-5 and by up to
    1e-5 for two million float32 numbers. Rows of this length leave 1e-7 on any processor.
    """
    whole = flat.numel() // _ROW * _ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=1)
    rest = torch.linalg.vector_norm(flat[whole:], dim=0, keepdim=True)
    norm: Tensor = torch.linalg.vector_norm(torch.cat([rows, rest]), dtype=torch.float64).to(flat.dtype)
    return norm
