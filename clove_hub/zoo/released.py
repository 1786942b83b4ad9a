"""Checkpoints that the papers' authors released, with the method identified by their keys.

A released checkpoint holds a complete method: student, teacher, heads. Every tensor must match a row of the table in
`formats.py`: backbones the names and shapes of a ResNet, heads the row's; unexpected tensors are an error. Types are
unchanged (a float64 checkpoint stays float64). If clove-hub can train the method, the complete state also gets its
names.
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
    """A released checkpoint after reading."""

    format: str
    """The method whose code wrote it, by its name in this package."""
    title: str
    """The authors' name of the method, or as much as is known."""
    methods: tuple[str, ...]
    """Possible methods of the zoo."""
    architecture: str
    """The backbone's name in timm."""
    exported: Encoder
    """The encoder used for the paper's downstream results."""
    encoders: Mapping[Encoder, dict[str, Tensor]]
    """Its backbones, by timm's names."""
    heads: tuple[str, ...]
    """Names of all other tensors."""
    tensors: dict[str, Tensor]
    """By the names of clove-hub's state dict; empty without the complete state of a method that it can train."""

    def backbone(self, encoder: Encoder) -> dict[str, Tensor]:
        """One of the backbones, by timm's names.

        Raises:
            ValueError: the file does not have that backbone.
        """
        if encoder not in self.encoders:
            raise ValueError(f"this {self.title} checkpoint holds no {encoder}, only the {' and '.join(self.encoders)}")
        return self.encoders[encoder]


def read_released(path: str | Path) -> Released:
    """Read the complete state of a method that clove-hub can train, from a checkpoint that its authors released.

    Raises:
        ValueError: the file cannot be read safely (`read_tensors`), has no known format or no complete state, or a
            tensor is missing, unexpected or mis-shaped.
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
    """Identify tensors of a released format; None if they match none, not even for the most part.

    Raises:
        ValueError: they match one, but a tensor is missing, unexpected or mis-shaped.
    """
    bare = plain_names(tensors)
    if looks_like_detectron2(bare):
        head = {name: tensor for name, tensor in bare.items() if name.startswith("stem.fc.")}  # from MoCo's converter
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
    """The tensors by the names of the network's own code, with all its counters.

    Prefixes of distributed training, torch.compile and wrapping modules are removed, in any order; the indices of a
    `Sequential` of a ResNet's children become the children's names; and if no batch norm has `num_batches_tracked`, as
    before 2018, each gets one of 0, as in torch.
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
    if len(set(names.values())) < len(tensors):  # two names became equal
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
"""A ResNet's children that have tensors, by their index among all."""


def _unnumbered(name: str, starts: set[str]) -> str:
    """A name with a prefix in `starts`, with a child's name instead of its index."""
    for found in re.finditer(r"(?:^|(?<=\.))\d(?=\.)", name):
        if name[: found.start()] in starts:
            return name[: found.start()] + _CHILDREN.get(found[0], found[0]) + name[found.end() :]
    return name


@dataclass(frozen=True)
class _Fit:
    """The tensors of a file, matched to a row as far as possible."""

    row: ReleasedFormat
    parts: Mapping[str, dict[str, Tensor]]
    """The tensors of each backbone and of `loose`, by the prefix of their names."""
    architecture: str
    checked: Mapping[str, Tensor]
    """All but the loose ones."""
    expected: Mapping[str, tuple[int, ...]]

    @property
    def wrong(self) -> int:
        """Number of names that are missing, unexpected or mis-shaped."""
        return len(self.expected.keys() | self.checked.keys()) - in_place(self.checked, self.expected)


def _fit(row: ReleasedFormat, bare: Mapping[str, Tensor]) -> _Fit:
    """Match tensors to a row; if several prefixes match a name, the longest counts."""
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
    """Raise ValueError unless every tensor matches, and duplicates are equal."""
    row = fit.row
    if problems := differences(fit.checked, fit.expected):
        if row.name == "resnet":
            find_resnet(fit.parts[""], what)
        kind = family(bare)
        raise ValueError(
            f"{what} {f'is {kind}, not a backbone: it ' if kind else ''}comes closest to {row.title}, with a "
            f"{fit.architecture} as {' and '.join(f'{start}*' for start in row.encoders.values())}, but has "
            f"{'; '.join(problems)}. All names and shapes must match."
        )
    for copy, original in row.copies.items():
        same = {name: torch.equal(tensor, fit.parts[original][name]) for name, tensor in fit.parts[copy].items()}
        if other := [copy + name for name in same if not same[name]]:
            raise ValueError(
                f"{what} holds the backbone of {row.title} twice, as {copy}* and {original}*, and "
                f"{counted('tensor', other)} of the one differ from the other: it was changed after it was written"
            )


def _with_numbers(shapes: Shapes, tensors: Mapping[str, Tensor], known: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """The shapes with a number for every word, taken from the first tensor in the table that has it."""
    for name, shape in shapes.items():
        if name in tensors and tensors[name].ndim == len(shape):
            for size, word in zip(tensors[name].shape, shape, strict=True):
                if isinstance(word, str) and " " not in word:
                    known.setdefault(word, size)

    def number(size: int | str) -> int:
        if isinstance(size, int):
            return size
        times, _, word = size.rpartition(" ")
        return int(times or 1) * known.get(word, 0)  # 0 if no tensor has it, which is reported as missing

    return {name: tuple(map(number, shape)) for name, shape in shapes.items()}
