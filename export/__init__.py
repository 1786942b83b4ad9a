"""How weights leave: bundles that timm loads as they are, and files in the names of other frameworks."""

from clove_hub.weights.sources import Source, load_source

from .bundle import Weights, check_bundle, from_run, write_bundle
from .commands import convert, export_run
from .convert import Converted, convert_source

__all__ = [
    "Converted",
    "Source",
    "Weights",
    "check_bundle",
    "convert",
    "convert_source",
    "export_run",
    "from_run",
    "load_source",
    "write_bundle",
]
