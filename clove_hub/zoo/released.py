"""Checkpoints that the papers' authors released: which method a file holds, told by its keys.

A released checkpoint holds a whole method: student, teacher, heads. Every tensor must have its place in a row of the table
in `formats.py`: backbones are held to the names and shapes of a ResNet, heads to the row's, and what has no place is an
error. Nothing is cast on the way (a float64 checkpoint stays float64). Where the method is one that is trained here, the
whole state gets our names too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .checks import counted, differences, printable
from .formats import FORMATS, Encoder, ReleasedFormat
from .heads import Shapes
from .resnets import RESNETS, closest_resnet, family, find_resnet, in_place, looks_like_detectron2, rename
from .tensors import BRANCHES, read_tensors


@dataclass(frozen=True)
class Released:
    """A released checkpoint, read."""

    format: str
    """The method whose code wrote it, as this package calls it."""
    title: str
    """The same as its authors call it, or what is known if that is less."""
    methods: tuple[str, ...]
    """Methods of the zoo that it can be."""
    architecture: str
    """The backbone's name in timm."""
    exported: Encoder
    """Which encoder the paper's downstream results were made with."""
    encoders: Mapping[Encoder, dict[str, Tensor]]
    """The backbones that it holds, by timm's names."""
    heads: tuple[str, ...]
    """Names of all other tensors."""
    tensors: dict[str, Tensor]
    """By the names of our method's state dict; empty if the file does not hold a whole state of a method of ours."""

    def backbone(self, encoder: Encoder) -> dict[str, Tensor]:
        """One of the backbones, by timm's names.

        Raises:
            ValueError: the file does not hold that one.
        """
        if encoder not in self.encoders:
            raise ValueError(f"this {self.title} checkpoint holds no {encoder}, only the {' and '.join(self.encoders)}")
        return self.encoders[encoder]


def read_released(path: str | Path) -> Released:
    """Reads the whole state of a method that is trained here, from a checkpoint that its authors released.

    Raises:
        ValueError: the file cannot be read safely (`read_tensors`), it is no known format, it does not hold a whole
            state, or a tensor is missing, unexpected or mis-shaped.
    """
    tensors, _ = read_tensors(path)
    released = recognize(tensors, str(path))
    if released is None or not released.tensors:
        what = f"{released.title}: only its backbone can be taken" if released else "no released checkpoint known here"
        raise ValueError(
            f"{path} is {what}. Found {len(tensors)} tensors such as {', '.join(map(printable, list(tensors)[:3]))}; "
            "expected the whole state of a method, such as CLoVE's (module.encoder.*, module.encoder_k.*, "
            "module.self_attn.*)"
        )
    return released


def recognize(tensors: Mapping[str, Tensor], what: str) -> Released | None:
    """What these tensors are, if they are a released format; None if they are none, not even for the most part.

    Raises:
        ValueError: they are one, but a tensor is missing, unexpected or mis-shaped.
    """
    bare = plain_names(tensors)
    if looks_like_detectron2(bare):
        head = {name: tensor for name, tensor in bare.items() if name.startswith("stem.fc.")}  # of MoCo's converter
        bare = rename({name: tensor for name, tensor in bare.items() if name not in head}, "detectron2", "timm", what)
        bare |= {name.removeprefix("stem."): tensor for name, tensor in head.items()}
    fits = [
        _fit(row, bare) for row in FORMATS if all(f"{start}conv1.weight" in bare for start in row.encoders.values())
    ]
    best = min(fits, key=lambda fit: fit.wrong, default=None)
    if best is None or 2 * in_place(best.checked, best.expected) < len(best.expected):
        return None
    _require(best, bare, what)
    row, parts = best.row, best.parts
    encoders = {encoder: parts[start] for encoder, start in row.encoders.items()}
    in_backbones = {start + name for start in (*row.encoders.values(), *row.copies) for name in parts[start]}
    heads = tuple(name for name in bare if name not in in_backbones)
    ours = {}
    for name, tensor in bare.items() if row.ours else ():
        start = max((start for start in row.ours if name.startswith(start)), key=len)
        new = row.ours[start] + name.removeprefix(start)
        ours[new] = row.changes[new](tensor) if new in row.changes else tensor
    assert len(ours) in (0, len(bare)), "two names became one"
    return Released(row.name, row.title, row.methods, best.architecture, row.exported, encoders, heads, ours)


def plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names that the network's own code gives them, and all the counters that it would have.

    Left out is what distributed training, torch.compile and modules around a network put in front of every name, in any
    order; the numbers of a `Sequential` made of a ResNet's children become these children's names; and where no batch
    norm has its `num_batches_tracked`, as before 2018, each gets one that says 0, as torch does.
    """
    names = {name: name.replace("_orig_mod.", "") for name in tensors}
    for _ in range(MOST_AROUND):
        around = next(
            (prefix for prefix in AROUND if names and all(bare.startswith(prefix) for bare in names.values())), ""
        )
        names = {name: bare.removeprefix(around) for name, bare in names.items()}
    for branch in BRANCHES:
        wrapped = [name for name, bare in names.items() if bare.startswith(f"{branch}.")]
        if all(names[name].startswith(f"{branch}.module.") for name in wrapped):
            names |= {name: names[name].replace(".module.", ".", 1) for name in wrapped}
    numbered = {found[1] for bare in names.values() if (found := _NUMBERED.fullmatch(bare))}
    names = {name: _unnumbered(bare, numbered) for name, bare in names.items()}
    if len(set(names.values())) < len(tensors):  # two became one
        return dict(tensors)
    plain = {names[name]: tensor for name, tensor in tensors.items()}
    if not any(name.endswith(".num_batches_tracked") for name in plain):
        norms = [name.removesuffix("running_mean") for name in plain if name.endswith(".running_mean")]
        plain |= {f"{norm}num_batches_tracked": torch.tensor(0) for norm in norms}
    return plain


AROUND = ("module.", "model.", "encoder.", "backbone.")
MOST_AROUND = 8
_NUMBERED = re.compile(r"((?:.*\.)?)4\.0\.conv1\.weight")
_CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
"""A ResNet's children that have tensors, by their place among all."""


def _unnumbered(name: str, starts: set[str]) -> str:
    """A name whose beginning is one of `starts`, with a child's name for its number."""
    for found in re.finditer(r"(?:^|(?<=\.))\d(?=\.)", name):
        if name[: found.start()] in starts:
            return name[: found.start()] + _CHILDREN.get(found[0], found[0]) + name[found.end() :]
    return name


@dataclass(frozen=True)
class _Fit:
    """The tensors of a file, each at its place in a row as far as it has one."""

    row: ReleasedFormat
    parts: Mapping[str, dict[str, Tensor]]
    """The tensors of each backbone and of what is `loose`, by what their names begin with."""
    architecture: str
    checked: Mapping[str, Tensor]
    """All but the loose ones."""
    expected: Mapping[str, tuple[int, ...]]

    @property
    def wrong(self) -> int:
        """How many names are missing, have no place or another shape."""
        return len(self.expected.keys() | self.checked.keys()) - in_place(self.checked, self.expected)


def _fit(row: ReleasedFormat, bare: Mapping[str, Tensor]) -> _Fit:
    """Where several beginnings fit a name, the longest counts."""
    shapes = dict(row.heads)
    for group in row.optional:
        if bare.keys() & group.keys():
            shapes |= group
    starts = (*row.encoders.values(), *row.copies, *row.loose)
    parts: dict[str, dict[str, Tensor]] = {start: {} for start in starts}
    for name, tensor in bare.items():
        start = max((start for start in starts if name.startswith(start)), key=len, default=None)
        if start is not None and name not in shapes:
            parts[start][name.removeprefix(start)] = tensor
    architecture = closest_resnet(parts[row.encoders[row.exported]])
    network = RESNETS[architecture]
    expected = _with_numbers(shapes, bare, {"channels": network.channels})
    for start in (*row.encoders.values(), *(copy for copy in row.copies if parts[copy])):
        expected |= {start + name: shape for name, shape in network.shapes.items()}
    loose = {start + name for start in row.loose for name in parts[start]}
    checked = {name: tensor for name, tensor in bare.items() if name not in loose}
    return _Fit(row, parts, architecture, checked, expected)


def _require(fit: _Fit, bare: Mapping[str, Tensor], what: str) -> None:
    """Raises ValueError unless every tensor has its place, and what is there twice is the same twice."""
    row = fit.row
    if problems := differences(fit.checked, fit.expected):
        if row.name == "resnet":
            find_resnet(fit.parts[""], what)
        kind = family(bare)
        raise ValueError(
            f"{what} {f'is {kind}, not a backbone: it ' if kind else ''}comes nearest to {row.title}, with a "
            f"{fit.architecture} as {' and '.join(f'{start}*' for start in row.encoders.values())}, but has "
            f"{'; '.join(problems)}. Every tensor must have its place."
        )
    for copy, original in row.copies.items():
        same = {name: torch.equal(tensor, fit.parts[original][name]) for name, tensor in fit.parts[copy].items()}
        if other := [copy + name for name in same if not same[name]]:
            raise ValueError(
                f"{what} holds the backbone of {row.title} twice, as {copy}* and {original}*, and "
                f"{counted('tensor', other)} of the one differ from the other: it was changed after it was written"
            )


def _with_numbers(shapes: Shapes, tensors: Mapping[str, Tensor], known: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """The shapes with a number for every word: that of the first tensor in the table which has it."""
    for name, shape in shapes.items():
        if name in tensors and tensors[name].ndim == len(shape):
            for size, word in zip(tensors[name].shape, shape, strict=True):
                if isinstance(word, str) and " " not in word:
                    known.setdefault(word, size)

    def number(size: int | str) -> int:
        if isinstance(size, int):
            return size
        times, _, word = size.rpartition(" ")
        return int(times or 1) * known.get(word, 0)  # 0 if no tensor has it; those are reported as missing

    return {name: tuple(map(number, shape)) for name, shape in shapes.items()}
