"""The heads on a backbone during pre-training, which are discarded afterwards."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clove_hub.batch_norm import MaskedBatchNorm


def dense_projector(channels: int, hidden: int = 4096, out: int = 256, *, biased: bool = False) -> nn.Sequential:
    """CLoVE's projector, a two-layer MLP on every cell: (B, channels, H, W) -> (B, out, H, W).

    1x1 convolutions without bias; batch norm and ReLU between them; a batch norm without scale and shift at the end.
    With `biased` PixPro's: the convolutions have biases, and no batch norm ends it. The names of the layers are those
    of the released checkpoints.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        linear1=nn.Conv2d(channels, hidden, 1, bias=biased),
        bn1=nn.BatchNorm2d(hidden),
        relu1=nn.ReLU(inplace=True),
        linear2=nn.Conv2d(hidden, out, 1, bias=biased),
    )
    if not biased:
        layers["bn2"] = nn.BatchNorm2d(out, affine=False)
    return nn.Sequential(layers)


class ContextualAttention(nn.Module):
    """Multi-head self-attention among the cells of one feature map (CLoVE section 3.2): (B, N, dim) -> (B, N, dim).

    With a `temperature`, each head scales its queries and keys to unit length and attends with
    softmax(q k^T / temperature); the projections have no bias. This is the paper's NMHSA.
    Without one it is plain scaled dot-product attention with biases, which the released weights were trained with.
    """

    def __init__(self, dim: int, heads: int, temperature: float | None) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads={heads} does not divide the feature dimension {dim}: choose a divisor of {dim}")
        self.heads = heads
        self.temperature = temperature
        self.qkv = nn.Linear(dim, 3 * dim, bias=temperature is None)
        self.out = nn.Linear(dim, dim)
        # Initialized as torch.nn.MultiheadAttention, so that both kinds start the same.
        nn.init.xavier_uniform_(self.qkv.weight)
        if self.qkv.bias is not None:
            nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.out.bias)

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, dim) -> three times (B, heads, N, dim / heads); queries and keys of unit length in the NMHSA."""
        batch, cells, dim = x.shape
        qkv = self.qkv(x).view(batch, cells, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.temperature is not None:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        return q, k, v

    @property
    def scale(self) -> float:
        """What the products of queries and keys are multiplied with before the softmax."""
        dim = self.out.in_features // self.heads
        return 1 / self.temperature if self.temperature is not None else dim**-0.5

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.queries_keys_values(x)
        context = F.scaled_dot_product_attention(q, k, v, scale=self.scale)  # (B, heads, N, dim / heads)
        out: Tensor = self.out(context.transpose(1, 2).flatten(2))
        return out

    @torch.no_grad()
    def weights(self, x: Tensor) -> Tensor:
        """The attention weights of each head, for figures: (B, N, dim) -> (B, heads, N, N), rows sum to one."""
        q, k, _ = self.queries_keys_values(x)
        return (q @ k.transpose(-2, -1) * self.scale).softmax(-1)


def pooled_projector(
    channels: int, hidden: int, out: int, layer: Callable[[int, int], nn.Module] = nn.Linear
) -> nn.Sequential:
    """MoCo v2's head, a two-layer MLP on pooled features (Chen et al. 2020, section 3): (B, channels) -> (B, out).

    With 1x1 convolutions as its layers DenseCL's dense head: (B, channels, H, W) -> (B, out, H, W).
    """
    return nn.Sequential(
        OrderedDict(linear1=layer(channels, hidden), relu1=nn.ReLU(inplace=True), linear2=layer(hidden, out))
    )


def byol_mlp(channels: int, hidden: int, out: int) -> nn.Sequential:
    """BYOL's projector and predictor, two layers with batch norm between (section 3.3): (B, channels) -> (B, out)."""
    return nn.Sequential(
        OrderedDict(
            linear1=nn.Linear(channels, hidden),
            bn1=nn.BatchNorm1d(hidden),
            relu1=nn.ReLU(inplace=True),
            linear2=nn.Linear(hidden, out),
        )
    )


class PixelPropagation(nn.Module):
    """PixPro's pixel-to-propagation module (section 3.2, Eq. 3 and 4): cells (B, N, dim) -> (B, N, dim).

    y_i = sum over j of max(cos(x_i, x_j), 0)^sharpness * g(x_j): each cell becomes a weighted sum of those it
    resembles. g is a linear layer (the paper's 1x1 convolution); its values are scaled to unit length, as in the
    released code.
    """

    def __init__(self, dim: int, sharpness: float = 2.0) -> None:
        super().__init__()
        self.sharpness = sharpness
        self.value_transform = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        unit = F.normalize(x, dim=-1)
        weights = (unit @ unit.mT).relu().pow(self.sharpness)  # (B, N, N)
        return weights @ F.normalize(self.value_transform(x), dim=-1)


def slotcon_projector(channels: int, hidden: int = 4096, out: int = 256) -> nn.Sequential:
    """SlotCon's projector, a three-layer MLP on every cell: (B, channels, H, W) -> (B, out, H, W)."""
    return slotcon_mlp(partial(nn.Conv2d, kernel_size=1), nn.BatchNorm2d, channels, hidden, out)


def slotcon_mlp(
    layer: Callable[[int, int], nn.Module], norm: Callable[[int], nn.Module], channels: int, hidden: int, out: int
) -> nn.Sequential:
    """Three layers with biases, a norm and GELU after the first two; numbered as in the released checkpoints."""
    layers = nn.Sequential(
        *(layer(channels, hidden), norm(hidden), nn.GELU()),
        *(layer(hidden, hidden), norm(hidden), nn.GELU()),
        layer(hidden, out),
    )
    return layers.apply(start_small)


def start_small(layer: nn.Module) -> None:
    """Weights from a normal distribution of deviation 0.02, cut at its tails; biases zero."""
    if isinstance(layer, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(layer.weight, std=0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


class SlotPredictor(nn.Module):
    """SlotCon's predictor, the projector's MLP on slots: (N, dim), of which those in `counts` count -> (N, dim)."""

    def __init__(self, dim: int, hidden: int = 4096) -> None:
        super().__init__()
        self.mlp = slotcon_mlp(nn.Linear, MaskedBatchNorm, dim, hidden, dim)

    def forward(self, slots: Tensor, counts: Tensor) -> Tensor:
        for layer in self.mlp:
            slots = layer(slots, counts) if isinstance(layer, MaskedBatchNorm) else layer(slots)
        return slots


class Prototypes(nn.Module):
    """SlotCon's `count` prototypes, which group the cells of a map: (B, dim, H, W) -> scores (B, count, H, W).

    The scores are the cosines of each cell to each prototype (section 3.1).
    """

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(count, dim))

    def forward(self, maps: Tensor) -> Tensor:
        return torch.einsum("kd,bdhw->bkhw", F.normalize(self.weight, dim=-1), F.normalize(maps, dim=1))


def pool_slots(maps: Tensor, scores: Tensor, chosen: Tensor, temperature: float) -> Tensor:
    """SlotCon's attentive pooling (section 3.2): the means of the cells, by how much each belongs to a prototype.

    Args:
        maps: (B, dim, H, W).
        scores: of these maps, (B, K, H, W).
        chosen: the prototypes of which slots are wanted, by number, of each image its own, (B, M).
        temperature: of the softmax over prototypes that shares out a cell.

    Returns:
        (B, M, dim).
    """
    belonging = (scores / temperature).softmax(1).flatten(2)  # (B, K, H * W)
    # A prototype that nothing belongs to has a mean too.
    belonging = belonging.gather(1, chosen.unsqueeze(2).expand(-1, -1, belonging.shape[2])) + 1e-6
    return belonging / belonging.sum(2, keepdim=True) @ maps.flatten(2).mT
