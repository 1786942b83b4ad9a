"""The table of models, read from the cards in `model_cards/`, the only source of these facts.

    model_cards/papers.yaml         facts that all models of a method share
    model_cards/protocols.yaml      how results were measured
    model_cards/data.yaml           training data of the models
    model_cards/<name>.md           one model: its facts in the front matter, a few sentences below

Reading it does not need torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from clove_hub.settings import nearest

from .facts import FACTS

ENCODERS = ("student", "teacher")
PREPROCESSING: Mapping[str, Any] = {
    "interpolation": "bicubic",
    "crop_pct": 0.875,
    "crop_mode": "center",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}
"""The preprocessing of all models of the zoo, by timm's keys: all were trained with ImageNet's mean and standard
deviation, and take a center crop of 7/8 of the image's shorter side. The side in pixels is the model's own
`input_size`."""
SOURCES = ("paper", "page")
"""Where the figures of a card were published: in a paper, or on the page of its authors' code."""


@dataclass(frozen=True)
class Paper:
    """A method, its paper and its authors' releases."""

    method: str
    """Its id: `clove`, `slotcon`, ..."""
    name: str
    """Its display name."""
    title: str
    arxiv: str
    code: str
    """URL of the authors' code and links to weights."""
    license: str
    """License of these, as an id of the Hub."""
    bibtex: str
    released_by: str
    """The method whose paper's authors trained and released the weights: usually itself; the baselines of a paper
    belong to other methods."""


@dataclass(frozen=True)
class Protocol:
    """How a result was measured."""

    id: str
    name: str
    task: str
    """The Hub's name of the task."""
    dataset: str
    dataset_type: str
    split: str
    settings: str
    baselines: Mapping[str, Any]
    """Figures of the same protocol for a ResNet-50 trained with labels on ImageNet (`supervised`) and for one with
    random weights (`random`), and the method in whose paper they are (`paper`)."""
    measured_by: str
    """The protocol in a result's record that measures the same if the record also has `rule`."""
    rule: str
    """The rule required in such a record."""
    samples: int | None
    """Number of samples in the test split: a record with another number is for other data. None if the data set's name
    in the record is certain."""
    fixed: Mapping[str, Any]
    """Settings of the record that the rule fixes."""


@dataclass(frozen=True)
class Result:
    """Published figures of a model under a protocol, in percent."""

    protocol: str
    printed: str
    """One of SOURCES."""
    by: str
    """The method of the paper or page; not always the model's own."""
    at: str
    """Location in it."""
    metrics: Mapping[str, float]

    @property
    def source(self) -> str:
        return f"{papers()[self.by].name}'s {self.printed}, {self.at}"

    @property
    def url(self) -> str:
        paper = papers()[self.by]
        return f"https://arxiv.org/abs/{paper.arxiv}" if self.printed == "paper" else paper.code


@dataclass(frozen=True)
class Data:
    """The training data of a model."""

    name: str
    hub: str | None
    """Its id on the Hub, if it has one."""
    page: str
    """Its page, with description and download."""
    images: int
    terms: str
    """Terms of the images, Markdown."""


@dataclass(frozen=True)
class Model:
    """One model of the zoo."""

    name: str
    """`resnet50.clove_in1k_200ep`, as timm names models: architecture and tag."""
    architecture: str
    method: str
    """The method's id."""
    exported: str
    """The exported encoder: `student` or `teacher`."""
    data: Data
    epochs: int
    recipe: str
    """The recipe that trains it."""
    input_size: int
    """Side in pixels of the large views; the crop size in `config.json`."""
    training: Mapping[str, Any]
    """Its training, by names of `facts.FACTS`: values in its recipe that a released file may also state."""
    weights: str | None
    """The link to its weights on the authors' page: a file, or a folder on Google Drive. None without a link."""
    sha256: tuple[str, ...]
    """sha256 of the known released files."""
    results: tuple[Result, ...]
    text: str

    @property
    def tag(self) -> str:
        return self.name.partition(".")[2]

    @property
    def paper(self) -> Paper:
        return papers()[self.method]


@cache
def papers() -> dict[str, Paper]:
    """The papers by the id of the method."""
    return {
        key: _build(Paper, {"method": key, "released_by": key, **value}, f"papers.yaml: {key}")
        for key, value in _yaml("papers").items()
    }


@cache
def protocols() -> dict[str, Protocol]:
    default: dict[str, Any] = {"baselines": {}, "samples": None, "fixed": {}}
    return {
        key: _build(
            Protocol, {"id": key, "measured_by": key, "rule": key, **default, **value}, f"protocols.yaml: {key}"
        )
        for key, value in _yaml("protocols").items()
    }


@cache
def data() -> dict[str, Data]:
    return {key: _build(Data, value, f"data.yaml: {key}") for key, value in _yaml("data").items()}


@cache
def models() -> dict[str, Model]:
    """All models of the zoo by name, grouped by method, the shorter training first."""
    folder = files("clove_hub.model_cards")
    names = [path.name for path in folder.iterdir() if path.name.endswith(".md") and path.name != "template.md"]
    found = [read_card(name.removesuffix(".md"), (folder / name).read_text(encoding="utf-8")) for name in names]
    methods = list(papers())
    found.sort(key=lambda model: (methods.index(model.method), model.data.name, model.epochs))
    return {model.name: model for model in found}


def list_models(pattern: str = "*") -> list[str]:
    """The names of the zoo's models that match a pattern.

    Args:
        pattern: as in a shell, `*.clove_*`.

    Examples:
        >>> import clove_hub
        >>> clove_hub.list_models("*.clove_*")
        ['resnet50.clove_in1k_50ep', 'resnet50.clove_in1k_200ep', 'resnet50.clove_in1k_400ep']
    """
    return [name for name in models() if fnmatch(name, pattern)]


def find_model(name: str) -> Model:
    """A model by its name.

    Raises:
        ValueError: the zoo has no model of that name; the message lists similar names.
    """
    table = models()
    if name not in table:
        near = difflib.get_close_matches(name, list(table), n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"{name!r} is not a model of the zoo: {hint}`clove-hub models` lists them")
    return table[name]


def released_as(digest: str) -> Model | None:
    """The model whose card lists a released file with this sha256."""
    return next((model for model in models().values() if digest in model.sha256), None)


def read_card(name: str, text: str) -> Model:
    """A model from its card.

    Raises:
        ValueError: a key is missing, unknown or of the wrong type; or it names an unknown method or protocol.
    """
    front, body = front_matter(name, text)
    where = f"the card of {name}"
    results = tuple(_results(front.get("results"), where))
    told = {"training": {}, "weights": None, "sha256": [], **front, "name": name, "results": results}
    told["text"] = body.strip()
    if not isinstance(told["training"], dict) or told["training"].keys() - FACTS.keys():
        raise ValueError(
            f"{where}: training is {told['training']!r}; expected some of {', '.join(FACTS)} with a value each"
        )
    sums = told["sha256"]
    if not isinstance(sums, list) or not all(isinstance(s, str) and re.fullmatch(r"[0-9a-f]{64}", s) for s in sums):
        raise ValueError(f"{where}: sha256 is {sums!r}; expected a list of checksums of 64 hexadecimal digits each")
    told["sha256"] = tuple(sums)
    if told["weights"] is not None and not str(told["weights"]).startswith("https://"):
        raise ValueError(f"{where}: weights is {told['weights']!r}; expected an address that begins with https://")
    if "data" in told:
        if told["data"] not in data():
            raise ValueError(f"{where}: data {told['data']!r} is not one of {', '.join(data())}")
        told["data"] = data()[told["data"]]
    model: Model = _build(Model, told, where)
    if model.method not in papers():
        raise ValueError(f"{where}: method {model.method!r} is not one of {', '.join(papers())}")
    if model.exported not in ENCODERS:
        raise ValueError(f"{where}: exported {model.exported!r} is not one of {', '.join(ENCODERS)}")
    if name.partition(".")[0] != model.architecture or not model.tag:
        raise ValueError(f"{where}: a name is architecture.tag, with the architecture {model.architecture!r}")
    return model


def front_matter(name: str, text: str) -> tuple[dict[str, Any], str]:
    """The YAML between the first two lines of `---`, and what follows.

    Raises:
        ValueError: there is none, or it is not a mapping.
    """
    parts = re.split(r"^---\s*$", text, maxsplit=2, flags=re.MULTILINE)
    if len(parts) != 3 or parts[0].strip():
        raise ValueError(f"the card of {name} does not begin with a front matter between two lines of ---")
    try:
        front = yaml.safe_load(parts[1])
    except yaml.YAMLError as error:
        raise ValueError(f"the front matter of the card of {name} is not valid YAML: {error}") from error
    if not isinstance(front, dict):
        raise ValueError(
            f"the front matter of the card of {name} is a {type(front).__name__}, expected keys and values"
        )
    return front, parts[2]


def _results(blocks: Any, where: str) -> Iterator[Result]:
    """The figures of each block of `results`; a block has one source."""
    if not isinstance(blocks, list):
        raise ValueError(f"{where} has no list of `results`; write `results: []` where there are none")
    for block in blocks:
        printed = [source for source in SOURCES if isinstance(block, dict) and block.get(source) in papers()]
        if len(printed) != 1 or block.keys() != {printed[0], "at", "figures"}:
            raise ValueError(
                f"{where}: a block of results is {block!r}; expected `paper` or `page` (of {', '.join(papers())}), `at` "
                "(where in it) and `figures`"
            )
        for protocol, metrics in block["figures"].items():
            if protocol not in protocols():
                raise ValueError(f"{where}: {protocol!r} is not a protocol of protocols.yaml")
            if not metrics or not all(isinstance(v, int | float) and 0 <= v <= 100 for v in metrics.values()):
                raise ValueError(f"{where}: the figures under {protocol} are {metrics}; expected them in percent")
            figures = {key: float(value) for key, value in metrics.items()}
            yield Result(protocol, printed[0], block[printed[0]], block["at"], figures)


def _yaml(name: str) -> dict[str, dict[str, Any]]:
    content = files("clove_hub.model_cards").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    loaded: dict[str, dict[str, Any]] = yaml.safe_load(content)
    return loaded


_PLAIN: dict[Any, Any] = {"str": str, "int": int, "str | None": (str, type(None)), "int | None": (int, type(None))}


def _build(cls: Any, values: Mapping[str, Any], where: str) -> Any:
    """Build a dataclass from exactly its fields, with the types of plain ones checked."""
    kinds = {field.name: field.type for field in dataclasses.fields(cls)}
    for key in values:
        if key not in kinds:
            raise ValueError(f"{where}: unknown key {key!r}{nearest(key, list(kinds))}; it has {', '.join(kinds)}")
    for key, kind in kinds.items():
        if key not in values:
            raise ValueError(f"{where}: {key!r} is missing")
        if kind in _PLAIN and not isinstance(values[key], _PLAIN[kind]):
            raise ValueError(f"{where}: {key} is {values[key]!r}, expected {kind}")
    return cls(**values)
