"""What networks are that no backbone can be taken from here, so that a refusal can say what was found."""

from __future__ import annotations

import re
from collections.abc import Iterable

FAMILIES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("the whole state of a run (give the run's folder)", (r"student\.backbone\.", r"teacher\.backbone\.")),
    ("a torchvision detector", (r"backbone\.body\.", r"rpn\.head\.")),
    ("a torchvision segmenter", (r"backbone\.conv1\.", r"classifier\.\d+\.")),
    ("a Detectron2 detector", (r"backbone\.(bottom_up|stem)\.", r"(proposal_generator|roi_heads|head)\.")),
    ("an MMDetection detector", (r"backbone\.", r"(rpn_head|roi_head|bbox_head)\.")),
    ("an MMSegmentation network", (r"backbone\.", r"decode_head\.")),
    ("a DETR detector", (r"query_embed\.weight", r"transformer\.")),
    ("a YOLO detector", (r"model\.\d+\.(cv\d|conv)\.",)),
    ("a Swin transformer", (r"layers\.\d+\.blocks\.\d+\.attn\.relative_position_bias_table",)),
    ("a vision transformer", (r"(patch_embed\.proj|patch_embeddings\.projection|conv_proj)\.weight",)),
    ("a vision transformer", (r"(cls_token|class_token|class_embedding)",)),
    ("a ConvNeXt", (r"(stages\.\d+\.)(blocks\.)?\d+\.(conv_dw|dwconv|depthwise_conv)\.",)),
    ("a ResNet with a deep stem (ResNet-D)", (r"conv1\.\d+\.weight", r"layer1\.0\.conv1\.weight")),
    ("a ResNet in the names of transformers", (r"embedder\.embedder\.convolution\.weight",)),
    ("an EfficientNet or MobileNet", (r"(conv_stem|_conv_stem|features\.0\.0)\.weight",)),
    ("a VGG or AlexNet", (r"features\.0\.weight",)),
    ("a language model", (r"(embed_tokens|wte|word_embeddings)\.weight",)),
    ("a diffusion model", (r"(down_blocks\.0|input_blocks\.0)\.",)),
    ("a set of LoRA weights", (r"lora_(A|B|up|down)",)),
)
"""What a network is called, and patterns all of which begin a part of its names."""


def family(names: Iterable[str]) -> str | None:
    """What a network with tensors of these names is; None if it is none of those known here."""
    listed = "\n".join(names)
    for title, patterns in FAMILIES:
        if all(re.search(rf"(^|\.){pattern}", listed, re.MULTILINE) for pattern in patterns):
            return title
    return None
