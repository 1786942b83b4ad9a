"""A card's section on transformers: the backbone on its own, and inside a detector where supported."""

from __future__ import annotations

from functools import cache
from string import Template
from typing import Any

import timm
import torch

from clove_hub.weights.transformers import MODELS

BACKBONE = Template(
    """### With transformers

```python
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained($source)
model = AutoModel.from_pretrained($source)
inputs = processor(Image.open("photo.jpg").convert("RGB"), return_tensors="pt")
features = model(**inputs).last_hidden_state
```
"""
)
INSIDE = Template("""
To use it in a detector or segmenter of transformers 5 (`$models`), convert it (`pip install 'clove-hub[transformers]'`):

```bash
clove-hub convert $address --to transformers --model rt_detr_v2 --out $out
```

This writes a folder with the backbone's weights and a processor with its preprocessing, checks both, and prints the code that
loads it. A config of transformers 5 that only names this backbone gives random weights, even with `use_pretrained_backbone`.
""")


def with_transformers(source: str, address: str, out: str, architecture: str) -> str:
    """The card's section.

    Args:
        source: the arguments of `from_pretrained`.
        address: what `clove-hub convert` reads, and
        out: where it writes.
    """
    section = BACKBONE.substitute(source=source)
    if _goes_inside(architecture):
        section += INSIDE.substitute(models="`, `".join(MODELS), address=address, out=out)
    return section


@cache
def _goes_inside(architecture: str) -> bool:
    """Whether it takes images of any size and has the feature maps that each of MODELS wants; the conversion tries it."""
    cfg = timm.get_pretrained_cfg(architecture, allow_unregistered=True)
    if cfg is None or cfg.fixed_input_size:
        return False
    try:
        with torch.device("meta"):
            features: Any = timm.create_model(architecture, features_only=True)
        info = features.feature_info.info
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False
    strides = {level["reduction"] for level in info}
    return all(strides.issuperset(model.strides) for model in MODELS.values())
