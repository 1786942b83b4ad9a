"""How weights leave: bundles that timm loads as they are, and files in the names of other frameworks."""

from .bundle import build_bundle, check_bundle
from .commands import convert, export_run
from .convert import Converted, convert_source
from .sources import Source, load_source

__all__ = [
    "Converted",
    "Source",
    "build_bundle",
    "check_bundle",
    "convert",
    "convert_source",
    "export_run",
    "load_source",
]
