"""The bundle: a folder that plain timm and transformers load directly. `exporting.py` makes one from a run.

    model.safetensors   the headless backbone
    config.json         its timm config
    README.md           the model card
    curves.png          for the card: the training curves; only from a run
    clove_hub.json      the origin of the weights, and the checksums of the other files

The same weights give the same bytes, so it contains no dates. timm's `save_for_hf` is not used: it gives other
weights the default tag's preprocessing and license, and writes `model_args`, which transformers rejects.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import timm
import torch
from safetensors.torch import save
from torch import Tensor

from clove_hub.runs import sha256
from clove_hub.weights.architectures import Architecture, architecture
from clove_hub.weights.bundle import CONFIG, PROVENANCE, read_bundle, require_sums
from clove_hub.weights.weights import restriction
from clove_hub.zoo.checks import counted, require_finite, require_names_and_shapes
from clove_hub.zoo.models import PREPROCESSING, papers
from clove_hub.zoo.tensors import read_tensors

from .card import UNKNOWN
from .card_files import CARD, WEIGHTS, card_files, json_bytes, no_card
from .contents import Contents
from .license import OTHER, require_license

log = logging.getLogger(__name__)

FORMAT = 1
CURVES = "curves.png"
FILES = (WEIGHTS, CONFIG, CARD, PROVENANCE)
"""The files of every bundle; one from a run also has CURVES."""
DOWNLOADED = {".gitattributes", ".cache", ".git", "LICENSE"}
"""What a copy of a repository may also contain: from the Hub, its client, git, or the website where the repository was
created."""


def write_bundle(weights: Contents, out: Path) -> None:
    """Write a bundle to the folder `out`, after it has passed `check_bundle`.

    It is written beside `out` and renamed at the end: `out` is either the old bundle or the new one, never partial.

    Raises:
        ValueError: the weights are not exactly a timm model in float32 with finite values, the license is not an id of
            the Hub, `out` holds something other than a bundle or cannot be written, or timm does not load the bundle
            bit for bit.
    """
    require_license(weights.license, weights.license_name, weights.license_link)
    require_replaceable(out)
    base = weights.origin.get("pretrained") or {}
    if (words := restriction(base.get("license"))) and weights.license not in (None, base["license"]):
        log.warning(
            "%s started from %s, whose license %s %s: check that --license %s is allowed",
            *(weights.what, base["source"]),
            *(base["license"], words, weights.license),
        )
    known = architecture(weights.architecture, weights.model_args, weights.what)
    tensors = dict(weights.tensors)
    what = f"{weights.what} ({known.name})"
    require_names_and_shapes(tensors, known.shapes, what)
    require_finite(tensors, what)
    if other := sorted({str(t.dtype) for name, t in tensors.items() if t.dtype != known.dtypes[name]}):
        raise ValueError(f"{what} has tensors of {', '.join(other)}; timm would cast them: train in float32")

    # safetensors sorts the names itself; with a second metadata key the same weights would not give the same bytes.
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata={"format": "pt"})
    config = make_config(weights, known)
    with beside(out) as folder:
        (folder / WEIGHTS).write_bytes(content)
        (folder / CONFIG).write_bytes(json_bytes(config))
        # A checkpoint may have been copied out of its run, without the run's other files.
        if weights.run is not None and (weights.run / "metrics.jsonl").is_file():
            _draw_curves(weights.run, weights.origin["step"], folder / CURVES)
        provenance = {
            "format": FORMAT,
            "method": weights.method,
            "exported": weights.exported,
            "backbone": weights.architecture,
            "model": weights.model.name if weights.model else None,
            "origin": without_folders(weights.origin),
            "results": [],
            **_other_license(weights),
            "export": {"safetensors": safetensors.__version__, "timm": timm.__version__},
            "sha256": {path.name: sha256(path) for path in sorted(folder.iterdir())},
        }
        for name, content in card_files(folder, provenance, config).items():
            (folder / name).write_bytes(content)
        check_bundle(folder)
        written, _ = read_tensors(folder / WEIGHTS)
        assert not different(written, tensors), "the written tensors differ"


def _draw_curves(run: Path, step: int, out: Path) -> None:
    """Draw the training curves up to a step."""
    from clove_hub.figures.curves import Run, curves, read_run
    from clove_hub.figures.output import save

    metrics, evaluations = ([row for row in rows if row["step"] <= step] for rows in read_run(run))
    save(curves({run.name: Run(metrics, evaluations)}), out, 110)


def add_results(bundle: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Add results that were measured with a bundle to its card; adding them again changes nothing.

    The snippets of the new card load from the folder, even in a copy of a published bundle: the tag that they named
    does not have these results.

    Args:
        results: each a mapping with `protocol` (its name), `task`, `dataset`, `dataset_type`, `split`, `settings` and
            `metrics` (figures by name); `split` is empty for data without splits. One with the same protocol, data and
            settings is replaced.

    Raises:
        ValueError: it is not a bundle, fails `check_bundle` before or after, or is in the Hub client's cache.
    """
    check_bundle(bundle)
    if (bundle / CARD).is_symlink():
        raise ValueError(
            f"{bundle} is in the cache of the Hub's client, whose files must stay as published: copy the bundle with "
            f"`cp -rL {bundle} COPY`, and give COPY"
        )
    provenance = json.loads((bundle / PROVENANCE).read_text(encoding="utf-8"))
    config = json.loads((bundle / CONFIG).read_text(encoding="utf-8"))

    def key(result: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(result[part] for part in ("protocol", "dataset", "split", "settings"))

    try:
        merged = {key(result): dict(result) for result in (*provenance["results"], *results)}
    except (KeyError, TypeError) as error:  # the file has no checksum of itself
        raise no_card(bundle, error) from error
    rendered = card_files(bundle, provenance | {"results": list(merged.values())}, config)
    with beside(bundle) as folder:
        for name in provenance["sha256"].keys() - {CARD}:
            shutil.copyfile(bundle / name, folder / name)
        for name, content in rendered.items():
            (folder / name).write_bytes(content)
        check_bundle(folder)


def _other_license(weights: Contents) -> dict[str, Any]:
    """The entry in clove_hub.json for a license without an id on the Hub; config.json states `other`."""
    if weights.license != OTHER:
        return {}
    return {"license": {"license_name": weights.license_name, "license_link": weights.license_link}}


def make_config(weights: Contents, known: Architecture) -> dict[str, Any]:
    """The config.json that timm reads.

    timm fails on an unknown key within `pretrained_cfg`; `fixed_input_size` is set only for architectures that need it.
    """
    view, paper = weights.preprocessing, papers().get(weights.method)
    bands = weights.model_args.get("in_chans", 3)
    adopted_as: str = weights.origin.get("name", "")
    cfg: dict[str, Any] = {
        # The part of the model's name after the dot.
        "tag": weights.model.tag if weights.model else adopted_as.partition(".")[2] or weights.method,
        "num_classes": 0,
        "classifier": known.cfg.get("classifier"),
        # With it timm adapts three bands to others; timm 1.0.21 then replaces a first layer of other bands by a random
        # one.
        "first_conv": known.cfg.get("first_conv") if bands == 3 else None,
        "input_size": [bands, view.size, view.size],
        "pool_size": known.pool_size_at(view.size),
        **{key: PREPROCESSING[key] for key in ("interpolation", "crop_pct", "crop_mode")},
        "mean": list(view.mean),
        "std": list(view.std),
        "license": weights.license,
        "origin_url": paper.code if paper and weights.model and weights.origin["kind"] == "adopted" else None,
        "paper_ids": f"arXiv:{paper.arxiv}" if paper else None,
        "description": f"{known.name} from a file that does not say how it was trained"
        if weights.method == UNKNOWN
        else f"{known.name} pre-trained without labels ({weights.method}, {weights.exported})",
    }
    if known.cfg.get("fixed_input_size"):
        cfg["fixed_input_size"] = True
    return {
        "architecture": known.name,
        "num_classes": 0,
        "num_features": known.num_features,
        "global_pool": known.global_pool,
        **({"model_args": dict(weights.model_args)} if weights.model_args else {}),
        "pretrained_cfg": cfg,
    }


def check_bundle(folder: Path) -> None:
    """Verify a bundle.

    It must match the checksums in clove_hub.json and load strictly with timm, as a whole and as feature maps, with each
    tensor equal to the file's bit for bit: timm itself may only warn about an unexpected tensor.

    Raises:
        ValueError: naming the file or the tensors; or as `read_bundle`.
    """
    found = {path.name for path in folder.iterdir()} - DOWNLOADED
    if unknown := sorted((found - {CURVES}) ^ set(FILES)):
        raise ValueError(
            f"{folder} is not a bundle: expected exactly {', '.join(FILES)}; missing or unexpected: {', '.join(unknown)}"
        )
    what = f"the bundle {folder}"
    told = require_sums(folder, sorted(found - {PROVENANCE}), what)["sha256"]
    if other := sorted(told.keys() - found):
        raise ValueError(f"{folder} is not as exported: {', '.join(other)} of {PROVENANCE} is missing")
    require_finite(read_bundle(folder, str(folder), what).tensors, what)  # as every command that reads a bundle
    tensors, metadata = read_tensors(folder / WEIGHTS)
    if metadata != {"format": "pt"}:
        raise ValueError(f"{folder / WEIGHTS} has the metadata {metadata}, expected only format: pt; export again")
    for mode, features_only in (("as a whole", None), ("for feature maps", True)):
        try:
            model = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=features_only)
        except Exception as error:  # timm and the architectures raise arbitrary types
            raise ValueError(f"timm does not load {folder} {mode}: {error}") from error
        _require_loaded(model.state_dict(), tensors, f"{folder}, loaded by timm {mode}", whole=not features_only)


def require_replaceable(out: Path) -> None:
    """Raise ValueError unless `out` does not exist, is an empty folder, or is a bundle, which may be replaced."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give another folder with --out")
    found = {path.name for path in out.iterdir()} if out.exists() else set()
    foreign = sorted(found - {*FILES, CURVES}) or sorted(found)
    if foreign and not (found <= {*FILES, CURVES} and PROVENANCE in found):
        raise ValueError(
            f"{out} holds something other than a bundle ({', '.join(foreign[:3])}): empty it or give another folder with "
            "--out"
        )


def _require_loaded(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor], what: str, whole: bool) -> None:
    """Require that the model has the file's tensors, bit for bit; all of them if `whole`.

    In a feature extractor timm omits what follows the last feature map, and replaces some dots in the names by
    underscores or adds a prefix.
    """
    names = {name.replace(".", "_"): name for name in tensors}
    assert len(names) == len(tensors), "two names differ only in dots and underscores"

    def own(name: str) -> str:
        bare = (name.removeprefix(prefix).replace(".", "_") for prefix in ("", "model.", "body."))
        return next((names[one] for one in bare if one in names), name)

    held = {own(name): tensor for name, tensor in state.items()}
    expected = tensors if whole else {name: tensors[name] for name in held if name in tensors}
    if problems := different(held, expected):
        raise ValueError(f"{what}, differs from its file in {counted('tensor', problems)}")


def different(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    """Names that only one has, or whose tensors differ in type, shape or any bit."""

    def same(one: Tensor, other: Tensor) -> bool:
        bits = (tensor.detach().contiguous().flatten().view(torch.uint8) for tensor in (one, other))
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)

    return [name for name in {**a, **b} if name not in a or name not in b or not same(a[name], b[name])]


def without_folders(value: Any) -> Any:
    """Plain data with every absolute path replaced by its last part.

    A bundle is made for sharing, and must not reveal the folders of the machine that trained it.
    """
    if isinstance(value, Mapping):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(item) for item in value]
    if isinstance(value, str) and Path(value).is_absolute():
        return Path(value).name
    return value


@contextmanager
def beside(out: Path) -> Iterator[Path]:
    """A new folder next to `out`, which replaces it at the end, or is removed after an error."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise ValueError(f"cannot write in {out.parent}: {error.strerror}; give another folder with --out") from error
    try:
        folder.chmod(0o755)
        yield folder
        for path in folder.iterdir():
            path.chmod(0o644)  # readable by any user who serves or loads the folder
        old = folder.with_name(f"{folder.name}.old")
        replaced = out.exists()
        if replaced:
            out.rename(old)
        try:
            folder.rename(out)
        except OSError:
            if replaced:
                old.rename(out)
            raise
        if replaced:
            for name in DOWNLOADED & {path.name for path in old.iterdir()}:
                (old / name).rename(out / name)
            shutil.rmtree(old)
    except OSError as error:
        raise ValueError(f"cannot write {out}: {error.strerror}; give another folder with --out") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
