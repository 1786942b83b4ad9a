"""The contents of a bundle before it is written, and how a run provides them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from clove_hub.evaluation.adaptation import adaptations
from clove_hub.runs import read_rows
from clove_hub.weights.run import Checkpoint
from clove_hub.weights.weights import Preprocessing
from clove_hub.zoo.models import Model


@dataclass(frozen=True)
class Contents:
    """Everything that a bundle contains, from any origin."""

    what: str
    """For messages: `the student in runs/photos/checkpoints/step_00000150`."""
    architecture: str
    """Its name in timm."""
    tensors: Mapping[str, Tensor]
    """Tensors of the headless backbone, by timm's names."""
    method: str
    """The id of the method that trained it."""
    exported: str
    """Which encoder it is: `student` or `teacher`."""
    preprocessing: Preprocessing
    origin: Mapping[str, Any]
    """Plain data about the origin of the weights, for clove_hub.json and the card; `kind` is `run` or `adopted`."""
    license: str | None
    """License of the weights, as an id of the Hub; None if none was chosen yet, which the card then states."""
    model: Model | None = None
    """The zoo entry of these weights, if adopted, or that they reproduce, if from a run."""
    run: Path | None = None
    """The run's folder; the card then shows its curves."""
    model_args: Mapping[str, Any] = field(default_factory=dict)
    """Additional arguments of `timm.create_model` that the architecture needs, such as `img_size`."""
    license_name: str | None = None
    """Name of a license `other`, as `license_link` is its URL."""
    license_link: str | None = None


def from_run(
    state: Checkpoint,
    license: str | None = None,
    model: Model | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
) -> Contents:
    """The exported encoder of a run's checkpoint.

    Args:
        model: the zoo entry that the run reproduces; the bundle then has its name.

    Raises:
        ValueError: the run is not finished, or its training differs from the model's; the message says how.
    """
    if model is not None:
        compared = {
            "method": (state.method, model.method),
            "exported encoder": (state.exported, model.exported),
            "architecture": (state.backbone, model.architecture),
            "images": (state.data["images"], model.data.images),
            "epochs": (state.recipe.get("schedule", {}).get("epochs"), model.epochs),
            "side of the views": (state.preprocessing.size, model.input_size),
            "finished": (state.finished, True),
            "changes during training": (len(state.changes), 0),
        }
        if other := [f"{what} {found}, not {wanted}" for what, (found, wanted) in compared.items() if found != wanted]:
            raise ValueError(
                f"this run is not {model.name}: {'; '.join(other)}. Export it without --as, or run `clove-hub pretrain "
                f"{model.recipe}` to its end"
            )
    told = (
        "step",
        "steps_total",
        "epoch",
        "finished",
        "images_seen",
        "data",
        "recipe",
        "changes",
        "pretrained",
        "hardware",
        "versions",
    )
    helped = adaptations(read_rows(state.folder.parents[1] / "evaluations.jsonl"), state.step)
    return Contents(
        what=f"the {state.exported} in {state.folder}",
        architecture=state.backbone,
        tensors=state.tensors(),
        method=state.method,
        exported=state.exported,
        preprocessing=state.preprocessing,
        origin={
            "kind": "run",
            **{key: getattr(state, key) for key in told},
            "checkpoint_sha256": state.files,
            "adaptation": [one._asdict() for one in helped] if state.pretrained else [],
        },
        license=license,
        model=model,
        run=state.folder.parents[1],
        model_args=state.model_args,
        license_name=license_name,
        license_link=license_link,
    )
