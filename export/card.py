"""The model card: only what is known about the weights, with the text of `model_cards/template.md`.

It is rendered from the bundle's other files, so it can be rendered again: with new results, or with the address of
the repository that it is published in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from string import Template
from typing import Any

from clove_hub.zoo.models import Model, Paper, find_model, papers
from clove_hub.zoo.resnets import RESNETS

from .card_origin import adopted_section, base_model, begun_with, hub_dataset, run_section, table, training_data
from .card_results import evaluation_section, results_of
from .card_transformers import with_transformers
from .cost import Cost
from .metadata import check_metadata, eval_results, metadata

UNKNOWN = "unknown"
"""The method of weights whose file does not state it: a plain ResNet may be trained with or without labels."""
PHOTO = Template(
    """transform = timm.data.create_transform(**timm.data.resolve_model_data_config($model), is_training=False)
image = transform(Image.open("photo.jpg").convert("RGB")).unsqueeze(0)"""
)
"""In the timm snippets: how to read a photo."""
BANDS = Template(
    """values = torch.from_numpy(tifffile.imread("image.tif") / 65535).float()  # 16 bits; / 255 for 8 bits
mean, std = torch.tensor($model.pretrained_cfg["mean"]), torch.tensor($model.pretrained_cfg["std"])
image = ((values.view(*values.shape[:2], -1) - mean) / std).permute(2, 0, 1).unsqueeze(0)"""
)
"""In the timm snippets: how to read an image (height, width, bands) that is not a photo."""
DETECTRON2 = Template("""
### With Detectron2

`clove-hub convert` (`pip install clove-hub`) writes the weights under Detectron2's names, with a matching config beside them:

```bash
clove-hub convert $source --to detectron2 --out $out
```
""")


@dataclass(frozen=True)
class Published:
    """The place on the Hub where a card is published."""

    repository: str
    """`organization/name`."""
    tag: str

    @property
    def source(self) -> str:
        """The source string for timm and the commands."""
        return f"hf-hub:{self.repository}@{self.tag}"


@dataclass(frozen=True)
class Facts:
    """Measured properties of a bundle's weights."""

    size: int
    """Bytes of the file."""
    parameters: int
    """Number of trainable parameters."""
    cost: Cost


def render_card(
    provenance: Mapping[str, Any], config: Mapping[str, Any], facts: Facts, at: Published | None = None
) -> str:
    """Render the card of a bundle, as Markdown with its front matter.

    Args:
        provenance: the content of clove_hub.json.
        config: the bundle's config.json, which states preprocessing and license.
        at: the repository and tag that the snippets load from; without it they load from the bundle's folder.

    Raises:
        ValueError: the front matter is invalid on the Hub (`check_metadata`).
    """
    paper = papers().get(provenance["method"])
    model = find_model(provenance["model"]) if provenance["model"] else None
    origin, cfg, architecture = provenance["origin"], config["pretrained_cfg"], config["architecture"]
    adopted = origin["kind"] == "adopted"
    if model:
        name = model.name
    elif adopted:
        name = origin["name"]
    else:
        name = f"{architecture}, pre-trained with {paper.name if paper else provenance['method']}"
    # The network that the backbone belongs to, if the file has more than one.
    whose = "backbone" if provenance["exported"] == "backbone" else f"{provenance['exported']}'s backbone"
    results = list(results_of(provenance, model))
    license = _license(provenance, config)
    known = provenance["method"] != UNKNOWN
    side, bands = cfg["input_size"][-1], cfg["input_size"][0]
    photos = bands == 3
    template = Template(files("clove_hub.model_cards").joinpath("template.md").read_text(encoding="utf-8"))
    card = template.substitute(
        front=_front_matter(provenance, name, license, model, results),
        name=name,
        summary=_summary(provenance, model, architecture, paper),
        model_type="self-supervised image feature backbone" if known else "image feature backbone",
        architecture=architecture,
        parameters=f"{facts.parameters / 1e6:.3g}",
        macs=f"{facts.cost.macs / 1e9:.3g}",
        activations=f"{facts.cost.activations / 1e6:.3g}",
        side=side,
        backbone=whose,
        details=_details(provenance, model, paper, license),
        intended_use=_intended_use(architecture in RESNETS and photos),
        setup=_setup(at, photos),
        bands=bands,
        sides=f"{side}, {side}" if photos else "height, width",
        reader="from PIL import Image" if photos else "import tifffile",
        model_image=(PHOTO if photos else BANDS).substitute(model="model"),
        backbone_image=(PHOTO if photos else BANDS).substitute(model="backbone"),
        timm_source=at.source if at else "local-dir:.",
        transformers=_transformers(at, architecture) if photos else "",
        detectron2=_detectron2(at) if architecture in RESNETS and photos else "",
        num_features=config["num_features"],
        preprocessing=_preprocessing(cfg),
        training=adopted_section(origin, whose, model) if adopted else run_section(provenance, model),
        evaluation=evaluation_section(results),
        limitations=_limitations(model),
        size=f"{facts.size:,}",
        sha256=provenance["sha256"]["model.safetensors"],
        curves="| `curves.png` | loss and signs of collapse |\n" if "curves.png" in provenance["sha256"] else "",
        citation=_citation(paper),
    )
    if license:
        check_metadata(card)
    return card


# ---- the front matter ------------------------------------------------------------------------------------------------


def _front_matter(
    provenance: Mapping[str, Any],
    name: str,
    license: Mapping[str, Any],
    model: Model | None,
    results: Sequence[Mapping[str, Any]],
) -> str:
    own = [result for result in results if result["own"]]
    known = [] if provenance["method"] == UNKNOWN else ["self-supervised", provenance["method"]]
    trained_on = model.data.hub if model else hub_dataset(provenance["origin"])
    front = metadata(
        name,
        eval_results(own),
        base_model=base_model(provenance["origin"]),
        datasets=[trained_on] if trained_on else None,
        library_name="timm",
        metrics=list(dict.fromkeys(metric for result in own for metric in result["metrics"])) or None,
        pipeline_tag="image-feature-extraction",
        tags=["timm", "transformers", *known],
        **license,
    ).to_yaml()
    return front if license else f"# license: not chosen yet\n{front}"


def _license(provenance: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, str]:
    """The license keys of the front matter; empty if no license was chosen yet."""
    told = {"license": config["pretrained_cfg"]["license"], **(provenance.get("license") or {})}
    return {key: value for key, value in told.items() if value is not None}


def shown_license(license: Mapping[str, str]) -> str:
    if "license_link" in license:
        return f"[{license['license_name']}]({license['license_link']})"
    return license.get("license", "not chosen yet")


# ---- the body --------------------------------------------------------------------------------------------------------


def _summary(provenance: Mapping[str, Any], model: Model | None, architecture: str, paper: Paper | None) -> str:
    method = paper.name if paper else provenance["method"]
    origin = provenance["origin"]
    if model:
        images = f"{model.data.images:,} images of {model.data.name} for {model.epochs} epochs"
    elif origin["kind"] == "run":
        images = f"{origin['data']['images']:,} images"
    else:
        labels = ", whether labels were used" if provenance["method"] == UNKNOWN else ""
        return (
            f"A {architecture} backbone without a classifier, converted from the file `{origin['file']}`. Its tensor names are "
            f"those of {origin['format']}. The file does not say how it was trained{labels}, or on which images."
        )
    stopped = "" if origin.get("finished", True) else " The weights were taken before the end of the training."
    began = (
        " It started from trained weights (see below), for which labels may have been used."
        if origin.get("pretrained")
        else ""
    )
    sentence = (
        f"A {architecture} backbone without a classifier, pre-trained with {method} on {images}. The pre-training used no "
        f"labels.{began} It is made for dense prediction: detection, segmentation and keypoints.{stopped}"
    )
    return f"{sentence}\n\n{model.text}" if model else sentence


def _details(
    provenance: Mapping[str, Any], model: Model | None, paper: Paper | None, license: Mapping[str, str]
) -> str:
    """Paper, code and training data, as far as known, and the license."""
    lines = []
    if paper:
        lines.append(f"- **Paper:** [{paper.title}](https://arxiv.org/abs/{paper.arxiv})")
        lines.append(f"- **Original code:** {paper.code}")
    origin = provenance["origin"]
    if model or origin["kind"] == "run":
        lines.append(f"- **Pre-training data:** {training_data(origin, model)}")
    if chain := begun_with(origin):
        lines.append(f"- **Started from:** {chain}")
    elif state := origin.get("recipe", {}).get("run", {}).get("init_from"):
        base = base_model(origin)
        lines.append(f"- **Started from:** {f'[{base}](https://huggingface.co/{base})' if base else f'`{state}`'}")
    lines.append(f"- **License:** {shown_license(license)}")
    return "\n".join(lines)


def _intended_use(plain_resnet: bool) -> str:
    converts = " Detectron2, torchvision and MMSegmentation load it after a conversion." if plain_resnet else ""
    return (
        "The backbone is a starting point for models of dense prediction: fine-tune it as part of a detector or of a "
        f"segmentation, keypoint or dense pose model.{converts} Its frozen features can also be used directly, "
        "for linear probes, nearest-neighbor search and matching of image regions.\n\n"
        "It is not a classifier, and predicts nothing until a head has been trained on it."
    )


def _setup(at: Published | None, photos: bool) -> str:
    needs = "`pip install timm tifffile` installs what the snippets need."
    if photos:
        needs = "`pip install timm` installs what the first three snippets need; the fourth also needs `pip install transformers`."
    where = (
        f"All snippets load version `{at.tag}` of this repository, also after a newer one is published."
        if at
        else "Run the snippets in the folder of this file."
    )
    return f"{needs} Replace `{'photo.jpg' if photos else 'image.tif'}` by an image of your own. {where}"


def _transformers(at: Published | None, architecture: str) -> str:
    if at:
        return with_transformers(f'"{at.repository}", revision="{at.tag}"', at.source, "detector", architecture)
    return with_transformers('"."', ".", "../detector", architecture)


def _detectron2(at: Published | None) -> str:
    if at:
        return DETECTRON2.substitute(source=at.source, out="backbone.pth")
    return DETECTRON2.substitute(source=".", out="../backbone.pth")  # a bundle holds no other files


def _preprocessing(cfg: Mapping[str, Any]) -> str:
    side = cfg["input_size"][-1]
    return table(
        {
            "colors": "RGB"
            if len(cfg["mean"]) == 3
            else f"{len(cfg['mean'])} bands, scaled so that the largest value of the file's type is 1",
            "resize": f"shorter side to {math.floor(side / cfg['crop_pct'])} pixels, {cfg['interpolation']}",
            "crop": f"{side} x {side} pixels, {cfg['crop_mode']}",
            "mean": ", ".join(f"{value:g}" for value in cfg["mean"]),
            "standard deviation": ", ".join(f"{value:g}" for value in cfg["std"]),
        }
    )


def _limitations(model: Model | None) -> str:
    """Limitations of every such backbone; about the images only what is known."""
    images = f"photos of {model.data.name}" if model else "training images"
    unlike = "natural photos, such as medical, satellite or document images" if model else "the training images"
    return (
        f"- The features reflect the {images}. Subjects, regions, cameras and styles that are rare there are represented "
        "worse, and biases in those images carry over to models that are fine-tuned from this backbone. Evaluate on your own "
        "data before you rely on it.\n"
        f"- It may do worse on images that differ strongly from {unlike}.\n"
        "- The license covers the weights. The terms of the training images are separate; check that they allow your use."
    )


def _citation(paper: Paper | None) -> str:
    """The method's paper and, if others released the weights, theirs."""
    if paper is None:
        return ""
    cited = [papers()[key] for key in dict.fromkeys((paper.method, paper.released_by))]
    told = (f"{one.title}, arXiv:{one.arxiv}\n\n```bibtex\n{one.bibtex.strip()}\n```" for one in cited)
    return "\n## Citation\n\n" + "\n\n".join(told)
