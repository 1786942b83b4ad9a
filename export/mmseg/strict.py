"""A hook of MMEngine that stops a training whose backbone is not the converted one. Importing this registers it.

MMEngine itself only logs what it could not place.
"""

from __future__ import annotations

from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class RequireBackbone(Hook):  # type: ignore[misc]
    """Compares every tensor before the first step.

    Args:
        file: the converted backbone.
    """

    def __init__(self, file: str) -> None:
        self.file = file

    def before_train(self, runner: Any) -> None:
        """Raises ValueError where a tensor is missing, left over or of another value."""
        if runner.iter > 0:  # a run that goes on holds what it has learned
            return
        expected = torch.load(self.file, map_location="cpu", weights_only=True)["state_dict"]
        model = getattr(runner.model, "module", runner.model)
        held = {name: tensor.cpu() for name, tensor in model.backbone.state_dict().items()}
        wrong = sorted(expected.keys() ^ held.keys())
        wrong += [name for name in expected if name in held and not torch.equal(held[name], expected[name])]
        if wrong:
            raise ValueError(
                f"the network does not hold the backbone of {self.file}: {len(wrong)} of {len(expected)} tensors are "
                f"not in their place or of another value ({', '.join(wrong[:4])})"
            )
