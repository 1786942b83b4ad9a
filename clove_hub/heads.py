"""What sits on a backbone during pre-training and is thrown away afterwards."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def dense_projector(channels: int, hidden: int = 4096, out: int = 256) -> nn.Sequential:
    """CLoVE's projector, a two-layer MLP on every cell: (B, channels, H, W) -> (B, out, H, W).

    1x1 convolutions without bias; batch norm and ReLU between them; a batch norm without scale and shift at the end.
    The names of the layers are those of the released checkpoints.
    """
    return nn.Sequential(
        OrderedDict(
            linear1=nn.Conv2d(channels, hidden, 1, bias=False),
            bn1=nn.BatchNorm2d(hidden),
            relu1=nn.ReLU(inplace=True),
            linear2=nn.Conv2d(hidden, out, 1, bias=False),
            bn2=nn.BatchNorm2d(out, affine=False),
        )
    )


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
        # As torch.nn.MultiheadAttention starts, so that both kinds start alike.
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
        """The attention each head pays, for looking at: (B, N, dim) -> (B, heads, N, N), rows sum to one."""
        q, k, _ = self.queries_keys_values(x)
        return (q @ k.transpose(-2, -1) * self.scale).softmax(-1)


def pooled_projector(channels: int, hidden: int, out: int) -> nn.Sequential:
    """MoCo v2's head, a two-layer MLP on pooled features (Chen et al. 2020, section 3): (B, channels) -> (B, out)."""
    return nn.Sequential(
        OrderedDict(linear1=nn.Linear(channels, hidden), relu1=nn.ReLU(inplace=True), linear2=nn.Linear(hidden, out))
    )


def biased_projector(channels: int, hidden: int = 4096, out: int = 256) -> nn.Sequential:
    """PixPro's projector: as `dense_projector`, but the convolutions have biases and no batch norm ends it."""
    return nn.Sequential(
        OrderedDict(
            linear1=nn.Conv2d(channels, hidden, 1),
            bn1=nn.BatchNorm2d(hidden),
            relu1=nn.ReLU(inplace=True),
            linear2=nn.Conv2d(hidden, out, 1),
        )
    )


class PixelPropagation(nn.Module):
    """PixPro's pixel-to-propagation module (section 3.2, Eq. 3 and 4): cells (B, N, dim) -> (B, N, dim).

    y_i = sum over j of max(cos(x_i, x_j), 0)^sharpness * g(x_j): each cell becomes a mean of those it resembles. g is a
    linear layer (the paper's 1x1 convolution); its values are scaled to unit length, as in the released code.
    """

    def __init__(self, dim: int, sharpness: float = 2.0) -> None:
        super().__init__()
        self.sharpness = sharpness
        self.value_transform = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        unit = F.normalize(x, dim=-1)
        weights = (unit @ unit.mT).relu().pow(self.sharpness)  # (B, N, N)
        return weights @ F.normalize(self.value_transform(x), dim=-1)
