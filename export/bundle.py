"""The bundle: a folder that plain timm and transformers load as it is.

    model.safetensors   the headless backbone
    config.json         what timm needs to know about it
    README.md           the model card
    clove_hub.json      where the weights come from, and the sums of the other files

The same weights give the same bytes, so there are no dates in it. timm's own `save_for_hf` is not used: it
describes foreign weights with the default tag's preprocessing and licence, and writes `model_args`, which
transformers refuses.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import timm
import torch
from safetensors.torch import save
from torch import Tensor

from clove_hub.runs import sha256
from clove_hub.zoo import counted, read_tensors, require_finite, require_names_and_shapes

from .card import PAPERS, render_card
from .runs import Checkpoint, State
from .timm_models import Architecture, architecture

FORMAT = 1
WEIGHTS, CONFIG, CARD, PROVENANCE = "model.safetensors", "config.json", "README.md", "clove_hub.json"
FILES = (WEIGHTS, CONFIG, CARD, PROVENANCE)


def build_bundle(checkpoint: Checkpoint, out: Path, license: str | None = None) -> None:
    """Writes the bundle of a run's checkpoint to the folder `out`, after it has passed `check_bundle`.

    It is made beside `out` and renamed at the end: `out` is either the old bundle or the new one, never half of it.

    Args:
        license: id of the licence of the weights, as the Hub spells it (`mit`, `apache-2.0`, `cc-by-nc-4.0`).

    Raises:
        ValueError: the backbone is not exactly a model of timm in float32 with finite values, `out` holds
            something else than a bundle or cannot be written, or the bundle does not load with timm bit for bit.
    """
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise ValueError(f"{license!r} is no licence id of the Hub; they read like mit, apache-2.0 or cc-by-nc-4.0")
    require_replaceable(out)
    state = dataclasses.replace(
        checkpoint.state,
        data=_without_folders(checkpoint.state.data),
        recipe=_without_folders(checkpoint.state.recipe),
    )
    known = architecture(state.backbone)
    tensors = checkpoint.backbone()
    what = f"the {state.exported} in {checkpoint.folder} ({known.name})"
    require_names_and_shapes(tensors, known.shapes, what)
    require_finite(tensors, what)
    if other := sorted({str(t.dtype) for name, t in tensors.items() if t.dtype != known.dtypes[name]}):
        raise ValueError(f"{what} has tensors of {', '.join(other)}; timm would cast them: train in float32")

    weights = save(tensors, metadata={"format": "pt"})  # a second key would make the bytes differ between runs
    config = make_config(state, known, license)
    with _beside(out) as folder:
        _write(folder / WEIGHTS, weights)
        _write(folder / CONFIG, _json(config))
        sums = {name: sha256(folder / name) for name in (WEIGHTS, CONFIG)}
        card = render_card(state, config, sums[WEIGHTS], len(weights), known.parameters, license)
        _write(folder / CARD, card.encode())
        sums[CARD] = sha256(folder / CARD)
        _write(folder / PROVENANCE, _json(make_provenance(state, sums)))
        check_bundle(folder)
        written, _ = read_tensors(folder / WEIGHTS)
        assert not _different(written, tensors), "what was written is not what was read"


def make_config(state: State, known: Architecture, license: str | None) -> dict[str, Any]:
    """What timm reads. An unknown key within `pretrained_cfg` makes it fail; `fixed_input_size` is there only
    for architectures that need it.
    """
    view, paper = state.preprocessing, PAPERS.get(state.method)
    cfg: dict[str, Any] = {
        "tag": state.method,
        "num_classes": 0,
        "classifier": known.classifier,
        "first_conv": known.first_conv,
        "input_size": [3, view.size, view.size],
        "pool_size": known.pool_size_at(view.size),
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "crop_mode": "center",
        "mean": list(view.mean),
        "std": list(view.std),
        "license": license,
        "origin_url": None,
        "paper_ids": f"arXiv:{paper.arxiv}" if paper else None,
        "description": f"{known.name} pre-trained without labels ({state.method}, {state.exported})",
    }
    if known.fixed_input_size:
        cfg["fixed_input_size"] = True
    return {
        "architecture": known.name,
        "num_classes": 0,
        "num_features": known.num_features,
        "global_pool": known.global_pool,
        "pretrained_cfg": cfg,
    }


def make_provenance(state: State, sums: Mapping[str, str]) -> dict[str, Any]:
    """Where the weights come from."""
    return {
        "format": FORMAT,
        "method": state.method,
        "exported": state.exported,
        "backbone": state.backbone,
        "step": state.step,
        "steps_total": state.steps_total,
        "epoch": state.epoch,
        "finished": state.finished,
        "images_seen": state.images_seen,
        "data": dict(state.data),
        "recipe": dict(state.recipe),
        "hardware": state.hardware,
        "versions": {
            "training": dict(state.versions),
            "export": {"safetensors": safetensors.__version__, "timm": timm.__version__},
        },
        "checkpoint_sha256": dict(state.files),
        "sha256": dict(sums),
    }


def check_bundle(folder: Path) -> None:
    """Holds a bundle to what it promises: its sums, and a strict load with timm, whole and as feature maps,
    each tensor of which must equal the file's bit for bit. (timm by itself may only warn about a tensor
    without a place.)

    Raises:
        ValueError: naming the file or the tensors.
    """
    if unknown := sorted({path.name for path in folder.iterdir()} ^ set(FILES)):
        raise ValueError(f"{folder} is not a bundle: expected exactly {', '.join(FILES)}; check {', '.join(unknown)}")
    try:
        sums = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / PROVENANCE} was changed after the export ({error!r}): export again") from error
    for name in (WEIGHTS, CONFIG, CARD):
        if sha256(folder / name) != sums.get(name):
            raise ValueError(
                f"{folder / name} is not what was exported: its sha256 is not the one in {PROVENANCE}. Export again."
            )
    tensors, metadata = read_tensors(folder / WEIGHTS)
    if metadata != {"format": "pt"}:
        raise ValueError(f"{folder / WEIGHTS} has the metadata {metadata}, expected only format: pt")
    for mode, features_only in (("as it is", None), ("for feature maps", True)):
        try:
            model = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=features_only)
        except Exception as error:  # timm and the architectures raise whatever they like
            raise ValueError(f"timm does not load {folder} {mode}: {error}") from error
        _require_loaded(model.state_dict(), tensors, f"{folder}, loaded by timm {mode}", whole=not features_only)


def require_replaceable(out: Path) -> None:
    """Raises ValueError unless `out` is free, an empty folder, or a bundle, which may be replaced."""
    if out.is_dir():
        found = {path.name for path in out.iterdir()}
        if found and not (found <= set(FILES) and PROVENANCE in found):
            foreign = sorted(found - set(FILES)) or sorted(found)
            raise ValueError(
                f"{out} holds something else than a bundle ({', '.join(foreign[:3])}): empty it or "
                "give another folder with --out"
            )
    elif out.exists():
        raise ValueError(f"{out} is a file; give another folder with --out")


def _require_loaded(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor], what: str, whole: bool) -> None:
    """The model holds the file's tensors, bit for bit; all of them if `whole`.

    As a feature extractor timm leaves out what comes after the last feature map, and turns some dots of the
    names into underscores or puts a name in front.
    """

    def plain(name: str) -> str:
        return name.removeprefix("model.").replace(".", "_")

    names = {plain(name): name for name in tensors}
    assert len(names) == len(tensors), "two names differ only in dots and underscores"
    held = {names.get(plain(name), name): tensor for name, tensor in state.items()}
    expected = tensors if whole else {name: tensors[name] for name in held if name in tensors}
    if problems := _different(held, expected):
        raise ValueError(f"{what}, does not hold what is in the file: {counted('tensor', problems)}")


def _different(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    """Names that only one has, or whose tensors differ in type, shape or any bit."""
    return [name for name in {**a, **b} if name not in a or name not in b or not _same(a[name], b[name])]


def _same(a: Tensor, b: Tensor) -> bool:
    def bits(tensor: Tensor) -> Tensor:
        return tensor.detach().contiguous().flatten().view(torch.uint8)

    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def _without_folders(value: Any) -> Any:
    """Plain data in which every absolute path has become its last part: a bundle is made to be given away,
    and the folders of the machine that trained it are nobody's business.
    """
    if isinstance(value, Mapping):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(item) for item in value]
    if isinstance(value, str) and Path(value).is_absolute():
        return Path(value).name
    return value


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A new folder next to `out`, which takes its place in the end, or vanishes if something goes wrong."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise ValueError(f"cannot write in {out.parent}: {error.strerror}; give another folder with --out") from error
    try:
        folder.chmod(0o755)
        yield folder
        _exchange(folder, out)
    except OSError as error:
        raise ValueError(f"cannot write {out}: {error.strerror}; give another folder with --out") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _exchange(folder: Path, out: Path) -> None:
    """Gives `folder` the name `out`; what had it before is removed, or gets it back if that fails."""
    if not out.exists():
        folder.rename(out)
        return
    old = folder.with_name(f"{folder.name}.old")
    out.rename(old)
    try:
        folder.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old)


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    path.chmod(0o644)  # readable for whoever serves or loads the folder


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
