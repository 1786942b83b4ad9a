"""What lies beside the weights is kept as numbers, text, lists and dicts, whatever class it is of, and nothing of it runs."""

from __future__ import annotations

import argparse
import collections
import datetime
import enum
import json
import os
import pathlib
import pickle
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_hostile import Makes, archive, laughs, pickled, tensor
from test_zoo import TENSORS, assert_same

from clove_hub.zoo.tensors import read_tensors


class Color(enum.Enum):
    RED = 3


class Slotted:
    __slots__ = ("a",)


def slotted() -> Slotted:
    made = Slotted()
    made.a = 1
    return made


def calls(depth: int = 25) -> Any:
    """A call that names another ten times, which names another ten times, ..."""
    inner = Makes(os.mkdir, "canary")
    for _ in range(depth):
        inner = Makes(os.mkdir, *[inner] * 10)
    return inner


def omegaconf() -> Any:
    config = pytest.importorskip("omegaconf").OmegaConf
    return config.create({"data": {"dataset": "COCO", "crops": [2, 6]}, "lr": 0.5, "none": None, "at": "${lr}"})


def yacs() -> Any:
    node = pytest.importorskip("yacs.config").CfgNode({"MODEL": {"ARCH": "resnet50"}, "LR": 0.5})
    node.freeze()
    return node


def easydict() -> Any:
    return pytest.importorskip("easydict").EasyDict(lr=0.5, aug={"crop": 0.2})


def mmengine_config() -> Any:
    return pytest.importorskip("mmengine.config").ConfigDict(model={"type": "BYOL", "momentum": 0.01}, epochs=200)


def mmengine_history() -> Any:
    history = pytest.importorskip("mmengine.logging").HistoryBuffer()
    history.update(0.5)
    return history


def lightning() -> Any:
    parsing = pytest.importorskip("pytorch_lightning.utilities.parsing")
    return parsing.AttributeDict(lr=0.5, backbone="resnet18")


BESIDE: dict[str, tuple[Callable[[], Any], Any]] = {
    # What is beside, and what is kept of it; a function asks about that.
    "numbers of NumPy": (
        lambda: [np.float64(0.5), np.float32(0.25), np.int64(7), np.bool_(True)],
        [0.5, 0.25, 7, True],
    ),
    "an array": (lambda: np.arange(6.0).reshape(2, 3), [[0, 1, 2], [3, 4, 5]]),
    "an array in Fortran's order": (lambda: np.asfortranarray(np.arange(6.0).reshape(2, 3)), [[0, 1, 2], [3, 4, 5]]),
    "an array whose first byte comes first": (lambda: np.arange(3, dtype=">i4"), [0, 1, 2]),
    "a large array": (lambda: np.zeros((50, 30)), "tensor of float64 (50, 30)"),
    "an array of texts": (lambda: np.array(["a"]), lambda kept: kept.startswith("a call of numpy")),
    "a tensor": (lambda: torch.arange(3), [0, 1, 2]),
    "a large tensor": (lambda: torch.zeros(50, 30), "tensor of float32 (50, 30)"),
    "a sparse tensor": (lambda: torch.eye(2).to_sparse(), lambda kept: "_rebuild_sparse_tensor" in kept),
    "things of torch": (
        lambda: [torch.Size([1, 2]), torch.float16, torch.device("cuda", 1)],
        [[1, 2], "torch.float16", "torch.device(cuda, 1)"],
    ),
    "options": (lambda: argparse.Namespace(lr=0.5, dirs=[Path("/a/b")]), {"lr": 0.5, "dirs": ["/a/b"]}),
    "a path of Windows": (lambda: pathlib.PureWindowsPath("D:\\runs\\1"), "D:\\runs\\1"),
    "a defaultdict": (lambda: collections.defaultdict(list, loss=[1.0]), {"loss": [1.0]}),
    "a Counter": (lambda: collections.Counter("aab"), {"a": 2, "b": 1}),
    "an OrderedDict": (lambda: collections.OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
    "a deque": (lambda: collections.deque([1, 2]), [1, 2]),
    "sets": (lambda: [{3}, frozenset({4}), set()], [[3], [4], []]),
    "dates": (
        lambda: [datetime.datetime(2023, 10, 2, 3, 4, 5), datetime.timedelta(1)],
        ["2023-10-02 03:04:05", "datetime.timedelta(1, 0, 0)"],
    ),
    "tuples as keys": (lambda: {(0, "a"): 1, 5: 2, None: 3}, {"(0, 'a')": 1, "5": 2, "None": 3}),
    "numbers of NumPy as keys": (lambda: {np.int64(3): 1}, {"3": 1}),
    "large numbers as keys": (lambda: {2**70: 1}, {"1180591620717411303424": 1}),
    "bytes": (
        lambda: [b"ab", bytearray(b"ab"), b"x" * 5000],
        lambda kept: kept[:2] == ["ab", "ab"] and len(kept[2]) < 10_000,
    ),
    "four hundred thousand numbers": (lambda: list(range(400_000)), lambda kept: kept[:3] == [0, 1, 2]),
    "random states": (
        lambda: [random.getstate(), np.random.default_rng(0).bit_generator.state, torch.get_rng_state()],
        lambda kept: kept[0][0] == 3 and len(kept[0][1]) == 625 and kept[1]["bit_generator"] == "PCG64",
    ),
    "a number of a million bits": (lambda: 1 << 1_000_000, "builtins.int(1000001 bits)"),
    "an enum": (lambda: Color.RED, f"{__name__}.Color(3)"),
    "an object with slots": (slotted, lambda kept: "Slotted" in kept),
    "a function": (lambda: os.mkdir, f"{os.mkdir.__module__}.mkdir"),
    "a program": (lambda: Makes(os.mkdir, "canary"), f"{os.mkdir.__module__}.mkdir(canary)"),
    "a program among options": (
        lambda: argparse.Namespace(lr=Makes(eval, "1 + 1"), epochs=3),
        {"lr": "builtins.eval(1 + 1)", "epochs": 3},
    ),
    "a list that holds itself": (lambda: [1, (ring := []), ring.append(ring)][:2], [1, ["..."]]),
    "lists that name each other": (laughs, lambda kept: len(json.dumps(kept)) < 1_000_000),
    "calls that name each other": (calls, lambda kept: len(json.dumps(kept)) < 1_000_000),
    "omegaconf": (omegaconf, {"data": {"dataset": "COCO", "crops": [2, 6]}, "lr": 0.5, "none": None, "at": "${lr}"}),
    "yacs": (yacs, {"MODEL": {"ARCH": "resnet50"}, "LR": 0.5}),
    "EasyDict": (easydict, {"lr": 0.5, "aug": {"crop": 0.2}}),
    "a configuration of mmengine": (mmengine_config, {"model": {"type": "BYOL", "momentum": 0.01}, "epochs": 200}),
    "a history of mmengine": (mmengine_history, lambda kept: kept["_log_history"] == [0.5]),
    "parameters of Lightning": (lightning, {"lr": 0.5, "backbone": "resnet18"}),
}


def save(path: Path, content: Any, how: int | str) -> None:
    if how == "before torch 1.6":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    else:
        torch.save(content, path, pickle_protocol=how)


@pytest.mark.parametrize("how", [2, 3, 4, 5, "before torch 1.6"])
@pytest.mark.parametrize("name", BESIDE)
def test_it_is_read_as_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, how: int | str) -> None:
    monkeypatch.chdir(tmp_path)
    make, expected = BESIDE[name]
    save(tmp_path / "in.pth", {"model": TENSORS, "it": make(), "epoch": 3}, how)
    before = set(sys.modules)
    tensors, rest = read_tensors(tmp_path / "in.pth")
    assert_same(tensors, TENSORS)
    kept = rest["it"]
    assert expected(kept) if callable(expected) else kept == expected, kept
    assert rest["epoch"] == 3
    json.dumps(rest)
    assert set(sys.modules) == before
    assert [path.name for path in tmp_path.iterdir()] == ["in.pth"], "code ran"


@pytest.mark.parametrize(
    ("code", "kept"),
    [
        (b"(X\x06\x00\x00\x00canaryios\nmkdir\n", "os.mkdir(canary)"),
        (b"(cos\nmkdir\nX\x06\x00\x00\x00canaryo", "os.mkdir(canary)"),
        (b"cos\nmkdir\nX\x06\x00\x00\x00canary\x85\x81", "os.mkdir(canary)"),
        (b"cos\nmkdir\nX\x06\x00\x00\x00canary\x85}\x92", "os.mkdir(canary, {})"),
        (
            b"c__builtin__\ngetattr\ncos\nmkdir\nX\x01\x00\x00\x00a\x86RX\x06\x00\x00\x00canary\x85R",
            "the result of a call",
        ),
        (b"\x82\x01", "copyreg extension 1"),
        (b"Pother\n", "a reference to stored values(other)"),
        (b"K\x01N0(K\x0221", "1"),
        (b"I01\nI7\n\x86", "[True, 7]"),
        (b"(S'a'\nL5L\nd", "{'a': 5}"),
        (b"(S'a'\nF1.5\nl", "['a', 1.5]"),
        (b"\x8f(K\x01\x90", "[1]"),
    ],
)
def test_every_way_to_make_an_object_makes_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: bytes, kept: str
) -> None:
    monkeypatch.chdir(tmp_path)
    start = pickled({"model": {"a": tensor()}})[:-1]
    archive(tmp_path / "in.pth", start + b"X\x02\x00\x00\x00it" + code + b"s.")
    tensors, rest = read_tensors(tmp_path / "in.pth")
    assert tensors["a"].shape == (2, 3)
    assert str(rest["it"]).startswith(kept)
    assert [path.name for path in tmp_path.iterdir()] == ["in.pth"], "code ran"


@pytest.mark.parametrize("how", [2, 4, "before torch 1.6"])
def test_a_file_that_was_changed_anywhere_is_read_or_refused_in_a_sentence(tmp_path: Path, how: int | str) -> None:
    """Without checksums, which would find every change."""
    torch.serialization.set_crc32_options(False)
    try:
        save(
            tmp_path / "in.pth", {"model": TENSORS, "args": argparse.Namespace(lr=np.float64(0.5), at=Path("/a"))}, how
        )
    finally:
        torch.serialization.set_crc32_options(True)
    content, drawn, refusals = (tmp_path / "in.pth").read_bytes(), random.Random(0), []
    for number in range(500):
        changed = bytearray(content)
        for _ in range(drawn.choice((1, 2, 5))):
            changed[drawn.randrange(4, len(changed))] = drawn.choice((drawn.randrange(256), *b".(0Rbuse\x81\x85\x93"))
        (tmp_path / f"{number}.pth").write_bytes(changed)  # of its own: the last one may still be mapped
        try:
            json.dumps(read_tensors(tmp_path / f"{number}.pth")[1])
        except ValueError as error:
            refusals.append(str(error))
        (tmp_path / f"{number}.pth").unlink()
    assert 50 < len(refusals) < 500
    assert all(refusal.startswith(str(tmp_path)) for refusal in refusals)


# ---- weights that are NumPy's ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_arrays_are_weights_too_in_a_pickle_and_in_an_archive(tmp_path: Path, protocol: int) -> None:
    """As Detectron2's converters write them; numbers that begin at any byte."""
    rng = np.random.default_rng(0)
    arrays = {
        "float32": rng.standard_normal((3, 5, 7)).astype(np.float32),
        "large": rng.standard_normal((100, 30)).astype(np.float32),
        "fortran": np.asfortranarray(rng.standard_normal((30, 100))),
        "swapped": rng.standard_normal((30, 100)).astype(">f4"),
        "half": rng.standard_normal(7).astype(np.float16),
        "count": np.array(5),
        "flags": np.array([True, False]),
        "empty": np.zeros((0, 3), np.float32),
    }
    (tmp_path / "in.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "MOCO"}, protocol))
    torch.save({"model": arrays, "__author__": "MOCO"}, tmp_path / "in.pth", pickle_protocol=protocol)
    for name in ("in.pkl", "in.pth"):
        tensors, rest = read_tensors(tmp_path / name)
        assert_same(tensors, {key: torch.from_numpy(a.astype(a.dtype.newbyteorder("="))) for key, a in arrays.items()})
        assert rest == {"__author__": "MOCO"}


@pytest.mark.parametrize("how", [2, 4, "before torch 1.6"])
def test_parameters_and_views_are_weights_too(tmp_path: Path, how: int | str) -> None:
    flat = torch.randn(100)
    named = torch.nn.Parameter(torch.randn(3, 4))
    named.of = "somebody"  # type: ignore[attr-defined]
    weights = {
        "parameter": torch.nn.Parameter(torch.randn(2, 3)),
        "with attributes": named,
        "a view": flat[10:22].view(3, 4),
        "transposed": flat[:12].view(3, 4).t(),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "a scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "after them": torch.randn(3),  # which is not where the processor wants it, before 1.6
    }
    save(tmp_path / "in.pth", {"state_dict": weights}, how)
    tensors, _ = read_tensors(tmp_path / "in.pth")
    assert_same(tensors, {name: tensor.detach() for name, tensor in weights.items()})
    assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in tensors.values())
    tensors["a view"].fill_(0)  # which changes memory, not the file
    assert torch.equal(read_tensors(tmp_path / "in.pth")[0]["a view"], weights["a view"])


def test_a_dict_as_python_2_wrote_it_holds_weights(tmp_path: Path) -> None:
    """A list of pairs, with texts of bytes: the first files of torchvision's model zoo."""
    written = pickled({"model": Makes(collections.OrderedDict, [["a", tensor()], ["b", tensor(offset=6)]])})
    archive(tmp_path / "in.pth", written.replace(b"X\x01\x00\x00\x00", b"U\x01"))
    assert read_tensors(tmp_path / "in.pth")[0].keys() == {"a", "b"}


def test_a_file_that_torch_wrote_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"model": TENSORS}, tmp_path / "in.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(read_tensors(tmp_path / "in.pth")[0], TENSORS)
