"""What an image source is, and the pieces that all sources are made of."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from clove_hub.data.images import BrokenImage, read_bytes
from clove_hub.views import Purpose, stream

_SAMPLED_IMAGES = 16  # whose content enters a fingerprint


class Encoded(NamedTuple):
    """One image as it is stored: its name, for messages, and the bytes of its file."""

    name: str
    data: bytes


class Source(Protocol):
    """Images that can be read in any order, from any process."""

    @property
    def name(self) -> str:
        """What a person calls the source: a data set's id, or the last part of a path."""

    @property
    def fingerprint(self) -> str:
        """64 hexadecimal digits that change with the images, wherever they are stored."""

    def __len__(self) -> int: ...

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """All indices in the order of an epoch, a pure function of (seed, epoch) and of what is stored."""

    def read(self, index: int) -> Encoded:
        """Reads image `index`.

        Raises:
            BrokenImage: its bytes cannot be had.
        """


def shuffled(seed: int, epoch: int, length: int) -> NDArray[np.int64]:
    """A permutation of `length` numbers, a pure function of its arguments.

    It sorts raw random numbers, because NumPy promises the same raw numbers for ever, but the same
    `permutation()` only within a version.
    """
    keys = np.asarray(stream(seed, epoch, 0, Purpose.ORDER).bit_generator.random_raw(length))
    order: NDArray[np.int64] = keys.argsort(kind="stable")
    return order


def shuffled_in_blocks(seed: int, epoch: int, starts: NDArray[np.int64], length: int, window: int) -> NDArray[np.int64]:
    """A permutation that goes from block to block, and only within `window` places departs from their order.

    The numbers up to `length` are cut into blocks that begin at `starts` (ascending, from 0). The blocks are
    shuffled; then each number moves a random distance in [0, window) toward the end, where what falls off
    goes on at the beginning; last, all of them go around by a random distance, so that each number is as
    likely at each place. At any time they come from about window / block blocks spread over the whole set,
    each block is used up within little more than `window` places (those that go around the end: within two
    such stretches), and a window of `length` or more shuffles completely.
    """
    rank = np.empty(len(starts), dtype=np.int64)
    rank[shuffled(seed, epoch, len(starts))] = np.arange(len(starts))
    by_block = np.repeat(rank, np.diff(starts, append=length)).argsort(kind="stable")
    raw = np.asarray(stream(seed, epoch, 1, Purpose.ORDER).bit_generator.random_raw(length + 1))
    distance = (raw[1:] >> np.uint64(11)) * 2.0**-53 * min(window, length)
    order = by_block[((np.arange(length) + distance) % length).argsort(kind="stable")]
    return np.roll(order, int(raw[0] % np.uint64(length)))


class Pending(NamedTuple):
    """An image of which not all is here yet: either its bytes, or the path or address they are read from."""

    name: str
    data: bytes | None
    path: str | None

    def read(self) -> Encoded:
        """Fetches the bytes where they are not here yet.

        Raises:
            BrokenImage: there are neither bytes nor a path, or the path cannot be read.
        """
        if self.data is not None:
            return Encoded(self.name, self.data)
        if self.path is None:
            raise BrokenImage(self.name, "the row holds no image")
        if "://" not in self.path:
            return Encoded(self.name, read_bytes(self.path, self.name))
        import fsspec  # type: ignore[import-untyped]

        try:
            with fsspec.open(self.path, "rb") as file:
                return Encoded(self.name, file.read())
        except Exception as error:  # a remote file system raises what its client library raises
            raise BrokenImage(self.name, f"cannot be read: {error}") from error


def pending(value: object, name: str) -> Pending:
    """What a cell of a data set says about its image: bytes, a path, or a mapping with either."""
    if isinstance(value, Mapping):
        data, path = value.get("bytes"), value.get("path")
        return Pending(f"{name} ({path})" if path else name, data, path)
    if isinstance(value, str):
        return Pending(f"{name} ({value})", None, value)
    return Pending(name, value if isinstance(value, bytes) else None, None)


class Names:
    """Millions of strings in two arrays instead of as many objects.

    Python counts references inside each string object, so a forked worker that goes through a list of them
    ends up with a copy of it all. Names are bytes, as file systems have them: not every name is valid UTF-8.
    """

    def __init__(self, names: Iterable[bytes]) -> None:
        listed = list(names)
        self._ends = np.fromiter(accumulate(map(len, listed), initial=0), np.int64, len(listed) + 1)
        self._text = np.frombuffer(b"".join(listed), np.uint8)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(f"name {index} of {len(self)}")
        return self._text[self._ends[index] : self._ends[index + 1]].tobytes()

    @property
    def arrays(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """All there is to know about the names, for a fingerprint."""
        return self._text, self._ends


def fingerprint(length: int, arrays: Iterable[NDArray[np.generic]], read: Callable[[int], Encoded]) -> str:
    """Hashes the number of images, what is known of each, and the bytes of sixteen spread over the set.

    Neither paths nor dates enter, so that a copy on another machine is the same source.
    """
    digest = hashlib.sha256(str(length).encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    for index in np.linspace(0, length - 1, min(length, _SAMPLED_IMAGES)).astype(int):
        try:
            data = read(int(index)).data
        except BrokenImage:
            data = b""
        digest.update(hashlib.sha256(data).digest())
    return digest.hexdigest()
