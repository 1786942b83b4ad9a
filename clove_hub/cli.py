"""The command line: it names the commands and nothing else; each is imported when it is called."""

from __future__ import annotations

import sys
from importlib.metadata import version

from clove_hub.command import Group, execute

DOWNSTREAM = Group(
    "Fine-tune a backbone on a task, score it, and write results.json.",
    "engine",
    {
        "torchvision": (
            "detection, masks, keypoints, segmentation, on one folder of data",
            "clove_hub.training.finetune.command:TORCHVISION",
        ),
        "transformers": (
            "DETR, RT-DETRv2, D-FINE, Mask2Former, UperNet, as `from_pretrained` opens them",
            "clove_hub.training.transformers.command:TRANSFORMERS",
        ),
        "detectron2": (
            "the papers' seven tasks, as they ran them; needs Detectron2",
            "clove_hub.export.detectron2.command:DETECTRON2",
        ),
        "mmseg": (
            "SlotCon's three segmentation tasks, as config and weights or run; needs MMSegmentation",
            "clove_hub.export.mmseg.command:MMSEG",
        ),
    },
)

COMMANDS = Group(
    "Self-supervised backbones for dense prediction: pre-train, publish, find, fine-tune.",
    "command",
    {
        "pretrain": ("pre-train a backbone by a recipe, on one device", "clove_hub.training.command:PRETRAIN"),
        "methods": (
            "list the methods, their costs and recipes",
            "clove_hub.training.listing:METHODS",
        ),
        "models": ("list the models of the zoo and where their weights are", "clove_hub.zoo.listing:MODELS"),
        "check": ("decode every image of a data set and check it against its annotations", "clove_hub.check:CHECK"),
        "demo": ("run the whole pipeline in a few minutes, on a handful of photos", "clove_hub.demo.command:DEMO"),
        "export": ("turn a run into a bundle that timm loads", "clove_hub.export.exporting:EXPORT"),
        "publish": ("publish a bundle on the Hub, or show what that would do", "clove_hub.export.publish:PUBLISH"),
        "adopt": ("turn a checkpoint that a paper's authors released into a bundle", "clove_hub.export.adopt:ADOPT"),
        "inspect": (
            "show what a file of weights is, without executing or writing anything",
            "clove_hub.export.inspect:INSPECT",
        ),
        "evaluate": (
            "evaluate a backbone without fine-tuning it, by a named protocol",
            "clove_hub.evaluation.command:EVALUATE",
        ),
        "figures": ("draw what a run did and what a backbone has learned", "clove_hub.figures.command:FIGURES"),
        "downstream": ("fine-tune a backbone on detection, masks, keypoints, segmentation", DOWNSTREAM),
        "predict": (
            "find objects or classes in photos with a fine-tuned model",
            "clove_hub.training.finetune.predict:PREDICT",
        ),
        "results": ("collect results into one table, or into a bundle's card", "clove_hub.export.results:RESULTS"),
        "convert": ("convert a backbone for another library", "clove_hub.export.convert:CONVERT"),
    },
)


def main(arguments: list[str] | None = None) -> int:
    """Runs `clove-hub ARGUMENTS`, those of the process by default; returns the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    return execute(COMMANDS, words, "clove-hub", f"clove-hub {version('clove-hub')}")


if __name__ == "__main__":
    sys.exit(main())
