"""How weights leave: bundles and their cards, the Hub, files in the names of other frameworks, and these frameworks' trainers.

Reading weights is not here (`clove_hub.weights`), nor is training in torchvision (`clove_hub.training.finetune`).
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
