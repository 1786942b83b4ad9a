"""The `data` section of a recipe."""

from dataclasses import dataclass

from clove_hub.settings import PathText

KINDS = ("folder", "huggingface", "shards")


@dataclass(frozen=True)
class DataSettings:
    """Where the images come from, and how many processes read them.

    Raises:
        ValueError: a value is out of range, or two contradict each other.
    """

    path: PathText | tuple[PathText, ...]
    """A folder, or a list of folders that are one source together; a data set's id on the Hub or its path; tar files such
    as shards/{000..099}.tar."""
    source: str = "folder"
    """`folder`, `huggingface` or `shards`."""
    split: str = "train"
    """Of a data set."""
    column: str = "image"
    """Of a data set; of shards the ending of the member, or `image` for whichever is one."""
    subset: str | None = None
    """The configuration of a data set that has several."""
    streaming: bool = False
    """Read a data set while it downloads, in the order in which it comes."""
    length: int | None = None
    """Images of an epoch of a stream, where the data set does not say."""
    workers: int = 8
    """Processes that read and crop, for each training process."""
    cache: bool = False
    """Keep decoded images in memory, each from its first use on; for sets that fit."""
    draft: int | None = None
    """Decode a JPEG at 1/2, 1/4 or 1/8 of its size where its short side stays this long (512)."""

    def __post_init__(self) -> None:
        if not self.path or not all(self.path):
            raise ValueError("data.path is empty; give the folder, the data set or the tar files to train on")
        if self.source not in KINDS:
            raise ValueError(f"data.source={self.source!r} is not known; use one of {', '.join(KINDS)}")
        if not isinstance(self.path, str) and self.source != "folder":
            raise ValueError(
                f"data.path={list(self.path)}: several paths are for data.source=folder, not for {self.source!r}; "
                "give one path"
            )
        if self.workers < 0:
            raise ValueError(f"data.workers={self.workers}; use 0 (read in the training process) or more")
        if self.length is not None and self.length < 1:
            raise ValueError(f"data.length={self.length}; an epoch has at least one image")
        if self.streaming and self.source != "huggingface":
            raise ValueError(f"data.streaming is for data.source=huggingface, not for {self.source!r}")
        if self.length is not None and not self.streaming:
            raise ValueError("data.length is for data.streaming=true; every other source is counted")
        if self.cache and self.streaming:
            raise ValueError(
                "data.cache keeps images by their number, which a stream (data.streaming=true) has none of"
            )
        if self.draft is not None and self.draft < 1:
            raise ValueError(f"data.draft={self.draft}; it is the shortest side in pixels that is enough, such as 512")
        if self.subset is not None and self.source != "huggingface":
            raise ValueError(f"data.subset is for data.source=huggingface, not for {self.source!r}")

    @property
    def only_path(self) -> str:
        """The path of a source that has just one."""
        assert isinstance(self.path, str)
        return self.path
