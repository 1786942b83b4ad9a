"""Export of weights: bundles and their cards, the Hub, files for other frameworks, and these frameworks' trainers.

Reading weights is in `clove_hub.weights`, training in torchvision in `clove_hub.training.finetune`.
"""

from .bundle import check_bundle, write_bundle
from .contents import Contents, from_run
from .convert import Converted, convert
from .exporting import export_run

__all__ = [
    "Contents",
    "Converted",
    "check_bundle",
    "convert",
    "export_run",
    "from_run",
    "write_bundle",
]
