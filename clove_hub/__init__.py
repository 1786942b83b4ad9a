"""Self-supervised backbones for dense prediction: pre-train, publish, find, fine-tune.

Each command has a function with the same settings. The names below are imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from clove_hub.zoo.registry import register_when_timm_is_there

if TYPE_CHECKING:
    from .evaluation.command import evaluate
    from .evaluation.suite import evaluate_suite
    from .export.adopt import adopt
    from .export.convert import convert
    from .export.exporting import export_run
    from .export.publish import publish
    from .methods import create_method, register_method
    from .training.finetune.detector import Detector, load_detector
    from .training.pretrain import RunResult, pretrain
    from .training.transform import Transform, collate
    from .views import DeviceViews, ViewSpec
    from .weights.backbone import load_backbone
    from .zoo.models import list_models
    from .zoo.registry import create_model

    __version__: str

_PLACES = {
    "Detector": "clove_hub.training.finetune.detector",
    "DeviceViews": "clove_hub.views",
    "RunResult": "clove_hub.training.pretrain",
    "Transform": "clove_hub.training.transform",
    "ViewSpec": "clove_hub.views",
    "adopt": "clove_hub.export.adopt",
    "collate": "clove_hub.training.transform",
    "convert": "clove_hub.export.convert",
    "create_method": "clove_hub.methods",
    "create_model": "clove_hub.zoo.registry",
    "evaluate": "clove_hub.evaluation.command",
    "evaluate_suite": "clove_hub.evaluation.suite",
    "export_run": "clove_hub.export.exporting",
    "list_models": "clove_hub.zoo.models",
    "load_backbone": "clove_hub.weights.backbone",
    "load_detector": "clove_hub.training.finetune.detector",
    "pretrain": "clove_hub.training.pretrain",
    "publish": "clove_hub.export.publish",
    "register_method": "clove_hub.methods",
}

__all__ = [
    "Detector",
    "DeviceViews",
    "RunResult",
    "Transform",
    "ViewSpec",
    "__version__",
    "adopt",
    "collate",
    "convert",
    "create_method",
    "create_model",
    "evaluate",
    "evaluate_suite",
    "export_run",
    "list_models",
    "load_backbone",
    "load_detector",
    "pretrain",
    "publish",
    "register_method",
]

register_when_timm_is_there()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("clove-hub")
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
