"""The model card: what is known about the weights and nothing else, worded by `model_cards/template.md`.

It is rendered from the bundle's other files, so that it can be rendered again: with new results, or with the address of
the repository that it is published in.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from string import Template
from typing import Any

from clove_hub.evaluation.adaptation import Adaptation, markdown
from clove_hub.weights.weights import restriction
from clove_hub.zoo.models import Model, Paper, find_model, papers, protocols
from clove_hub.zoo.resnets import RESNETS

from .card_transformers import with_transformers
from .cost import Cost
from .metadata import check_metadata, eval_results, metadata

PRINTED = {
    ("paper", True): "from the paper",
    ("page", True): "from the authors' page",
    ("paper", False): "from another paper",
    ("page", False): "from another paper's page",
}
"""What the card calls a figure, by where it was printed and whether by those who released the weights."""
UNKNOWN = "unknown"
"""The method of weights whose file does not tell it: a ResNet alone may be trained with labels or without."""
BASELINES = {"supervised": "supervised", "random": "random weights"}
"""What figures are compared with, by its name in `Protocol.baselines`."""
AP = (
    " AP is averaged over thresholds of 0.5 to 0.95 unless its name says 50 or 75 (bb: boxes, mk: masks, kp: keypoints, "
    "gps: dense poses, gpsm: dense poses with masks)."
)
PHOTO = Template(
    """transform = timm.data.create_transform(**timm.data.resolve_model_data_config($model), is_training=False)
image = transform(Image.open("photo.jpg").convert("RGB")).unsqueeze(0)"""
)
"""Of the snippets for timm: how they read a photo, and ..."""
BANDS = Template(
    """values = torch.from_numpy(tifffile.imread("image.tif") / 65535).float()  # of 8 bits: 255
mean, std = torch.tensor($model.pretrained_cfg["mean"]), torch.tensor($model.pretrained_cfg["std"])
image = ((values.view(*values.shape[:2], -1) - mean) / std).permute(2, 0, 1).unsqueeze(0)"""
)
"""... how an image (height, width, bands) that is none."""
DETECTRON2 = Template("""
### With Detectron2

`clove-hub convert` writes the weights under Detectron2's names, with a matching config file beside them:

```bash
clove-hub convert $source --to detectron2 --out $out
```
""")


@dataclass(frozen=True)
class Published:
    """Where a card is published on the Hub."""

    repository: str
    """`organization/name`."""
    tag: str


@dataclass(frozen=True)
class Facts:
    """What is measured of a bundle's weights."""

    size: int
    """Of the file, in bytes."""
    parameters: int
    """How many numbers training adjusts."""
    cost: Cost


def render_card(
    provenance: Mapping[str, Any], config: Mapping[str, Any], facts: Facts, at: Published | None = None
) -> str:
    """The card of a bundle, Markdown with its front matter.

    Args:
        provenance: what clove_hub.json says.
        config: the bundle's config.json, which states preprocessing and license.
        at: the repository and tag that the snippets load from; without it they load from the bundle's folder.

    Raises:
        ValueError: the front matter is not what the Hub understands (`check_metadata`).
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
    # Whose backbone it is, where the file has more than one network.
    whose = "backbone" if provenance["exported"] == "backbone" else f"{provenance['exported']}'s backbone"
    results = list(_results(provenance, model))
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
        setup=_setup(at),
        bands=bands,
        sides=f"{side}, {side}" if photos else "height, width",
        reader="from PIL import Image" if photos else "import tifffile",
        model_image=(PHOTO if photos else BANDS).substitute(model="model"),
        backbone_image=(PHOTO if photos else BANDS).substitute(model="backbone"),
        timm_source=f"hf-hub:{at.repository}@{at.tag}" if at else "local-dir:.",
        transformers=_transformers(at, architecture) if photos else "",
        detectron2=_detectron2(at) if architecture in RESNETS and photos else "",
        num_features=config["num_features"],
        preprocessing=_preprocessing(cfg),
        training=_adopted(origin, whose, model) if adopted else _run(provenance, model),
        evaluation=_evaluation(results),
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
    trained_on = model.data.hub if model else _hub_dataset(provenance["origin"])
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
    return front if license else f"# license: none was chosen yet\n{front}"


def _license(provenance: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, str]:
    """The front matter's keys of the license; empty if none was chosen yet."""
    told = {"license": config["pretrained_cfg"]["license"], **(provenance.get("license") or {})}
    return {key: value for key, value in told.items() if value is not None}


def shown_license(license: Mapping[str, str]) -> str:
    if "license_link" in license:
        return f"[{license['license_name']}]({license['license_link']})"
    return license.get("license", "none was chosen yet")


def _hub_dataset(origin: Mapping[str, Any]) -> str | None:
    """The data set on the Hub that a run was trained on, if it was one."""
    name = str(origin["data"]["name"]) if origin["kind"] == "run" else ""
    of_the_hub = origin.get("recipe", {}).get("data", {}).get("source") == "huggingface"
    return name if of_the_hub and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) else None


def base_model(origin: Mapping[str, Any]) -> str | None:
    """The repository on the Hub whose weights a run began with, if there is one."""
    begun_with = origin.get("recipe", {}).get("run", {}).get("init_from") or ""
    if found := re.fullmatch(r"hf-hub:([^/@\s]+/[^/@\s]+)(@\S+)?", str(begun_with)):
        return found[1]
    repositories = (base.get("model") for base in _bases(origin))
    return next((str(one) for one in repositories if one and re.fullmatch(r"[\w.-]+/[\w.-]+", str(one))), None)


def _bases(origin: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The weights that a run went on from, those that these went on from, and so on."""
    while base := origin.get("pretrained"):
        yield base
        origin = base.get("origin") or {}


def begun_with(origin: Mapping[str, Any]) -> str:
    """The chain of weights that a run went on from, in words; empty where it began with random ones."""
    links = []
    for base in _bases(origin):
        repository, name = base.get("model"), f"`{base['source']}`"
        where = f" ([{repository}](https://huggingface.co/{repository}))" if repository else ""
        license = base.get("license")
        forbids = f", which {words}" if (words := restriction(license)) else ""
        links.append(f"{name}{where}, {f'under {license}{forbids}' if license else 'of unknown license'}")
    return "; these in turn from ".join(links)


def _results(provenance: Mapping[str, Any], model: Model | None) -> Iterator[dict[str, Any]]:
    """Those of the model's card, then those measured with this bundle.

    Each says which it is, and whether it is of these weights (`own`): what was printed is of those that the authors released.
    """
    for result in model.results if model else ():
        how = protocols()[result.protocol]
        yield {
            "protocol": how.name,
            "task": how.task,
            "dataset": how.dataset,
            "dataset_type": how.dataset_type,
            "split": how.split,
            "settings": how.settings,
            "baselines": how.baselines if how.baselines.get("paper") == result.by else {},
            "metrics": result.metrics,
            "kind": PRINTED[result.printed, result.by == papers()[provenance["method"]].released_by],
            "source": result.source,
            "url": result.url,
            "own": provenance["origin"]["kind"] == "adopted",
        }
    here = {"kind": "reproduced", "source": "measured with these weights by clove-hub", "url": None, "own": True}
    for measured in provenance["results"]:
        yield {**measured, "baselines": {}, **here}


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
            f"A {architecture} backbone without classifier, converted from the file `{origin['file']}`. Its tensor names are "
            f"those of {origin['format']}. The file does not say how it was trained{labels}, or on which images."
        )
    stopped = "" if origin.get("finished", True) else " The weights were taken before the end of the training."
    began = (
        " It went on from trained weights (see below), for which labels may have been used."
        if origin.get("pretrained")
        else ""
    )
    sentence = (
        f"A {architecture} backbone without classifier, pre-trained with {method} on {images}. The training used no "
        f"labels.{began} It is made for dense prediction: detection, segmentation, keypoints.{stopped}"
    )
    return f"{sentence}\n\n{model.text}" if model else sentence


def _details(
    provenance: Mapping[str, Any], model: Model | None, paper: Paper | None, license: Mapping[str, str]
) -> str:
    """Paper, code and training data, as far as they are known, and the license."""
    lines = []
    if paper:
        lines.append(f"- **Paper:** [{paper.title}](https://arxiv.org/abs/{paper.arxiv})")
        lines.append(f"- **Original code:** {paper.code}")
    origin = provenance["origin"]
    if model or origin["kind"] == "run":
        lines.append(f"- **Pre-training data:** {_data(origin, model)}")
    if chain := begun_with(origin):
        lines.append(f"- **Started from:** {chain}")
    elif base := base_model(origin):
        lines.append(f"- **Started from:** [{base}](https://huggingface.co/{base})")
    lines.append(f"- **License:** {shown_license(license)}")
    return "\n".join(lines)


def _data(origin: Mapping[str, Any], model: Model | None) -> str:
    """The training images, with a link where there is one."""
    if model:
        return f"[{model.data.name}]({model.data.page}), {model.data.images:,} images"
    name, count = origin["data"]["name"], f"{origin['data']['images']:,} images"
    hub = _hub_dataset(origin)
    return f"[{name}](https://huggingface.co/datasets/{hub}), {count}" if hub else f"{name}, {count}"


def _intended_use(plain_resnet: bool) -> str:
    converts = " Detectron2, torchvision and MMSegmentation load it after conversion." if plain_resnet else ""
    return (
        "The backbone is a starting point for models of dense prediction: fine-tune it within a detector, or a "
        f"segmentation, keypoint or dense pose model.{converts} Its frozen features can also be used directly, "
        "for linear probes, nearest-neighbor search and matching of image regions.\n\n"
        "It is not a classifier, and it predicts nothing until a head has been trained on it."
    )


def _setup(at: Published | None) -> str:
    where = (
        f"Every snippet loads version `{at.tag}` of this repository, whatever is published later."
        if at
        else "Run the snippets in the folder of this file."
    )
    return (
        "`pip install timm` installs what the first three snippets need; the fourth needs `pip install transformers` as well. "
        f"`photo.jpg` stands for an image of your own. {where}"
    )


def _transformers(at: Published | None, architecture: str) -> str:
    if at:
        source, address = f'"{at.repository}", revision="{at.tag}"', f"hf-hub:{at.repository}@{at.tag}"
        return with_transformers(source, address, "detector", architecture)
    return with_transformers('"."', ".", "../detector", architecture)


def _detectron2(at: Published | None) -> str:
    if at:
        return DETECTRON2.substitute(source=f"hf-hub:{at.repository}@{at.tag}", out="backbone.pth")
    return DETECTRON2.substitute(source=".", out="../backbone.pth")  # a bundle holds no other files


def _preprocessing(cfg: Mapping[str, Any]) -> str:
    side = cfg["input_size"][-1]
    return table(
        {
            "colors": "RGB"
            if len(cfg["mean"]) == 3
            else f"{len(cfg['mean'])} bands, of which 1 is the largest value of a file",
            "resize": f"shorter side to {math.floor(side / cfg['crop_pct'])} pixels, {cfg['interpolation']}",
            "crop": f"{side} x {side} pixels, {cfg['crop_mode']}",
            "mean": ", ".join(f"{value:g}" for value in cfg["mean"]),
            "standard deviation": ", ".join(f"{value:g}" for value in cfg["std"]),
        }
    )


def _run(provenance: Mapping[str, Any], model: Model | None) -> str:
    origin = provenance["origin"]
    settings = {
        f"{section}.{key}": value
        for section in ("backbone", "method", "batch", "optimizer", "schedule")
        for key, value in origin["recipe"].get(section, {}).items()
    }
    rows = table(
        {
            "images": _data(origin, model),
            "terms of the images": model.data.terms if model else "not recorded",
            "fingerprint of the images": f"`{origin['data']['fingerprint']}`",
            "images seen": f"{origin['images_seen']:,}",
            "optimizer steps": f"{origin['step']:,} of {origin['steps_total']:,}",
            "hardware": origin["hardware"],
            "software": ", ".join(f"{name} {version}" for name, version in origin["versions"].items()),
        }
        | {
            f"changed after step {change['step']:,}": f"`{'; '.join(change['changed'])}`"
            for change in origin.get("changes", ())
        }
        | {f"`{name}`": f"`{value}`" for name, value in settings.items()}
    )
    # A relative address is right wherever the card is read: in a folder, and at every revision of a repository.
    curves = (
        "\n\n![Loss and signs of collapse over the training steps](curves.png)"
        if "curves.png" in provenance["sha256"]
        else ""
    )
    level = origin["recipe"].get("backbone", {}).get("level", -1)
    behind = (
        f"\n\nThe training used the feature map {level}: what lies behind it has the weights that it began with."
        if level != -1
        else ""
    )
    return f"{rows}\n\nThe complete recipe is in `clove_hub.json`.{behind}{_adaptation(origin)}{curves}"


def _adaptation(origin: Mapping[str, Any]) -> str:
    """Whether training on has helped, by what was measured on the way."""
    told = [Adaptation(**one) for one in origin.get("adaptation", ())]
    if not told:
        unknown = "\n\nIt was not measured whether these weights are better than those that the run began with."
        return unknown if origin.get("pretrained") else ""
    return f"\n\n{markdown(told)}"


def _adopted(origin: Mapping[str, Any], whose: str, model: Model | None) -> str:
    trained_by = "unknown; the file does not say"
    if model:
        arxiv = papers()[model.paper.released_by].arxiv
        trained_by = f"the authors of [arXiv:{arxiv}](https://arxiv.org/abs/{arxiv})"
    rows = {
        "trained by": trained_by,
        "released at": origin.get("url") or "unknown",
        "file": f"`{origin['file']}`",
        "sha256 of the file": f"`{origin['sha256']}`",
        "format of the file": origin["format"],
        "taken from it": f"the {whose}, every tensor bit for bit",
    }
    if model:
        rows |= {
            "images": _data(origin, model),
            "terms of the images": model.data.terms,
            "epochs": model.epochs,
            "hardware": "not recorded in the file",
            "recipe": f"`clove-hub pretrain {model.recipe}` repeats this training; these weights are not from it",
        }
    converted = "clove-hub converted the weights and did not train them. Nothing else in the file was used."
    return "\n\n".join([table(rows), converted, *origin["notes"]])


def _limitations(model: Model | None) -> str:
    """What holds for every such backbone; of the images only what is known."""
    images = f"photos of {model.data.name}" if model else "training images"
    return (
        f"- The features reflect the {images}. Subjects, regions, cameras and styles that are rare there are represented "
        "worse, and biases in those images carry over to models that are fine-tuned from this backbone. Evaluate on your own "
        "data before you rely on it.\n"
        "- It has not been tested for images that differ strongly from natural photos, such as medical, satellite or "
        "document images.\n"
        "- The license covers the weights. The terms of the training images are separate; check that they allow your use."
    )


def _evaluation(results: Sequence[Mapping[str, Any]]) -> str:
    """A table for each source, and below them how the figures were measured."""
    if not results:
        return "No results are recorded for these weights."
    by_source: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for result in results:
        told = f"[{result['source']}]({result['url']})" if result["url"] else result["source"]
        whose = "" if result["own"] else ", of the weights that its authors released and **not of these**"
        by_source[f"{result['kind'].capitalize()}{whose}: {told}."].append(result)
    blocks = [f"{source}\n\n{_figurestable(rows)}" for source, rows in by_source.items()]
    measured = dict.fromkeys((result["protocol"], result["settings"]) for result in results)
    notes = [f"- {protocol}: {settings}." for protocol, settings in measured]
    ap = AP if any(metric.startswith("AP") for result in results for metric in result["metrics"]) else ""
    return "\n\n".join([*blocks, f"All figures are in percent.{ap} How they were measured:", "\n".join(notes)])


def _figurestable(rows: Sequence[Mapping[str, Any]]) -> str:
    """Where the same source has them, beside the figures of a ResNet-50 trained with labels and of one with random weights."""
    compared = [key for key in BASELINES if any(key in row["baselines"] for row in rows)]
    lines = [["protocol", "figures", *(BASELINES[key] for key in compared)], ["---"] * (2 + len(compared))]
    for row in rows:
        columns = [row["metrics"]]
        for key in compared:
            others = row["baselines"].get(key, {})
            columns.append({name: value for name, value in others.items() if name in row["metrics"]})
        told = (", ".join(f"{metric} {value}" for metric, value in column.items()) or "-" for column in columns)
        lines.append([row["protocol"], *told])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _citation(paper: Paper | None) -> str:
    """The method's paper and, where others released the weights, theirs."""
    if paper is None:
        return ""
    cited = [papers()[key] for key in dict.fromkeys((paper.method, paper.released_by))]
    told = (f"{one.title}, arXiv:{one.arxiv}\n\n```bibtex\n{one.bibtex.strip()}\n```" for one in cited)
    return "\n## Citation\n\n" + "\n\n".join(told)


def table(rows: Mapping[str, Any]) -> str:
    lines = (f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in rows.items())
    return "\n".join(("| | |", "|---|---|", *lines))
