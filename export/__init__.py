"""How weights leave: bundles that timm loads as they are, and files in the names of other frameworks."""

from .bundle import Contents, check_bundle, from_run, write_bundle
from .commands import convert, export_run
from .convert import Converted, convert_source

__all__ = [
    "Contents",
    "Converted",
    "check_bundle",
    "convert",
    "convert_source",
    "export_run",
    "from_run",
    "write_bundle",
]
