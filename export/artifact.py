"""What can be published: a bundle, or the full state of a pre-training run. Both are a few files with their sums."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from clove_hub.runs import sha256
from clove_hub.weights.bundle import PROVENANCE
from clove_hub.weights.run import State, find_checkpoint, is_run

from .bundle import CARD, check_bundle, without_folders
from .metadata import check_metadata, require_license

STATE = "state.json"
SAME_MODEL = ("method", "backbone", "model")
"""What all versions in one repository have in common, of what is told in `Artifact.told_in`."""

STATE_CARD = Template("""---
license: $license
library_name: clove-hub
tags:
- self-supervised
- $method
---

# The state of a pre-training run: $backbone, $method

Everything that the training of $method had built after step $step of $steps_total ($images images, "$data"): student,
teacher, heads, and what the optimizer remembers. It is for continuing the pre-training; to use the backbone, take its
bundle instead.

| file | what it holds |
|---|---|
| `model.safetensors` | student, teacher and heads |
| `optimizer.safetensors` | the optimizer's momentum |
| `state.json` | the resolved recipe, versions, sums of the other files |

```bash
clove-hub pretrain RECIPE run.init_from=hf-hub:$repository
```

| | |
|---|---|
| license | $license |
$sums
""")


@dataclass(frozen=True)
class File:
    """One file to publish."""

    content: Path | bytes
    size: int
    sha256: str

    def git_id(self) -> str:
        """What git calls this content, and so the Hub, unless it stores the file as a large one."""
        digest = hashlib.sha1(b"blob %d\0" % self.size)
        digest.update(self.content if isinstance(self.content, bytes) else self.content.read_bytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Artifact:
    """What is published in one commit."""

    what: str
    """For messages: `the bundle photos/bundle`."""
    files: Mapping[str, File]
    """By their name in the repository. Nothing else is ever uploaded."""
    told_in: str
    """The file that says which model this is; a repository without it is somebody else's."""
    model: Mapping[str, Any]
    """What it says, of SAME_MODEL."""
    loads_with_timm: bool

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files.values())


def bundle_artifact(folder: Path) -> Artifact:
    """A bundle, after it has passed its self-check.

    Raises:
        ValueError: it is no bundle, fails `check_bundle`, or its card names no license or is nothing for the Hub.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not the folder of a bundle; `clove-hub export RUN` makes one")
    if is_run(folder):
        raise ValueError(
            f"{folder} is a run: publish the bundle that `clove-hub export {folder}` makes, or the run's full state "
            "with --state"
        )
    check_bundle(folder)
    check_metadata((folder / CARD).read_text(encoding="utf-8"))
    told = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    return Artifact(
        what=f"the bundle {folder}",
        files={name: _file(folder / name) for name in sorted({*told["sha256"], PROVENANCE})},
        told_in=PROVENANCE,
        model={key: told.get(key) for key in SAME_MODEL},
        loads_with_timm=True,
    )


def state_artifact(run: Path, repository: str, license: str | None) -> Artifact:
    """The newest whole checkpoint of a run, with a card, and without the names of the machine's folders.

    Args:
        repository: where it will be found, for the card.
        license: id of the license of the weights, as the Hub spells it.

    Raises:
        ValueError: no license was given or it is none, or as `find_checkpoint`.
    """
    if license is None:
        raise ValueError(
            "--state needs --license, for weights without a license may be used by nobody: mit, apache-2.0, "
            "cc-by-nc-4.0, ..."
        )
    require_license(license)
    found = find_checkpoint(run)
    raw = json.loads((found.folder / STATE).read_text(encoding="utf-8"))
    state = (json.dumps(without_folders(raw), indent=1, ensure_ascii=False) + "\n").encode()
    files = {name: _file(found.folder / name) for name in found.state.files}
    card = _state_card(found.state, repository, license, files).encode()
    return Artifact(
        what=f"the state in {found.folder}",
        files=dict(sorted((files | {STATE: _file(state), CARD: _file(card)}).items())),
        told_in=STATE,
        model={key: raw.get(key) for key in SAME_MODEL},
        loads_with_timm=False,
    )


def _state_card(state: State, repository: str, license: str, files: Mapping[str, File]) -> str:
    return STATE_CARD.substitute(
        license=license,
        method=state.method,
        backbone=state.backbone,
        step=f"{state.step:,}",
        steps_total=f"{state.steps_total:,}",
        images=f"{state.data['images']:,}",
        data=Path(str(state.data["name"])).name,
        repository=repository,
        sums="\n".join(f"| sha256 of {name} | `{file.sha256}` |" for name, file in sorted(files.items())),
    )


def _file(content: Path | bytes) -> File:
    if isinstance(content, bytes):
        return File(content, len(content), hashlib.sha256(content).hexdigest())
    return File(content, content.stat().st_size, sha256(content))
