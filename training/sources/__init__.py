"""Sources of images for pre-training: a folder, a Hugging Face data set, tar shards; and the cache of decoded images.

Decoding is in `clove_hub.data.images`, the order of the images in `..run.sampler`.
"""

from clove_hub.data.images import BrokenImage, fast_jpeg

from ..settings import DataSettings
from .cache import Cache, open_cache
from .folder import Folder, open_folders
from .huggingface import Stream, open_dataset
from .shards import open_shards
from .source import Encoded, Pending, Source

__all__ = [
    "BrokenImage",
    "Cache",
    "DataSettings",
    "Encoded",
    "Folder",
    "Pending",
    "Source",
    "Stream",
    "fast_jpeg",
    "open_cache",
    "open_source",
]


def open_source(settings: DataSettings) -> Source | Stream:
    """Opens the images that a recipe's `data` section names, without decoding them.

    Raises:
        ValueError: there is nothing there, or nothing that can be used; the message says what was looked for.
    """
    if settings.source == "folder":
        return open_folders(settings.paths, settings.reading.suffixes)
    if settings.source == "shards":
        return open_shards(settings.only_path, settings.column, settings.reading.suffixes)
    return open_dataset(settings)
