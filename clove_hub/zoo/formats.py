"""The known tensor names in released files, one row for each kind.

The kinds are the files that the papers' authors released, and those of other implementations of the same methods.

Names are facts about files. Those of CLoVE, SlotCon and PixPro are known from their code (MIT or Apache-2.0); those of
the others from files that their code wrote, from users' reports about such files, and from the papers, only for names.
If a name is uncertain, or differs between versions, the row has it in `loose`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from .heads import (
    Shapes,
    clove_projector,
    conv,
    densecl_neck,
    linear,
    moco_head,
    moco_v3_mlp,
    norm,
    pixpro_projector,
    plain_mlp,
    queue,
    simsiam_heads,
    slotcon_mlp,
)

Encoder = Literal["student", "teacher", "backbone"]
"""`backbone` if there is only one, or the file does not state which of two it is."""


@dataclass(frozen=True)
class ReleasedFormat:
    """One kind of released file. Names are given without the prefix `module.` of distributed training."""

    name: str
    """The method's name in this package."""
    title: str
    encoders: Mapping[Encoder, str]
    """The prefix of each backbone's names."""
    exported: Encoder
    """The encoder used for the paper's downstream results."""
    methods: tuple[str, ...] = ()
    """Methods of the zoo with such released files; several if their names are the same."""
    heads: Shapes = field(default_factory=dict)
    """All required tensors beside the backbones."""
    optional: tuple[Shapes, ...] = ()
    """Optional groups of tensors, each complete or absent."""
    loose: tuple[str, ...] = ()
    """Prefixes of other possible names, of which nothing else is known."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Parts that some files hold twice, bit for bit: prefixes of the second names and of the first."""
    ours: Mapping[str, str] = field(default_factory=dict)
    """Prefixes of names and their replacements in clove-hub, if it supports the complete state."""
    changes: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    """Conversions of tensors that have another form in clove-hub, by their name there."""


MOCO_PAIR: Mapping[Encoder, str] = {"student": "encoder_q.", "teacher": "encoder_k."}
CLOVE_PAIR: Mapping[Encoder, str] = {"student": "encoder.", "teacher": "encoder_k."}

BYOL_PAIRS: tuple[tuple[str, str, tuple[str, ...], dict[str, str]], ...] = (
    # Prefixes of the student's backbone, of the teacher's, of the heads, and of duplicates. The first row is
    # lucidrains', the second sthalles', the fourth and fifth are OpenSelfSup's and MMSelfSup's, the last solo-learn's.
    (
        "online_encoder.net.",
        "target_encoder.net.",
        ("online_", "target_", "net.fc.", "online_encoder.net.fc.", "target_encoder.net.fc."),
        {"net.": "online_encoder.net."},
    ),
    (
        "online_network.encoder.",
        "target_network.encoder.",
        ("online_", "target_", "predictor."),
        {"encoder.": "online_network.encoder."},
    ),
    ("online_encoder.", "target_encoder.", ("online_", "target_"), {}),
    ("online_net.0.", "target_net.0.", ("online_", "target_", "head."), {"backbone.": "online_net.0."}),
    ("backbone.", "target_net.module.0.", ("target_net.", "neck.", "head."), {}),
    ("online_network.", "target_network.", ("online_", "target_", "predictor."), {}),
    ("backbone.", "momentum_backbone.", ("projector.", "momentum_", "predictor.", "classifier."), {}),
)
"""BYOL was released for JAX; these are the names in PyTorch versions of it, and in similar methods."""

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
        ours={
            "encoder.": "student.backbone.",
            "projector.": "student.projector.",
            "self_attn.in_proj_": "student.predictor.qkv.",
            "self_attn.out_proj.": "student.predictor.out.",
            "encoder_k.": "teacher.backbone.",
            "projector_k.": "teacher.projector.",
        },
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
        # The instance branch, which no released file has.
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
        title="MoCo v2 (of OpenSelfSup)",
        encoders={"student": "encoder_q.0.", "teacher": "encoder_k.0."},
        exported="student",
        heads={**moco_head("encoder_q.1.mlp"), **moco_head("encoder_k.1.mlp"), **queue("queue")},
        copies={"backbone.": "encoder_q.0."},
    ),
    ReleasedFormat(
        name="densecl",
        title="DenseCL (of MMSelfSup)",
        encoders={"student": "backbone.", "teacher": "encoder_k.module.0."},
        exported="student",
        heads={**queue("queue"), **queue("queue2")},
        loose=("neck.", "head.", "encoder_k."),
    ),
    ReleasedFormat(
        name="moco",
        title="MoCo v2 (of MMSelfSup)",
        encoders={"student": "backbone.", "teacher": "encoder_k.module.0."},
        exported="student",
        heads=queue("queue"),
        loose=("neck.", "head.", "encoder_k."),
    ),
    ReleasedFormat(
        name="densecl",
        title="DenseCL (of lightly)",
        encoders={"student": "backbone.", "teacher": "backbone_momentum."},
        exported="student",
        loose=("projection_head_global", "projection_head_local", "criterion_global.", "criterion_local."),
    ),
    ReleasedFormat(
        name="detco",
        title="DetCo (of OpenSelfSup)",
        encoders={"student": "backbone_q.", "teacher": "backbone_k."},
        exported="student",
        loose=("encoder_q_", "encoder_k_", "queue", "local_queue"),
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
        # The paper has a second queue, of backbone features; its name is not known.
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
    ReleasedFormat(
        name="moco_v3",
        title="MoCo v3",
        encoders={"student": "base_encoder.", "teacher": "momentum_encoder."},
        exported="student",
        heads={
            **moco_v3_mlp("base_encoder.fc", "channels"),
            **moco_v3_mlp("momentum_encoder.fc", "channels"),
            **moco_v3_mlp("predictor", "out"),
        },
    ),
    ReleasedFormat(
        name="simsiam",
        title="SimSiam",
        encoders={"backbone": "encoder."},
        exported="backbone",
        heads=simsiam_heads(),
    ),
    # DINO evaluates its teacher. Its code has student and teacher under separate keys, lightly under one.
    ReleasedFormat(
        name="dino",
        title="DINO",
        encoders={"student": "student.backbone.", "teacher": "teacher.backbone."},
        exported="teacher",
        loose=("student.head.", "teacher.head.", "dino_loss."),
    ),
    ReleasedFormat(
        name="dino",
        title="DINO (its teacher alone)",
        encoders={"teacher": "teacher.backbone."},
        exported="teacher",
        loose=("teacher.head.", "dino_loss."),
    ),
    ReleasedFormat(
        name="dino",
        title="DINO (of lightly)",
        encoders={"student": "student_backbone.", "teacher": "teacher_backbone."},
        exported="teacher",
        loose=("student_head.", "teacher_head.", "criterion."),
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
            **plain_mlp("projector", "hidden", "channels", bias=True),
            **linear("projector.6", "hidden", "hidden", bias=False),
        },
        # A head for each cell, and a classifier trained in parallel: VICRegL has them, files may lack them.
        loose=("maps_projector.", "classifier."),
    ),
    ReleasedFormat(
        name="barlow_twins",
        title="Barlow Twins",
        encoders={"backbone": "backbone."},
        exported="backbone",
        heads={
            **plain_mlp("projector", "hidden", "channels"),
            **linear("projector.6", "hidden", "hidden", bias=False),
            **norm("bn", "hidden", affine=False),
        },
    ),
    # The names that several methods share within one library, which do not identify the method.
    ReleasedFormat(
        name="backbone",
        title="a ResNet and its momentum copy, of lightly",
        encoders={"student": "backbone.", "teacher": "backbone_momentum."},
        exported="student",
        loose=("projection_head", "prediction_head", "criterion"),
    ),
    ReleasedFormat(
        name="backbone",
        title="a ResNet and its momentum copy, of solo-learn",
        encoders={"student": "backbone.", "teacher": "momentum_backbone."},
        exported="student",
        loose=("projector.", "momentum_", "predictor.", "classifier.", "head.", "queue", "prototypes."),
    ),
    ReleasedFormat(
        name="backbone",
        title="a ResNet within a method of solo-learn",
        encoders={"backbone": "backbone."},
        exported="backbone",
        heads=linear("classifier", "classes", "channels"),
        loose=("projector.", "predictor.", "prototypes.", "queue", "head."),
    ),
    ReleasedFormat(
        name="backbone",
        title="a ResNet within something (backbone.*)",
        encoders={"backbone": "backbone."},
        exported="backbone",
        # From lightly, and from OpenSelfSup and its successors.
        loose=("projection_head", "prediction_head", "prototypes.", "criterion", "neck.", "head."),
    ),
    ReleasedFormat(
        name="backbone",
        title="a student and a teacher",
        encoders={"student": "student.", "teacher": "teacher."},
        exported="teacher",
    ),
    # The names of timm and torchvision, of the released backbones of VICReg, DetCo and DenseCL, and of SlotCon's
    # "backbone only" files.
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
"""The row that matches the most tensors is chosen; of several such, the first."""
