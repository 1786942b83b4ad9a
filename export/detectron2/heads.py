"""The C4 head with an extra batch norm, as in the papers' C4 protocols. Importing this registers it."""

from __future__ import annotations

from typing import Any

from detectron2.layers import get_norm
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads
from torch import nn


@ROI_HEADS_REGISTRY.register()
class Res5ExtraNormROIHeads(Res5ROIHeads):  # type: ignore[misc]
    """`Res5ROIHeads` with a batch norm after res5 (He et al. 2020, MoCo, appendix).

    The feature maps of a self-supervised backbone differ in scale from those for which Detectron2's learning rate was
    tuned; the norm compensates for it. It has no tensors in the backbone's file.
    """

    @classmethod
    def _build_res5_block(cls, cfg: Any) -> tuple[nn.Sequential, int]:
        blocks, channels = super()._build_res5_block(cfg)
        blocks.add_module("norm", get_norm(cfg.MODEL.RESNETS.NORM, channels))
        return blocks, channels
