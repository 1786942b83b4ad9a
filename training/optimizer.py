"""The optimizers and their groups of parameters.

LARS is implemented as in the papers' released code, SGD the same without adaptation; the others are timm's.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from timm.optim._optim_factory import create_optimizer_v2, get_optimizer_info
from timm.optim._param_groups import param_groups_layer_decay
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.sgd import sgd

OWN = ("lars", "sgd")
OF_TIMM = (
    *("adam", "adamw", "nadam", "nadamw", "radam", "radamw", "adamax", "adopt", "adoptw", "adafactorbv", "adagrad"),
    *("adadelta", "lion", "rmsprop", "rmsproptf", "nesterov", "sgdp", "sgdw"),
)
"""Those of timm that resume exactly, because their whole state is in tensors."""


def require_optimizer(name: str) -> None:
    """Raises ValueError unless there is such an optimizer."""
    if name not in OWN + OF_TIMM:
        near = difflib.get_close_matches(name, OWN + OF_TIMM, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(
            f"optimizer.name={name!r}{hint}: choose one of {', '.join(OWN + OF_TIMM)}. Other optimizers of timm keep state "
            "that checkpoints would not include"
        )


def make_optimizer(module: nn.Module, chosen: Any, backbones: Mapping[str, nn.Module] | None = None) -> Optimizer:
    """The optimizer of a method; the learning rate is set at every step.

    Args:
        chosen: a recipe's `OptimizerSettings`.
        backbones: the timm model in the student, by the beginning of its parameters' names.
    """
    scales, never = backbone_groups(backbones or {}, chosen.layer_decay, chosen.backbone_rate)
    groups = parameter_groups(
        module, chosen.weight_decay, chosen.name == "lars", chosen.decay_all, scales=scales, never=never
    )
    if chosen.name in OWN:
        return LARS(groups, lr=0.0, momentum=chosen.momentum, trust=chosen.trust, eps=chosen.eps)
    info, more = get_optimizer_info(chosen.name), {}
    if info.has_betas and chosen.betas is not None:
        if len(chosen.betas) != info.num_betas:
            raise ValueError(
                f"optimizer.betas={list(chosen.betas)}: {chosen.name} has {info.num_betas}, give as many or null"
            )
        more["betas"] = chosen.betas
    if info.has_eps:
        more["eps"] = chosen.eps
    made: Optimizer = create_optimizer_v2(
        groups, opt=chosen.name, lr=0.0, weight_decay=chosen.weight_decay, momentum=chosen.momentum, **more
    )
    return made


def backbone_groups(
    backbones: Mapping[str, nn.Module], layer_decay: float, rate: float
) -> tuple[dict[str, float], set[str]]:
    """By name, the learning rate factors of backbone parameters, and the parameters that never decay.

    Layers are counted as in timm (`param_groups_layer_decay`, from BEiT): the last has the full rate, the one before it
    `layer_decay` of it, and so on to the stem. The parameters that the architecture names in `no_weight_decay` never
    decay.
    """
    scales: dict[str, float] = {}
    never: set[str] = set()
    for prefix, backbone in backbones.items():
        names = {parameter: f"{prefix}{name}" for name, parameter in backbone.named_parameters()}
        never |= {f"{prefix}{name}" for name in getattr(backbone, "no_weight_decay", set)()}
        for group in param_groups_layer_decay(backbone, layer_decay=layer_decay) if layer_decay < 1 else ():
            scales |= {names[parameter]: rate * group["lr_scale"] for parameter in group["params"]}
        if layer_decay == 1 and rate < 1:
            scales |= dict.fromkeys(names.values(), rate)
    return scales, never


def parameter_groups(
    module: nn.Module,
    weight_decay: float,
    adapt: bool = True,
    decay_all: bool = False,
    *,
    scales: Mapping[str, float] | None = None,
    never: Iterable[str] = (),
) -> list[dict[str, Any]]:
    """Weights, which decay and adapt, apart from biases and norm scales (one dimension), which do neither.

    Args:
        adapt: false for plain SGD, where nothing adapts.
        decay_all: whether biases and norm scales decay too.
        scales: learning rate factors by name, where they are not 1.
        never: names of parameters that do not decay whatever their shape.
    """
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    never = set(never)
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    for weights in (True, False):
        for name, parameter in trained:
            if (parameter.ndim > 1 and name not in never) != weights:
                continue
            scale = (scales or {}).get(name, 1.0)
            decays = weights or decay_all
            group = {"params": [], "weight_decay": weight_decay if decays else 0.0, "adapt": adapt and weights}
            groups.setdefault((scale, weights), group | {"scale": scale, "decays": decays})["params"].append(parameter)
    return list(groups.values())


def set_rates(optimizer: Optimizer, rate: float, weight_decay: float | None = None) -> None:
    """Set each group's learning rate for the next step, and the weight decay if it varies."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
        if weight_decay is not None and group["decays"]:
            group["weight_decay"] = weight_decay


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
