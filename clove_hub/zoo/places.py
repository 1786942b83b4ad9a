"""Where the weights of the zoo's models are: adopted on this machine, or under a chosen namespace on the Hub.

This needs neither torch nor a request to the Hub.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import yaml

from clove_hub.documents import reason

from .models import Model

NAMESPACE = "CLOVE_HUB_NAMESPACE"
"""The environment variable for the owner of the copies on the Hub, and their version: `acme` or `acme@v1.0.0`; by
default `namespace` in `config_file()`."""


def weights_of(model: Model) -> Path | str | None:
    """The source of a model's weights: the file of an adopted model, otherwise `hub_id`."""
    file = adopted(model.name) / "model.safetensors"
    return file if file.is_file() and file.with_name("config.json").is_file() else hub_id(model)


def how_to_get(model: Model) -> str:
    """The instructions for a model whose weights are not known here."""
    return (
        f"no weights of {model.name} are known here. They were released at {model.paper.code}"
        f"{f' ({model.weights})' if model.weights else ''}: `clove-hub adopt FILE "
        f"--as {model.name}` converts a file from there; or name a user or organization on the Hub that publishes them, "
        f"with {NAMESPACE} or as `namespace` in {config_file()}"
    )


def hub_id(model: Model) -> str | None:
    """A model's id on the Hub under the chosen namespace, whether or not it exists; None if none was chosen.

    With a revision it is `organization/name@revision`, timm's form after `hf-hub:`.
    """
    chosen = namespace()
    if chosen is None:
        return None
    return f"{chosen.owner}/{model.name}{f'@{chosen.revision}' if chosen.revision else ''}"


class Namespace(NamedTuple):
    """The owner and version of the models' copies on the Hub."""

    owner: str
    """An organization or user."""
    revision: str | None
    """The tag, branch or commit of every model; None for the newest."""


def namespace() -> Namespace | None:
    """The chosen namespace; None if none was chosen.

    Raises:
        ValueError: it is not a valid name on the Hub, or the settings cannot be read.
    """
    chosen, where = os.environ.get(NAMESPACE), NAMESPACE
    if not chosen and config_file().is_file():
        where = f"namespace in {config_file()}"
        try:
            settings = yaml.safe_load(config_file().read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"{config_file()} cannot be read: {reason(error)}") from error
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
            f"{where} is {chosen!r}, which cannot be a user or organization on the Hub: write my-organization, or "
            "my-organization@v1.0.0 for the models at one tag, branch or commit"
        )
    return Namespace(found[1], found[2])


def config_file() -> Path:
    """The user's settings: `$XDG_CONFIG_HOME/clove-hub/config.yaml`, `~/.config/...` by default."""
    home = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(home).expanduser() / "clove-hub" / "config.yaml"


def confirmed() -> set[str]:
    """The `hub_id`s under which `clove-hub models --check` last found weights on the Hub."""
    try:
        found = json.loads(confirmed_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a cache: unreadable counts as unknown
        return set()
    return {one for one in found if isinstance(one, str)} if isinstance(found, list) else set()


def confirmed_file() -> Path:
    """The results of `clove-hub models --check`: `$XDG_CACHE_HOME/clove-hub/confirmed.json`."""
    return cache_folder() / "confirmed.json"


def adopted(name: str) -> Path:
    """The default folder of an adopted model's bundle: `$XDG_CACHE_HOME/clove-hub/models/<name>`."""
    return cache_folder() / "models" / name


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/clove-hub`, `~/.cache/clove-hub` by default: for adopted models and for downloads."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "clove-hub"
