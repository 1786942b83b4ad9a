"""Files that the methods' own code wrote.

Each is taken for what it is, and gives the bits that lie in it; those that were made to do harm do none.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import released_files
import torch
from safetensors.torch import load_file

from clove_hub.export.adopt import adopt
from clove_hub.export.confirm import only_match
from clove_hub.export.inspect import Inspection, inspect_source
from clove_hub.weights import load
from clove_hub.zoo.facts import facts
from clove_hub.zoo.models import models
from clove_hub.zoo.released import recognize
from clove_hub.zoo.tensors import read_contents

SEED = 7
NAMES = released_files.names()


@pytest.fixture(scope="module", params=NAMES)
def released(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """One file at a time: together they have 11 GB."""
    folder = tmp_path_factory.mktemp("released")
    path = released_files.rebuild(request.param, folder, SEED)
    yield request.param, path, released_files.expected(request.param)
    path.unlink()


@pytest.fixture(scope="module")
def inspected(released: tuple[str, Path, dict[str, Any]]) -> Inspection:
    return inspect_source(released[1])


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the hostile files would write, and nothing else does."""
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    yield
    assert not (tmp_path / "canary").exists(), "code ran"


pytestmark = [pytest.mark.long, pytest.mark.usefixtures("canary")]


def test_it_is_called_what_it_is(released: tuple[str, Path, dict[str, Any]], inspected: Inspection) -> None:
    _, _, expected = released
    if expected.get("hostile") == "weights":
        assert inspected.refused is not None
        assert "nothing that a file names is called" in inspected.refused or "numbers" in inspected.refused
        return
    assert inspected.refused is None
    called = f"{inspected.format} {inspected.what}".lower()
    assert any(word in called for word in expected["method"]), called
    assert inspected.architecture == expected["architecture"]
    assert inspected.exported in expected["network"]
    if expected.get("epoch") is not None:
        assert inspected.says["epoch"] == expected["epoch"]
    if expected.get("dataset"):
        assert inspected.says["dataset"] == expected["dataset"]
    json.dumps(inspected.says | inspected.options)


def test_it_gives_the_bits_that_lie_in_it(released: tuple[str, Path, dict[str, Any]]) -> None:
    name, path, expected = released
    if expected.get("hostile"):
        pytest.skip("the same as its twin's, or refused")
    tensors = load(path).tensors
    choices = [expected["probes"], *([expected["or_probes"]] if "or_probes" in expected else [])]
    assert any(
        all(torch.equal(tensors[p["name"]].flatten(), released_files.stored(name, SEED, p)) for p in probes)
        for probes in choices
    )


def test_names_that_are_true_are_accepted_and_others_refused(
    released: tuple[str, Path, dict[str, Any]], tmp_path: Path
) -> None:
    _, path, expected = released
    for number, true in enumerate(expected["accept"]):
        weights = adopt(path, true["as"], tmp_path / str(number), license=true.get("license"))
        written = load_file(tmp_path / str(number) / "model.safetensors")
        assert written.keys() == weights.tensors.keys()
        taken = load(path).tensors
        if weights.exported in ("backbone", *expected["network"]):
            assert all(torch.equal(written[key], taken[key].to(written[key].dtype)) for key in written)
    zoo = [true["as"] for true in expected["accept"] if true["as"] in models()]
    if zoo and expected.get("epoch"):
        contents = read_contents(path)
        found, told = recognize(contents.tensors, ""), facts(contents.rest)
        assert found is not None
        if expected.get("dataset"):
            assert only_match("", "", found, told).name == zoo[0]
        else:
            with pytest.raises(ValueError, match=zoo[0]):
                only_match("", "", found, told)
    for false in expected["refuse"]:
        words = "|".join(false["because"])
        with pytest.raises(ValueError, match=rf"(?i)^(?!.*cannot read).*({words})"):
            adopt(path, false["as"], tmp_path / "refused", license=false.get("license"))
    assert not (tmp_path / "refused").exists()
