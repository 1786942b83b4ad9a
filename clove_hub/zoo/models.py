"""The table of models, read from the cards in `model_cards/`: no fact of it is stated anywhere else.

    model_cards/papers.yaml         what all models of a method have in common
    model_cards/protocols.yaml      how results were measured
    model_cards/data.yaml           what models were trained on
    model_cards/<name>.md           one model: its facts in the front matter, a few sentences below

Reading it takes no torch.
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
"""What all models of the zoo share, in timm's words: all were trained with ImageNet's mean and standard deviation, and
are shown a center crop of 7/8 of the image's shorter side. The side in pixels is the model's own `input_size`."""
SOURCES = ("paper", "page")
"""Where the figures of a card were printed: in a paper, or on the page where its authors keep their code."""


@dataclass(frozen=True)
class Paper:
    """A method, its paper and what its authors released."""

    method: str
    """Its id: `clove`, `slotcon`, ..."""
    name: str
    """What it is called."""
    title: str
    arxiv: str
    code: str
    """Where the authors keep code and links to weights."""
    license: str
    """Of these, as the Hub spells it."""
    bibtex: str
    released_by: str
    """The method whose paper's authors trained and released the weights: most often itself; the baselines of a paper are
    of other methods."""


@dataclass(frozen=True)
class Protocol:
    """How a result was measured."""

    id: str
    name: str
    task: str
    """As the Hub names it."""
    dataset: str
    dataset_type: str
    split: str
    settings: str
    baselines: Mapping[str, Any]
    """Figures of the same protocol for a ResNet-50 trained with labels on ImageNet (`supervised`) and for one with random
    weights (`random`), and the method in whose paper they are (`paper`)."""
    measured_by: str
    """The protocol in a result's record that may measure the same; it does if the record has the rule, too."""
    rule: str
    """The rule that such a record must have."""
    samples: int | None
    """How many samples the test split has: a record of another number is of other data. None where the data set's name in
    the record is certain."""
    fixed: Mapping[str, Any]
    """Settings of the record that the rule prescribes."""


@dataclass(frozen=True)
class Result:
    """Figures of a model under a protocol, in percent, as somebody else printed them."""

    protocol: str
    printed: str
    """One of SOURCES."""
    by: str
    """The method whose paper or page it is; not always the model's own."""
    at: str
    """Where in it."""
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
    """What a model was trained on."""

    name: str
    hub: str | None
    """Its id on the Hub, where it has one."""
    page: str
    """Its own page, where it is described and can be had."""
    images: int
    terms: str
    """Of the images, Markdown."""


@dataclass(frozen=True)
class Model:
    """One model of the zoo."""

    name: str
    """`resnet50.clove_in1k_200ep`, as timm names models: architecture and tag."""
    architecture: str
    method: str
    """The method's id."""
    exported: str
    """Which encoder leaves: `student` or `teacher`."""
    data: Data
    epochs: int
    recipe: str
    """That trains it."""
    input_size: int
    """Side in pixels of the large views; what `config.json` tells timm to crop to."""
    training: Mapping[str, Any]
    """How it was trained, by some names of `facts.FACTS`: what its recipe has, and a released file may tell."""
    weights: str | None
    """Where the authors' page says that its weights are: a file, or a folder on Google Drive. None if it has no link."""
    sha256: tuple[str, ...]
    """Of the released files that somebody has seen."""
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
    """By the id of the method."""
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
    """Every model of the zoo by its name, those of a method together and the shorter training first."""
    folder = files("clove_hub.model_cards")
    names = [path.name for path in folder.iterdir() if path.name.endswith(".md") and path.name != "template.md"]
    found = [read_card(name.removesuffix(".md"), (folder / name).read_text(encoding="utf-8")) for name in names]
    methods = list(papers())
    found.sort(key=lambda model: (methods.index(model.method), model.data.name, model.epochs))
    return {model.name: model for model in found}


def list_models(pattern: str = "*") -> list[str]:
    """The names of the zoo's models that fit a pattern.

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
        ValueError: the zoo has none of that name; the message says which come close.
    """
    table = models()
    if name not in table:
        near = difflib.get_close_matches(name, list(table), n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"{name!r} is no model of the zoo: {hint}`clove-hub models` lists them")
    return table[name]


def released_as(digest: str) -> Model | None:
    """The model of which a file with this sha256 was released, if a card knows it."""
    return next((model for model in models().values() if digest in model.sha256), None)


def read_card(name: str, text: str) -> Model:
    """A model from its card.

    Raises:
        ValueError: a key is missing, unknown or of the wrong type; or it names a method or protocol there is not.
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
        raise ValueError(f"{where}: sha256 is {sums!r}; expected a list of sums of 64 hexadecimal digits each")
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
        raise ValueError(f"{where}: exported {model.exported!r} is neither of {', '.join(ENCODERS)}")
    if name.partition(".")[0] != model.architecture or not model.tag:
        raise ValueError(f"{where}: a name is architecture.tag, with the architecture {model.architecture!r}")
    return model


def front_matter(name: str, text: str) -> tuple[dict[str, Any], str]:
    """The YAML between the first two lines of `---`, and what follows.

    Raises:
        ValueError: there is none, or it is no mapping.
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
                raise ValueError(f"{where}: {protocol!r} is no protocol of protocols.yaml")
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
    """A dataclass from exactly its fields, plain ones checked against their type."""
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
