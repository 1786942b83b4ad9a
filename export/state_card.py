"""The card of a published run: the full state of a method, for continuing its pre-training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import ModelCardData

from clove_hub.weights.run import Checkpoint

from .card import Published

STATE_CARD = Template("""---
$front
---

# Pre-training state of $backbone, $method

The complete state of $method after step $step of $steps_total, trained on $images images ("$data"): student, teacher,
heads and the optimizer's momentum. Use it to continue the pre-training. To use the backbone alone, take the bundle that
`clove-hub export` makes of the run.

| file | content |
|---|---|
| `model.safetensors` | student, teacher and heads |
| `optimizer.safetensors` | momentum of the optimizer |
| `state.json` | resolved recipe, versions, sha256 of the other files |

Start a new run from it:

```bash
clove-hub pretrain RECIPE run.init_from=hf-hub:$repository@$tag
```

| | |
|---|---|
| license | $license |
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
    name, link = license.get("license_name"), license.get("license_link")
    return STATE_CARD.substitute(
        front=front.to_yaml(),
        license=f"[{name}]({link})" if link else license["license"],
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
