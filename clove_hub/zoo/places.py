"""Where the weights of the zoo's models are: adopted on this machine, or under a namespace on the Hub that the user chose.

Finding out takes no torch, and does not ask the Hub.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import yaml

from .models import Model

NAMESPACE = "CLOVE_HUB_NAMESPACE"
"""The environment variable that says whose copies on the Hub are meant, and which version of them: `acme` or
`acme@v1.0.0`; otherwise `namespace` in `config_file()`."""


def weights_of(model: Model) -> Path | str | None:
    """Where to load a model's weights from: the file of an adopted model, or else `hub_id`."""
    file = adopted(model.name) / "model.safetensors"
    return file if file.is_file() and file.with_name("config.json").is_file() else hub_id(model)


def how_to_get(model: Model) -> str:
    """What to do where nothing is known of a model's weights."""
    return (
        f"no weights of {model.name} are known here. They were released at {model.paper.code}"
        f"{f' ({model.weights})' if model.weights else ''}: `clove-hub adopt FILE "
        f"--as {model.name}` takes a file from there over; or name a user or organization on the Hub that publishes them, "
        f"with {NAMESPACE} or as `namespace` in {config_file()}"
    )


def hub_id(model: Model) -> str | None:
    """What a model is called on the Hub under the chosen namespace, whether or not it is there; None if none was chosen.

    With a revision it is `organization/name@revision`, as timm takes it after `hf-hub:`.
    """
    chosen = namespace()
    if chosen is None:
        return None
    return f"{chosen.owner}/{model.name}{f'@{chosen.revision}' if chosen.revision else ''}"


class Namespace(NamedTuple):
    """Whose copies of the models on the Hub are meant."""

    owner: str
    """An organization or user."""
    revision: str | None
    """The tag, branch or commit that every model is taken at; None for the newest."""


def namespace() -> Namespace | None:
    """The namespace that was chosen; None if none was.

    Raises:
        ValueError: what was chosen is no name on the Hub, or the settings cannot be read.
    """
    chosen, where = os.environ.get(NAMESPACE), NAMESPACE
    if not chosen and config_file().is_file():
        where = f"namespace in {config_file()}"
        try:
            settings = yaml.safe_load(config_file().read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"{config_file()} cannot be read: {error}") from error
        if not isinstance(settings, dict) or settings.keys() - {"namespace"}:
            raise ValueError(
                f"{config_file()} holds {settings!r}; expected one key, as in `namespace: my-organization`"
            )
        chosen = settings.get("namespace")
    if not chosen:
        return None
    found = re.fullmatch(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(?:@([A-Za-z0-9][\w./-]*))?", str(chosen))
    if found is None:
        raise ValueError(
            f"{where} is {chosen!r}, which is no name of a user or organization on the Hub: write my-organization, or "
            "my-organization@v1.0.0 for the models at one tag, branch or commit"
        )
    return Namespace(found[1], found[2])


def config_file() -> Path:
    """Where a user's settings are: `$XDG_CONFIG_HOME/clove-hub/config.yaml`, `~/.config/...` by default."""
    home = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(home).expanduser() / "clove-hub" / "config.yaml"


def confirmed() -> set[str]:
    """The `hub_id`s under which `clove-hub models --check` last found weights on the Hub."""
    try:
        found = json.loads(confirmed_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a cache: what cannot be read is not known
        return set()
    return {one for one in found if isinstance(one, str)} if isinstance(found, list) else set()


def confirmed_file() -> Path:
    """Where `clove-hub models --check` keeps what it found: `$XDG_CACHE_HOME/clove-hub/confirmed.json`."""
    return cache_folder() / "confirmed.json"


def adopted(name: str) -> Path:
    """The bundle of an adopted model, unless it was put elsewhere: `$XDG_CACHE_HOME/clove-hub/models/<name>`."""
    return cache_folder() / "models" / name


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/clove-hub`, `~/.cache/clove-hub` by default: for adopted models and for downloads."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "clove-hub"
