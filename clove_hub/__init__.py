"""Self-supervised backbones for dense prediction: pre-train, publish, find, fine-tune."""

from clove_hub.zoo.registry import register_when_timm_is_there

register_when_timm_is_there()
