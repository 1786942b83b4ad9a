"""Every kind of broken source in every command that takes one, typed as a user types: a sentence, and nothing else.

Runs and bundles hold timm's smallest ResNet, files a ResNet-18; each differs from a sound source in one thing.
"""

import argparse
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from fine_tuning import SEGMENTER
from safetensors.torch import load_file, save_file
from synthetic import write_run
from timm.models import get_pretrained_cfg
from training_runs import overrides

from clove_hub.cli import main
from clove_hub.weights import architectures, load_method
from clove_hub.weights.weights import read_preprocessing

pytest_plugins = ["downstream_fixtures"]

DEEP = "[" * 100_000
NESTED: Any = "leaf"
for _ in range(60):
    NESTED = [NESTED]
HUGE = "vit_tiny_patch16_224"
"""Of a depth that `model_args` give."""

TAKE_BACKBONES = {
    "inspect": "inspect SOURCE",
    "to timm": "convert SOURCE --to timm --out OUT.safetensors",
    "to torchvision": "convert SOURCE --to torchvision --out OUT.pth",
    "to mmseg": "convert SOURCE --to mmseg --out OUT.pth",
    "to detectron2": "convert SOURCE --to detectron2 --out OUT.pth",
    "evaluate": "evaluate correspond --model SOURCE --data PHOTOS images=2 size=64",
    "compare": "figures compare --model SOURCE --data PHOTOS --photos 1 --size 64 --dpi 40 --out OUT.png",
    "mmseg": "downstream mmseg voc12aug --backbone SOURCE --out OUT",
    "torchvision": "downstream torchvision segmentation --backbone SOURCE --data STREETS --out OUT",
}
TAKE_BUNDLES = TAKE_BACKBONES | {"publish": "publish SOURCE --repo acme/one"}
TAKE_FILES = TAKE_BACKBONES | {"adopt": "adopt SOURCE --as resnet18.my_tag --license mit --out OUT"}
TAKE_RUNS = TAKE_BACKBONES | {
    "export": "export SOURCE --out OUT --license mit",
    "publish": "publish SOURCE --repo acme/one --state --license mit",
    "attention": "figures attention SOURCE --data PHOTOS --photos 1 --size 64 --dpi 40 --out OUT.png",
    "pretrain": "pretrain demo run.init_from=SOURCE",
}


# ---- what is broken --------------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], Any]
"""Changes an object, or returns what stands in its place."""


def put(**values: Any) -> Change:
    return lambda found: found.update(values)


def put_in(part: str, **values: Any) -> Change:
    return lambda found: found[part].update(values)


cfg, seen = partial(put_in, "pretrained_cfg"), partial(put_in, "preprocessing")

CONFIGS: dict[str, tuple[Change, str]] = {
    # In the config.json of a bundle, whose sum is then set right.
    "no architecture": (put(architecture=None), r"its architecture is None\). Expected the name of a model of timm"),
    "another type": (put(architecture=["resnet18"]), r"its architecture is \['resnet18'\]"),
    "not of timm": (put(architecture="resnet19"), r"architecture='resnet19' is not an .*did you mean resnet18"),
    "another one": (put(architecture="resnet18"), r"\(resnet18\): \d+ missing tensors.* must match"),
    "no cfg": (put(pretrained_cfg=None), "has pretrained_cfg None, expected keys and values: correct it"),
    "deep": (lambda found: DEEP, r"cannot be read as JSON \(it is nested too deeply\)"),
    "nested": (put(more=NESTED), "has lists or objects nested more than 50 deep"),
    "list": (lambda found: "[]", "holds list .*expected an object"),
    "large": (put(more="x" * (17 << 20)), "bytes, expected at most 16,777,216"),
    "mean of nan": (cfg(mean=[math.nan] * 3), r"has mean \[nan, nan, nan\]; expected three numbers from 0 to 1"),
    "two means": (cfg(mean=[0.5, 0.5]), r"has mean \[0\.5, 0\.5\]; expected three numbers"),
    "mean to 255": (cfg(mean=[123.675, 116.28, 103.53]), r"has mean \[123.*where white is 1: correct it"),
    "no mean": (cfg(mean=[]), r"has mean \[\]"),
    "large mean": (cfg(mean=[10**400] * 3), r"has mean \[1000"),
    "std 0": (cfg(std=[0.2, 0, 0.2]), r"has std \[0\.2, 0, 0\.2\]; expected three numbers from 1e-05 to 10"),
    "std of words": (cfg(std="abc"), "has std 'abc'"),
    "gray": (cfg(input_size=[1, 64, 64]), r"has input_size \[1, 64, 64\]; expected 3 channels"),
    "huge": (cfg(input_size=[3, 10**9, 10**9]), r"input_size \[3, 1000000000.*from 1 to 2048 pixels"),
    "interpolation": (cfg(interpolation="best"), "has interpolation 'best'; expected one of nearest"),
    "crop of 0": (cfg(crop_pct=0), "has crop_pct 0; expected a number from"),
    "large number": (put(model_args={"layers": [10**6]}), "has 1000000 among its model_args; expected numbers up"),
    "many values": (put(model_args={"layers": [1] * 101}), "has 101 values in its model_args"),
    "depth": (put(architecture=HUGE, model_args={"depth": 99_999}), "it has more than 2,000 modules and tensors"),
}
SUMS: dict[str, tuple[Change, str]] = {
    # In the clove_hub.json of a bundle.
    "sums as a list": (put(sha256=["a", "b"]), r"clove_hub\.json has sha256 \['a', 'b'\].*: export, adopt or download"),
    "no sums": (put(sha256=None), "has sha256 None"),
    "sum of nothing": (put(sha256={}), "is not what was exported: clove_hub.json has no checksum of it: export"),
    "another sum": (
        put_in("sha256", **{"config.json": "0" * 64}),
        "its sha256 is not the one in clove_hub.json. Export",
    ),
    "deep": (lambda found: DEEP, r"clove_hub\.json is not what was exported \(.*nested too deeply"),
    "origin": (put(origin=[1]), r"has origin \[1\]"),
    "results": (put(results=None), "has results None"),
}
STATES: dict[str, tuple[Change, str]] = {
    # In the state.json of a run's only checkpoint.
    "two means": (seen(mean=[0.5, 0.5]), r"has mean \[0\.5, 0\.5\]; expected three numbers.*use another checkpoint"),
    "mean of nan": (seen(mean=[math.nan] * 3), r"has mean \[nan, nan, nan\]"),
    "no mean": (seen(mean=None), r"preprocessing\.mean=None is a NoneType, expected list"),
    "std 0": (seen(std=[0, 0, 0]), r"has std \[0, 0, 0\]"),
    "size": (seen(size="64"), r"preprocessing\.size='64' is a str, expected int"),
    "no preprocessing": (put(preprocessing=None), "preprocessing=None is a NoneType"),
    "no backbone": (put(backbone=None), r"\(backbone=None is a NoneType, expected str\): use another checkpoint"),
    "not of timm": (put(backbone="resnet19"), "backbone='resnet19' is not an architecture"),
    "method": (put(method=[1]), r"method=\[1\] is a list, expected str"),
    "no recipe": (put(recipe=None), "recipe=None is a NoneType"),
    "recipe without method": (put(recipe={}), r"recipe\.method=None is a NoneType"),
    "step": (put(steps_total="many"), "steps_total='many' is a str, expected int"),
    "no data": (put(data={}), r"data\.name=None is a NoneType, expected str"),
    "versions": (put(versions={"torch": 2}), r"versions\.torch=2 is a int, expected str"),
    "nested": (put(hardware=NESTED), "it has lists or objects nested more than 50 deep"),
}
UNREAD: dict[str, tuple[Change, str]] = {
    # The same, found before anything else is looked at; warnings say what it is.
    "empty": (lambda found: "", "none is intact"),
    "list": (lambda found: "[]", "none is intact"),
    "another format": (put(format=9), "none is intact"),
}
UNREAD_SOON: dict[str, tuple[Change, str]] = {
    "deep": (lambda found: DEEP, "none is intact"),
    "files as a list": (put(files=["model.safetensors"]), "none is intact"),
    "no files": (put(files={}), "none is intact"),
    "sums of nothing": (put(files={"model.safetensors": None}), "none is intact"),
}

Tensors = dict[str, torch.Tensor]


def zeroed_page(path: Path, tensors: Tensors) -> None:
    torch.save({"state_dict": tensors}, path)
    content = bytearray(path.read_bytes())
    at = (len(content) // 2) & ~4095
    content[at : at + 4096] = bytes(4096)
    path.write_bytes(content)


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path, Tensors], None]:
    return lambda path, tensors: torch.save(tensors | {name: change(tensors[name])}, path)


def beside(config: Mapping[str, Any] | str) -> Callable[[Path, Tensors], None]:
    def write(path: Path, tensors: Tensors) -> None:
        torch.save(tensors, path)
        (path.parent / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))

    return write


def by_train_py(**told: Any) -> Callable[[Path, Tensors], None]:
    options = {"model": "resnet18", "mean": None, "std": None, "crop_pct": None, "img_size": None} | told
    return lambda path, tensors: torch.save({"state_dict": tensors, "args": argparse.Namespace(**options)}, path)


FILES: dict[str, tuple[Callable[[Path, Tensors], None], str]] = {
    "zeroed page": (zeroed_page, "damaged.*the checksum of .*copy or download it again"),
    "negative variance": (changed("bn1.running_var", torch.neg), r"1 tensor \(bn1\.running_var\) with variances below"),
    "beyond float32": (
        changed("bn1.weight", lambda t: t.double() * 1e300),
        "non-finite values in float32.*use an earlier|is stored in float64",
    ),
    "quantized": (changed("conv1.weight", lambda t: t.to(torch.int8)), r"conv1\.weight\) of int8.*before it was quan"),
    "no architecture": (beside({"architecture": None}), "has architecture None, expected the name.*correct it or move"),
    "not of timm": (beside({"architecture": "resnet19"}), r"config\.json beside .*'resnet19' is not an architecture"),
    "no cfg": (beside({"architecture": "resnet18", "pretrained_cfg": None}), "has pretrained_cfg None"),
    "deep config": (beside(DEEP), "which may say what the file holds, cannot be read: correct it or move it away"),
    "two means": (beside({"architecture": "resnet18", "mean": [0.5, 0.5]}), r"has mean \[0\.5, 0\.5\]; expected"),
    "std 0 alone": (beside({"architecture": "resnet18", "std": [0, 0, 0]}), r"has std \[0, 0, 0\]"),
    "depth": (
        beside({"architecture": HUGE, "model_args": {"depth": 99_999}}),
        "more than 2,000 modules|names a resnet18",
    ),
    "std 0 in options": (by_train_py(std=[0.0, 0.0, 0.0]), r"`model` among its options, has std \(0\.0, 0\.0, 0\.0\)"),
    "two means in options": (
        by_train_py(mean=[0.5, 0.5]),
        r"options that timm's training cannot have \(mean \[0\.5, 0\.5\]",
    ),
}

# ---- sound sources, of which broken ones are made --------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """`run`, the `bundle` that export makes of it, and `tensors.safetensors` with a ResNet-18."""
    home = tmp_path_factory.mktemp("sound")
    write_run(home / "run", "test_resnet")
    assert main(["export", str(home / "run"), "--out", str(home / "bundle"), "--license", "mit"]) == 0
    torch.manual_seed(0)
    save_file(timm.create_model("resnet18", num_classes=0).state_dict(), home / "tensors.safetensors")
    return home


@pytest.fixture(autouse=True)
def _in_a_place_of_its_own(tmp_path, monkeypatch, as_in_a_process_of_its_own):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(architectures, "MOST_PIECES", 2_000)  # seconds, for each command, until the true number


def linked(source: Path, target: Path) -> Path:
    """A copy that takes up nothing; what is to be changed in it must be removed first."""
    for path in (path for path in source.rglob("*") if path.is_file()):
        (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
        os.link(path, target / path.relative_to(source))
    return target


def rewrite(path: Path, change: Change) -> None:
    found = json.loads(path.read_text())
    instead = change(found)
    path.unlink()
    path.write_text(instead if isinstance(instead, str) else json.dumps(found))


def require_refused(command: str, source: Path, pattern: str, made_photos: Path, streets: Path, capsys) -> None:
    """Types a command: it exits with 2, its last line says what is wrong and where, and nothing was written."""
    out = Path.cwd() / "out"
    words = {"SOURCE": f"{source}", "PHOTOS": f"{made_photos}", "STREETS": f"{streets}"}
    typed = [re.sub("^OUT", f"{out}", word) for word in command.split()]
    for name, value in words.items():
        typed = [word.replace(name, value) for word in typed]
    if typed[0] == "pretrain":
        typed += overrides(made_photos, out, schedule__steps=1, schedule__warmup_epochs=0)
    if "torchvision" in typed and typed[0] == "downstream":
        typed += [f"{key}={value}" for key, value in (SEGMENTER | {"schedule.steps": 1}).items()]
    capsys.readouterr()
    code = main(typed)
    said = capsys.readouterr()
    assert code == 2, said
    told = said.out if typed[0] == "inspect" else said.err
    last = told.splitlines()[-1]
    assert last.startswith("  refused " if typed[0] == "inspect" else "error: "), told
    assert str(source) in last
    assert re.search(pattern, last), last
    assert "Traceback" not in told
    if typed[0] != "pretrain":
        assert not list(Path.cwd().glob("out*"))


def each(kinds: Mapping[str, Any], commands: Mapping[str, str]) -> pytest.MarkDecorator:
    pairs = [pytest.param(kinds[kind], commands[name], id=f"{kind}-{name}") for kind in kinds for name in commands]
    return pytest.mark.parametrize(("kind", "command"), pairs)


@pytest.mark.parametrize("name", ["run", "bundle", "tensors.safetensors"])
def test_what_is_not_broken_is_taken(name, sound):
    assert main(["inspect", str(sound / name)]) == 0


# ---- the matrix ------------------------------------------------------------------------------------------------------


@each(CONFIGS, TAKE_BUNDLES)
def test_a_broken_config_ends_in_a_sentence(kind, command, sound, made_photos, streets, tmp_path, capsys):
    change, pattern = kind
    bundle = linked(sound / "bundle", tmp_path / "bundle")
    rewrite(bundle / "config.json", change)
    total = hashlib.sha256((bundle / "config.json").read_bytes()).hexdigest()
    rewrite(bundle / "clove_hub.json", put_in("sha256", **{"config.json": total}))
    require_refused(command, bundle, pattern, made_photos, streets, capsys)


@each(SUMS, TAKE_BUNDLES)
def test_a_bundle_whose_sums_do_not_hold_ends_in_a_sentence(
    kind, command, sound, made_photos, streets, tmp_path, capsys
):
    change, pattern = kind
    bundle = linked(sound / "bundle", tmp_path / "bundle")
    rewrite(bundle / "clove_hub.json", change)
    require_refused(command, bundle, pattern, made_photos, streets, capsys)


@each({**STATES, **UNREAD}, TAKE_RUNS)
def test_a_broken_state_ends_in_a_sentence(kind, command, sound, made_photos, streets, tmp_path, capsys):
    change, pattern = kind
    run = linked(sound / "run", tmp_path / "run")
    rewrite(run / "checkpoints" / "step_00000010" / "state.json", change)
    require_refused(command, run, pattern, made_photos, streets, capsys)


@each(UNREAD_SOON, TAKE_RUNS)
def test_a_state_that_cannot_be_read_ends_in_a_sentence(kind, command, sound, made_photos, streets, tmp_path, capsys):
    test_a_broken_state_ends_in_a_sentence(kind, command, sound, made_photos, streets, tmp_path, capsys)


@each(FILES, TAKE_FILES)
def test_a_broken_file_ends_in_a_sentence(kind, command, sound, made_photos, streets, tmp_path, capsys):
    write, pattern = kind
    write(tmp_path / "weights.pth", load_file(sound / "tensors.safetensors"))
    require_refused(command, tmp_path / "weights.pth", pattern, made_photos, streets, capsys)


@pytest.mark.parametrize("name", ["evaluate", "compare"])
def test_features_that_are_not_finite_end_in_a_sentence(name, sound, made_photos, streets, tmp_path, capsys):
    tensors = load_file(sound / "bundle" / "model.safetensors")
    weights = {key: tensor * 1e38 for key, tensor in tensors.items() if key.endswith("bn1.weight")}
    (tmp_path / "config.json").write_bytes((sound / "bundle" / "config.json").read_bytes())
    save_file(tensors | weights, tmp_path / "model.safetensors")
    pattern = "gives non-finite features, although its weights are finite.*Use an earlier checkpoint"
    require_refused(TAKE_BACKBONES[name], tmp_path, pattern, made_photos, streets, capsys)


# ---- bounds that refuse nothing sound --------------------------------------------------------------------------------


def test_the_images_of_all_of_timms_own_weights_are_within_the_bounds():
    for name in timm.list_pretrained():
        own = get_pretrained_cfg(name)
        seen = read_preprocessing(own.to_dict(), name)
        assert (seen.mean, seen.std, seen.size) == (tuple(own.mean), tuple(own.std), own.input_size[-1])


@pytest.mark.parametrize(
    ("name", "model_args"),
    [
        ("resnetrs420", {}),  # of all of timm's it has most modules and tensors
        ("swinv2_base_window12to24_192to384", {"img_size": 384}),  # and the largest tables
        ("vit_base_patch14_dinov2", {"img_size": 518, "init_values": 1e-5}),
    ],
)
def test_the_largest_models_of_timm_are_within_the_bounds(name, model_args, monkeypatch):
    monkeypatch.undo()
    found = architectures.architecture(name, architectures.checked_model_args(model_args, name, "it"))
    assert len(found.shapes) > 100


def test_a_model_is_bounded_before_it_is_built(monkeypatch):
    monkeypatch.undo()
    for model_args, message in (
        ({"depth": 900}, "has more than 10,000 modules and tensors"),
        ({"img_size": 65_536, "window_size": 64}, "computes tables of [0-9,]+ values, expected at most 67,108,864"),
    ):
        name = "swinv2_tiny_window8_256" if "img_size" in model_args else HUGE
        with pytest.raises(ValueError, match=rf"it: .*{name}.*{message}"):
            architectures.architecture(name, model_args, "it")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"projector_hidden": 10**9}, r"by its recipe: .*instead of \(1000000000,"),
        ({"projector_hidden": 10**30}, "by its recipe|no clove can be built"),
        ({"local_views": 10**9}, "has method.local_views=1000000000, expected at most 100: use another checkpoint"),
        ({"global_size": 10**9}, "has method.global_size=1000000000, expected at most 2048"),
        ({"feature_dim": "wide"}, "method.feature_dim='wide' is a str, expected int"),
    ],
)
def test_a_method_is_held_to_its_tensors_before_it_is_built(settings, message, sound, tmp_path):
    run = linked(sound / "run", tmp_path / "run")
    change: Change = lambda found: found["recipe"]["method"].update({"hard_negatives": 3, **settings})  # noqa: E731
    rewrite(run / "checkpoints" / "step_00000010" / "state.json", change)
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        _ = load_method(run).method
