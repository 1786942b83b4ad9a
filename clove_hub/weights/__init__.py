"""Weights of any origin: `load`, `load_backbone`, and `load_method` for those of a whole method.

A SOURCE is

| what is given                                | what it is                                                          |
|----------------------------------------------|---------------------------------------------------------------------|
| `runs/photos`                                | a run: the exported encoder of its newest whole checkpoint          |
| `runs/photos/checkpoints/step_00000100`      | one checkpoint of a run                                             |
| `bundles/photos`, `local-dir:bundles/photos` | a bundle, or any folder that timm's `save_for_hf` wrote             |
| `clove_r50.pth`, `model.safetensors`, `.pkl` | a released checkpoint, or a state dict in the names of timm,        |
|                                              | torchvision, MMSegmentation or Detectron2                           |
| `hf-hub:organization/name[@revision]`        | a repository with a bundle, a model of timm, or the state of a run  |
| `resnet50`, `resnet50.a1_in1k`               | timm's own weights, of the default tag or of this one               |
| `resnet50.clove_in1k_200ep`                  | a model of the zoo: adopted, or of the namespace that was chosen    |
| `random:resnet50`                            | random weights, which follow from the seed                          |

`~` is expanded. A word that is both a timm model and a folder with weights is refused: `./resnet50` is the folder,
`hf-hub:timm/resnet50.a1_in1k` timm's. Checksums of runs, states and bundles are verified on every read.

The source determines the architecture: a run's state, a `config.json` in the folder or beside the file, `arch` or
`model` in a checkpoint. A file without that information is taken for the ResNet that its names and shapes fit, with a
note if they fit others too. `{"architecture": "resnetaa50"}` in a `config.json` beside a file specifies it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backbone import Backbone, load_backbone
    from .source import MethodState, load, load_method
    from .weights import Preprocessing, Weights, fingerprint

__all__ = [
    "METHOD_SOURCE",
    "SOURCE",
    "Backbone",
    "MethodState",
    "Preprocessing",
    "Weights",
    "fingerprint",
    "load",
    "load_backbone",
    "load_method",
]

SOURCE = (
    "a run's or bundle's folder, a file with weights (a released checkpoint or a state dict), "
    "hf-hub:organization/name[@revision], local-dir:FOLDER, a model of timm or of the zoo (resnet50.a1_in1k), "
    "or random:resnet50"
)
"""For messages and the help of every command that takes one."""

METHOD_SOURCE = "a run's folder, one of its checkpoints, or hf-hub:organization/name[@revision] of a published state"
"""The same for what needs a method with its settings: teacher, heads, views."""

_PLACES = {
    "backbone": ("Backbone", "load_backbone"),
    "source": ("MethodState", "load", "load_method"),
    "weights": ("Preprocessing", "Weights", "fingerprint"),
}


def __getattr__(name: str) -> Any:
    """On demand: SOURCE and the Hub's errors take no torch."""
    for place, names in _PLACES.items():
        if name in names:
            return getattr(import_module(f".{place}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
