"""The card of a published run: the full state of a method, for continuing its pre-training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import ModelCardData

from clove_hub.weights.run import Checkpoint
from clove_hub.zoo.models import papers

from .card import Published, shown_license

STATE_CARD = Template("""---
$front
---

# Model card for the pre-training state of $backbone, $title

The state of $title with a $backbone backbone after step $step of $steps_total, pre-trained without labels on $images images
($data): student, teacher, heads and the optimizer's momentum. It is made for continuing the pre-training.

- **Method:** `$method`$paper
- **License:** $license

## How to use

`pip install clove-hub` installs what both ways need.

Start a new run from the weights of student, teacher and heads:

```bash
clove-hub pretrain RECIPE data.path=PHOTOS run.init_from=hf-hub:$repository@$tag
```

RECIPE is a recipe of clove-hub (`clove-hub pretrain --help` lists them) or a file of your own. Its method, backbone and heads must
be those of the recipe in `state.json`. PHOTOS is a folder of images. The optimizer starts anew.

Load the backbone alone, in Python:

```python
import clove_hub

backbone = clove_hub.load_backbone("hf-hub:$repository@$tag")
```

## Files

| file | content |
|---|---|
| `model.safetensors` | student, teacher and heads |
| `optimizer.safetensors` | momentum of the optimizer |
| `state.json` | the complete recipe, versions, sha256 of the other files |

| | |
|---|---|
$sums
""")


def render_state_card(state: Checkpoint, sums: Mapping[str, str], license: Mapping[str, Any], at: Published) -> str:
    """Render the card, as Markdown with its front matter.

    Args:
        sums: sha256 of each file.
        license: `license` and, with `other`, `license_name` and `license_link`.
        at: the repository and tag of the publication.
    """
    front = ModelCardData(library_name="clove-hub", tags=["self-supervised", state.method], **license)
    paper = papers().get(state.method)
    return STATE_CARD.substitute(
        front=front.to_yaml(),
        title=paper.name if paper else state.method,
        paper=f", [{paper.title}](https://arxiv.org/abs/{paper.arxiv})" if paper else "",
        license=shown_license({key: value for key, value in license.items() if value is not None}),
        method=state.method,
        backbone=state.backbone,
        step=f"{state.step:,}",
        steps_total=f"{state.steps_total:,}",
        images=f"{state.data['images']:,}",
        data=Path(str(state.data["name"])).name,
        repository=at.repository,
        tag=at.tag,
        sums="\n".join(f"| sha256 of {name} | `{sum}` |" for name, sum in sorted(sums.items())),
    )
