"""Checkpoints that the papers' authors released: which method a file holds, told by its keys.

FORMATS is a table of what is known about their names, one row for each kind of file; it makes this file long. A released
checkpoint holds a whole method: student, teacher, heads. Every tensor must have its place in the row, backbones are held
to the names and shapes of a ResNet, heads to the row's, and what has no place is an error. Nothing is cast on the way (a
float64 checkpoint stays float64). Where the method is one that is trained here, the whole state gets our names too.

Names are facts about files. Those of CLoVE, SlotCon and PixPro are known from their code (MIT or Apache-2.0); those of
SwAV, ReSim and DetCo were looked up in theirs, for names alone; those of MoCo, DenseCL and VICReg are from what users
report of the files and from the papers, their code was not read. Where a name is not certain, the row says `loose`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from .resnets import RESNETS, closest_resnet, family, find_resnet, in_place, looks_like_detectron2, rename
from .tensors import counted, differences, printable, read_tensors

Encoder = Literal["student", "teacher", "backbone"]
"""`backbone` where there is only one, or the file does not say which of two it is."""
Shape: TypeAlias = "tuple[int | str, ...]"
"""Of a tensor in a head. A word stands for a number that is the same wherever the word is; `channels` is the backbone's
last feature map's, `3 out` is three times `out`."""
Shapes: TypeAlias = Mapping[str, Shape]

CLOVE_PARTS = {
    "encoder.": "student.backbone.",
    "projector.": "student.projector.",
    "self_attn.in_proj_": "student.predictor.qkv.",
    "self_attn.out_proj.": "student.predictor.out.",
    "encoder_k.": "teacher.backbone.",
    "projector_k.": "teacher.projector.",
}
"""What a name begins with in the released CLoVE code (sthalles/CLoVE on GitHub), after `module.`; and with us."""


@dataclass(frozen=True)
class ReleasedFormat:
    """One kind of released file. Names are told without `module.`, which distributed training puts in front."""

    name: str
    """The method, as this package calls it."""
    title: str
    encoders: Mapping[Encoder, str]
    """What the names of each backbone begin with."""
    exported: Encoder
    """Which of them the paper's downstream results were made with."""
    methods: tuple[str, ...] = ()
    """Methods of the zoo whose released files look like this. Several where the names cannot tell them apart."""
    heads: Shapes = field(default_factory=dict)
    """All that there must be beside the backbones."""
    optional: tuple[Shapes, ...] = ()
    """What there may be: of each, all or nothing."""
    loose: tuple[str, ...] = ()
    """Beginnings of further names that there may be, of which no more is known."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Parts that some files hold twice, bit for bit: beginnings of the second names and of the first."""
    ours: Mapping[str, str] = field(default_factory=dict)
    """Beginnings of names and what they are with us, if the whole state has a place here."""
    changes: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    """What becomes of tensors that have another form with us, by our name."""


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


def linear(at: str, out: int | str, into: int | str, bias: bool = True, sides: tuple[int, ...] = ()) -> Shapes:
    return {f"{at}.weight": (out, into, *sides)} | ({f"{at}.bias": (out,)} if bias else {})


conv = partial(linear, sides=(1, 1))


def norm(at: str, width: str, affine: bool = True) -> Shapes:
    leaves = ("weight", "bias", "running_mean", "running_var")[0 if affine else 2 :]
    return {**{f"{at}.{leaf}": (width,) for leaf in leaves}, f"{at}.num_batches_tracked": ()}


def clove_projector(at: str) -> Shapes:
    """Two 1x1 convolutions without bias, each with a batch norm, the second of which has no affine part."""
    return {
        **conv(f"{at}.linear1", "hidden", "channels", bias=False),
        **norm(f"{at}.bn1", "hidden"),
        **conv(f"{at}.linear2", "out", "hidden", bias=False),
        **norm(f"{at}.bn2", "out", affine=False),
    }


def pixpro_projector(at: str, into: str = "channels") -> Shapes:
    return {
        **conv(f"{at}.linear1", "hidden", into),
        **norm(f"{at}.bn1", "hidden"),
        **conv(f"{at}.linear2", "out", "hidden"),
    }


def slotcon_mlp(at: str, into: str, layer: Callable[[str, str, str], Shapes]) -> Shapes:
    return {
        **layer(f"{at}.mlp.0", "hidden", into),
        **norm(f"{at}.mlp.1", "hidden"),
        **layer(f"{at}.mlp.3", "hidden", "hidden"),
        **norm(f"{at}.mlp.4", "hidden"),
        **layer(f"{at}.mlp.6", "out", "hidden"),
    }


def moco_head(at: str) -> Shapes:
    return {**linear(f"{at}.0", "hidden", "channels"), **linear(f"{at}.2", "out", "hidden")}


def densecl_neck(at: str) -> Shapes:
    """One MLP on the pooled features, one on each cell."""
    return {
        **linear(f"{at}.mlp.0", "hidden", "channels"),
        **linear(f"{at}.mlp.2", "out", "hidden"),
        **conv(f"{at}.mlp2.0", "hidden", "channels"),
        **conv(f"{at}.mlp2.2", "out", "hidden"),
    }


def queue(name: str) -> Shapes:
    """Keys of earlier images, a column each, and the place of the next one."""
    return {name: ("out", "length"), f"{name}_ptr": (1,)}


MOCO_PAIR: Mapping[Encoder, str] = {"student": "encoder_q.", "teacher": "encoder_k."}
CLOVE_PAIR: Mapping[Encoder, str] = {"student": "encoder.", "teacher": "encoder_k."}

BYOL_PAIRS: tuple[tuple[str, str, tuple[str, ...], dict[str, str]], ...] = (
    # Beginnings of the student's backbone, of the teacher's, of the heads, and of what is there twice.
    ("online_encoder.net.", "target_encoder.net.", ("online_", "target_", "net.fc."), {"net.": "online_encoder.net."}),
    ("online_encoder.", "target_encoder.", ("online_", "target_"), {}),
    ("online_net.0.", "target_net.0.", ("online_", "target_", "head."), {"backbone.": "online_net.0."}),
    ("online_network.", "target_network.", ("online_", "target_", "predictor."), {}),
    ("backbone.", "momentum_backbone.", ("projector.", "momentum_", "predictor.", "classifier."), {}),
)
"""BYOL itself was released for JAX; these are names of PyTorch versions of it, and of methods built like it."""

FORMATS: tuple[ReleasedFormat, ...] = (
    ReleasedFormat(
        name="clove",
        title="CLoVE",
        encoders=CLOVE_PAIR,
        exported="student",
        methods=("clove",),
        heads={
            **clove_projector("projector"),
            "self_attn.in_proj_weight": ("3 out", "out"),
            "self_attn.in_proj_bias": ("3 out",),
            **linear("self_attn.out_proj", "out", "out"),
            **clove_projector("projector_k"),
        },
        ours=CLOVE_PARTS,
    ),
    ReleasedFormat(
        name="pixpro",
        title="PixPro",
        encoders=CLOVE_PAIR,
        exported="student",
        methods=("pixpro",),
        heads={
            **pixpro_projector("projector"),
            **pixpro_projector("projector_k"),
            **conv("value_transform", "out", "out"),
        },
        # The instance branch, which none of the released files has.
        optional=(
            {
                **pixpro_projector("projector_instance"),
                **pixpro_projector("projector_instance_k"),
                **pixpro_projector("predictor", into="out"),
            },
        ),
        ours={
            "encoder.": "student.backbone.",
            "projector.": "student.projector.",
            "value_transform.": "student.predictor.value_transform.",
            "projector_instance.": "student.instance_projector.",
            "predictor.": "student.instance_predictor.",
            "encoder_k.": "teacher.backbone.",
            "projector_k.": "teacher.projector.",
            "projector_instance_k.": "teacher.instance_projector.",
        },
        changes={"student.predictor.value_transform.weight": lambda weight: weight.flatten(1)},
    ),
    ReleasedFormat(
        name="slotcon",
        title="SlotCon",
        encoders=MOCO_PAIR,
        exported="teacher",
        methods=("slotcon",),
        heads={
            **slotcon_mlp("projector_q", "channels", conv),
            **slotcon_mlp("projector_k", "channels", conv),
            "center": (1, "prototypes"),
            "grouping_q.slot_embed.weight": ("prototypes", "out"),
            "grouping_k.slot_embed.weight": ("prototypes", "out"),
            **slotcon_mlp("predictor_slot", "out", linear),
        },
        ours={
            "encoder_q.": "student.backbone.",
            "projector_q.mlp.": "student.projector.",
            "grouping_q.slot_embed.": "student.prototypes.",
            "predictor_slot.": "student.predictor.",
            "encoder_k.": "teacher.backbone.",
            "projector_k.mlp.": "teacher.projector.",
            "grouping_k.slot_embed.": "teacher.prototypes.",
            "center": "center",
        },
    ),
    ReleasedFormat(
        name="densecl",
        title="DenseCL",
        encoders={"student": "encoder_q.0.", "teacher": "encoder_k.0."},
        exported="student",
        heads={**densecl_neck("encoder_q.1"), **densecl_neck("encoder_k.1"), **queue("queue"), **queue("queue2")},
        copies={"backbone.": "encoder_q.0."},
    ),
    ReleasedFormat(
        name="moco",
        title="MoCo v2 (or a method of the same names, such as MoCo-kNN without its second queue, or ReSim-C4)",
        encoders=MOCO_PAIR,
        exported="student",
        methods=("moco", "moco_knn"),
        heads={**moco_head("encoder_q.fc"), **moco_head("encoder_k.fc"), **queue("queue")},
        ours={
            "encoder_q.fc.0.": "student.projector.linear1.",
            "encoder_q.fc.2.": "student.projector.linear2.",
            "encoder_q.": "student.backbone.",
            "encoder_k.fc.0.": "teacher.projector.linear1.",
            "encoder_k.fc.2.": "teacher.projector.linear2.",
            "encoder_k.": "teacher.backbone.",
            "queue_ptr": "queue_start",
            "queue": "queue",
        },
        changes={"queue": lambda keys: keys.t().contiguous(), "queue_start": lambda place: place.reshape(())},
    ),
    ReleasedFormat(
        name="resim",
        title="ReSim (with its feature pyramid)",
        encoders=MOCO_PAIR,
        exported="student",
        heads={**moco_head("encoder_q.fc"), **moco_head("encoder_k.fc"), **queue("queue")},
        loose=("encoder_q.fpn_", "encoder_k.fpn_"),
    ),
    ReleasedFormat(
        name="moco_knn",
        title="MoCo-kNN",
        encoders=MOCO_PAIR,
        exported="student",
        methods=("moco_knn",),
        heads={**moco_head("encoder_q.fc"), **moco_head("encoder_k.fc"), **queue("queue")},
        # The paper says that there is a second queue, of backbone features; its name is not known here.
        loose=("queue", "knn", "backbone_queue", "feature_queue", "memory"),
    ),
    ReleasedFormat(
        name="moco",
        title="MoCo v2 (or a method of the same names; its query encoder alone)",
        encoders={"student": "encoder_q."},
        exported="student",
        methods=("moco", "moco_knn"),
        optional=(moco_head("encoder_q.fc"),),
    ),
    ReleasedFormat(
        name="slotcon",
        title="SlotCon (its teacher's backbone alone)",
        encoders={"teacher": "encoder_k."},
        exported="teacher",
        methods=("slotcon",),
    ),
    *(
        ReleasedFormat(
            name="byol",
            title=f"BYOL-style ({student}* and {teacher}*)",
            encoders={"student": student, "teacher": teacher},
            exported="student",
            loose=loose,
            copies=copies,
        )
        for student, teacher, loose, copies in BYOL_PAIRS
    ),
    ReleasedFormat(
        name="vicreg",
        title="VICReg or VICRegL",
        encoders={"backbone": "backbone."},
        exported="backbone",
        heads={
            **linear("projector.0", "hidden", "channels"),
            **norm("projector.1", "hidden"),
            **linear("projector.3", "hidden", "hidden"),
            **norm("projector.4", "hidden"),
            **linear("projector.6", "hidden", "hidden", bias=False),
        },
        # A head for each cell, and a classifier that is trained beside: VICRegL has them, files may lack them.
        loose=("maps_projector.", "classifier."),
    ),
    ReleasedFormat(
        name="backbone",
        title="a ResNet within something (backbone.*)",
        encoders={"backbone": "backbone."},
        exported="backbone",
    ),
    # What timm and torchvision write, and the form in which VICReg, DetCo and DenseCL have released backbones, and
    # SlotCon its "backbone only" files.
    ReleasedFormat(
        name="resnet",
        title="a ResNet alone",
        encoders={"backbone": ""},
        exported="backbone",
        methods=("slotcon",),
        loose=("fc.",),
    ),
    ReleasedFormat(
        name="swav",
        title="SwAV-style",
        encoders={"backbone": ""},
        exported="backbone",
        loose=("projection_head.", "prototypes."),
    ),
)
"""The row in which the most tensors have their place is the one; of several such, the first."""


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
    """What these tensors are, if they are a released format; None if they are not.

    Raises:
        ValueError: they are one, but a tensor is missing, unexpected or mis-shaped.
    """
    if looks_like_detectron2(tensors):
        tensors = rename(tensors, "detectron2", "timm", what)
    bare = without_prefixes(tensors)
    fits = [
        _fit(row, bare) for row in FORMATS if all(f"{start}conv1.weight" in bare for start in row.encoders.values())
    ]
    if not fits:
        return None
    best = min(fits, key=lambda fit: fit.wrong)
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


def without_prefixes(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Names without what distributed training and torch.compile put in front of every one."""
    for prefix in ("module.", "_orig_mod.", "module."):
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


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
            f"{what}{f' is {kind}, not a backbone: it' if kind else ''} has, among names like those of {row.title}, "
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
