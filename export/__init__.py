"""How weights leave: bundles that timm loads as they are, and files in the names of other frameworks."""

from .bundle import Contents, check_bundle, export_run, from_run, write_bundle
from .convert import Converted, convert

__all__ = [
    "Contents",
    "Converted",
    "check_bundle",
    "convert",
    "export_run",
    "from_run",
    "write_bundle",
]
