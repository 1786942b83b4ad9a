"""The card of a published bundle, read on the Hub by a stranger: in an empty folder, with an empty cache."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from loopback_hub import LoopbackHub, Repository, regular
from measured import MEASURED
from patience import PATIENCE
from PIL import Image
from publish_worker import NAME, contents
from synthetic import write_run

from clove_hub.export import check_bundle, export_run
from clove_hub.export.bundle import add_results

ROOT = Path(__file__).parents[2]
READER = """
import contextlib, io, json, os, re, sys
from pathlib import Path
from importlib.util import find_spec
from huggingface_hub import hf_hub_download, snapshot_download

name, tag = sys.argv[1:]
card = Path(hf_hub_download(name, "README.md", revision=tag)).read_text(encoding="utf-8")
ran = []
for snippet in re.findall(r"```python\\n(.*?)```", card, re.DOTALL):
    if "transformers" in snippet and find_spec("transformers") is None:
        continue
    exec(snippet, names := {})
    shapes = {key: list(value.shape) for key, value in names.items() if hasattr(value, "shape")}
    ran.append(shapes | {"sides": [one.shape[-1] for one in names.get("maps", [])]})
cache = snapshot_download(name, revision=tag)
snapshot_download(name, revision=tag, local_dir="copy")

from clove_hub.cli import main

os.environ["HF_TOKEN"] = sys.stdin.read()
with contextlib.redirect_stdout(io.StringIO()) as again:
    main(["publish", "copy", "--repo", name, "--tag", tag, "--yes"])
with contextlib.redirect_stdout(io.StringIO()) as newer:
    main(["publish", "copy", "--repo", name, "--tag", "v1.1.0"])
found = {"card": card, "ran": ran, "cache": cache, "again": again.getvalue(), "newer": newer.getvalue()}
Path("found.json").write_text(json.dumps(found))
"""


class Visit(NamedTuple):
    """What a stranger finds."""

    hub: LoopbackHub
    folder: Path
    """In which the snippets ran; `copy` in it is a downloaded copy of the repository."""
    environment: dict[str, str]
    card: str
    ran: list[dict[str, Any]]
    cache: Path
    """The repository in the client's cache."""
    again: str
    """What publishing the copy under the same tag prints."""
    newer: str
    """What publishing it under another tag would do."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a ResNet-18, which has a snippet for Detectron2, with curves."""
    run = tmp_path_factory.mktemp("card_on_hub") / "run"
    write_run(run, "resnet18", finished=True)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 10, "loss": 2.0}\n')
    link = "https://example.org/terms"
    return export_run(run, license="other", license_name="example-research-1.0", license_link=link)


@pytest.fixture(scope="module")
def visit(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Visit]:
    folder, home = tmp_path_factory.mktemp("stranger"), tmp_path_factory.mktemp("stranger_home")
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photo.jpg")
    with LoopbackHub() as hub:
        repository = hub.repositories[NAME] = Repository(private=False)
        held = {name: regular(content) for name, content in contents(bundle).items()}
        repository.tags["v1.0.0"] = repository.commit("Publish v1.0.0", {".gitattributes": regular(b""), **held})
        environment = os.environ | hub.environment(home) | {"PYTHONPATH": str(ROOT)}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        token = environment.pop("HF_TOKEN")
        run([sys.executable, "-c", READER, NAME, "v1.0.0"], folder, environment, token)
        found = json.loads((folder / "found.json").read_text())
        yield Visit(hub, folder, environment, cache=Path(found.pop("cache")), **found)


def run(command: list[str], folder: Path, environment: dict[str, str], said: str = "") -> None:
    done = subprocess.run(
        command, cwd=folder, env=environment, input=said, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"


def test_every_python_snippet_runs_by_itself(visit: Visit) -> None:
    embedding, maps, classifier, *transformers = visit.ran
    assert embedding["embedding"] == [1, 512]
    assert maps["sides"] == [32, 16, 8, 4, 2]
    assert classifier["sides"] == []
    assert all(one["features"] == [1, 512, 2, 2] for one in transformers)


@pytest.mark.slow
def test_its_commands_run(visit: Visit) -> None:
    to_transformers, to_detectron2 = re.findall(r"```bash\n(.*?)\n```", visit.card)
    run(shlex.split(to_detectron2), visit.folder, visit.environment)
    assert (visit.folder / "backbone.pth").is_file()
    pytest.importorskip("transformers", minversion="5", reason="transformers 5 is not installed")
    run(shlex.split(to_transformers), visit.folder, visit.environment)
    assert (visit.folder / "detector/model.safetensors").is_file()


def test_every_address_in_it_is_of_this_version(visit: Visit) -> None:
    snippets = "".join(re.findall(r"```(?:python|bash)\n.*?```", visit.card, re.DOTALL))
    assert snippets.count(f"hf-hub:{NAME}@v1.0.0") == 5
    assert snippets.count(f'from_pretrained("{NAME}", revision="v1.0.0")') == 2
    assert "local-dir" not in visit.card
    (image,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", visit.card)
    held = visit.hub.repositories[NAME].held
    assert held[image].startswith(b"\x89PNG")
    assert set(re.findall(r"^\| `([^`]+)` \|", visit.card, re.MULTILINE)) >= held.keys() - {"README.md"}


def test_its_license_is_one_that_the_hub_has_no_id_for(visit: Visit) -> None:
    front = yaml.safe_load(visit.card.split("---\n")[1])
    found = [front[key] for key in ("license", "license_name", "license_link")]
    assert found == ["other", "example-research-1.0", "https://example.org/terms"]
    assert "[example-research-1.0](https://example.org/terms)" in visit.card


def test_a_downloaded_copy_is_a_bundle_and_publishing_it_changes_nothing(visit: Visit) -> None:
    copy = visit.folder / "copy"
    check_bundle(copy)
    told = json.loads((copy / "clove_hub.json").read_text())["sha256"]
    assert told["README.md"] == hashlib.sha256((copy / "README.md").read_bytes()).hexdigest()
    assert f"Already published: {NAME} holds exactly this" in visit.again
    assert len(visit.hub.repositories[NAME].commits) == 1


def test_a_new_tag_gives_a_new_card(visit: Visit, bundle: Path) -> None:
    changed = re.findall(r"^  (\S+) .*  changed$", visit.newer, re.MULTILINE)
    assert changed == ["README.md", "clove_hub.json"]
    new = contents(bundle, "v1.1.0")["README.md"].decode()
    assert new == visit.card.replace("v1.0.0", "v1.1.0")
    assert "local-dir:." in (bundle / "README.md").read_text()


def test_results_go_into_a_copy_and_never_into_the_cache(visit: Visit) -> None:
    with pytest.raises(ValueError, match=r"is in the cache of the Hub's client.*cp -rL"):
        add_results(visit.cache, [MEASURED])
    copy = visit.folder / "copy"
    add_results(copy, [MEASURED])
    card = (copy / "README.md").read_text()
    assert "local-dir:." in card, "the published tag does not have these results"
    assert "12.34" in card
    assert {path.name for path in copy.iterdir()} >= {".gitattributes", ".cache"}, "what belongs to the copy was lost"
    check_bundle(copy)
