"""A process in which the publish command runs again and again, because importing torch and timm takes seconds.

Started by `Worker` with the environment of a `LoopbackHub`. Each line of its input is an order, each line of its
output the answer to one.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from loopback_hub import ORGANIZATION, READ_TOKEN, TOKEN, LoopbackHub

from clove_hub.export.card import Published
from clove_hub.export.card_files import published_files

NAME = f"{ORGANIZATION}/test_resnet.clove"
"""Of the repository that the tests publish to."""


@functools.cache
def contents(bundle: Path, tag: str = "v1.0.0") -> dict[str, bytes]:
    """What publishing a bundle as this version puts into the repository `NAME`, by name."""
    files = {path.name: path.read_bytes() for path in bundle.iterdir()}
    return files | published_files(bundle, Published(NAME, tag))


class Reply(NamedTuple):
    code: int
    """What the command would exit with; -1 if an exception got out of it."""
    printed: str
    """Everything that it printed and logged."""


class Worker:
    """Gives orders to the process; runs while the `with` block does."""

    def __init__(self, hub: LoopbackHub, home: Path) -> None:
        beside = {"PYTHONPATH": str(Path(__file__).parents[2])}  # the code beside the tests, not what is installed
        environment = os.environ | hub.environment(home) | {"HF_HUB_VERBOSITY": "debug"} | beside
        home.mkdir(exist_ok=True)
        self.stderr = home / "stderr"
        with self.stderr.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, __file__],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def publish(self, *arguments: object, fresh: bool = False, free: int | None = None, **environment: str) -> Reply:
        """The command with these arguments.

        Args:
            fresh: read back in a fresh process, as the command does; otherwise in this one, which takes less time.
            free: bytes that the disk seems to have left.
        """
        order = {"arguments": list(map(str, arguments)), "fresh": fresh, "free": free, "environment": environment}
        reply = Reply(**self._ask(order))
        for token in (TOKEN, READ_TOKEN, "hf_wrong"):
            assert token not in reply.printed, "the token was printed"
        return reply

    def push(self, source: Path) -> None:
        """What timm's own function for publishing makes of a bundle."""
        assert self._ask({"push": NAME, "bundle": str(source)}) == {}

    def require_loads(self, bundle: Path) -> None:
        """With an empty cache timm and transformers make of v1.0.0 on the Hub what they make of the bundle."""
        found = self._ask({"load": NAME, "revision": "v1.0.0", "bundle": str(bundle)})
        modes = {"plain", "num_classes=0", "num_classes=10", "features_only=True", "in_chans=1"}
        assert found.keys() >= {*modes, "features_only=True, output_stride=16"}
        assert not any(found.values()), found
        if "transformers" not in found:
            pytest.skip("timm loads it in every mode; transformers is not installed")

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the process died: {self.stderr.read_text()[-3000:]}"
        answer: dict[str, Any] = json.loads(line)
        return answer


# ---- in the process ----------------------------------------------------------------------------------------


def serve() -> None:
    import shutil

    from clove_hub.cli import main
    from clove_hub.export import publish
    from clove_hub.export.read_back import read_back

    def read_back_here(repository: str, commit: str, sums: Mapping[str, str], with_timm: bool) -> None:
        with tempfile.TemporaryDirectory() as cache:
            read_back(repository, commit, sums, with_timm, cache)

    in_a_fresh_process, disk_usage = publish.read_back_in_a_fresh_process, shutil.disk_usage
    publish.bundle_artifact = functools.cache(publish.bundle_artifact)  # no bundle is changed once it was published
    time.sleep = lambda seconds: None  # the client waits between its tries
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a process in the background may have been told to ignore it

    def carry_out(order: dict[str, Any]) -> dict[str, Any]:
        if "push" in order:
            import timm

            timm.models.push_to_hf_hub(
                timm.create_model(f"local-dir:{order['bundle']}", pretrained=True), order["push"]
            )
            return {}
        if "load" in order:
            return load(order["load"], order["revision"], Path(order["bundle"]))
        publish.read_back_in_a_fresh_process = in_a_fresh_process if order["fresh"] else read_back_here
        free = order["free"]
        shutil.disk_usage = (lambda path: disk_usage(path)._replace(free=free)) if free else disk_usage
        printed = io.StringIO()
        handler = logging.StreamHandler(printed)
        loggers = [logging.getLogger(), logging.getLogger("huggingface_hub")]
        before = dict(os.environ)
        os.environ.update(order["environment"])
        for logger in loggers:
            logger.addHandler(handler)
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                code = main(["publish", *order["arguments"]])
        except BaseException:
            printed.write(traceback.format_exc())
            code = -1
        finally:
            for logger in loggers:
                logger.removeHandler(handler)
            os.environ.clear()
            os.environ.update(before)
        return {"code": code, "printed": printed.getvalue()}

    for line in sys.stdin:
        print(json.dumps(carry_out(json.loads(line))), flush=True)


def load(name: str, revision: str, bundle: Path) -> dict[str, str]:
    """What timm and transformers make of the repository, compared bit for bit with what they make of the bundle."""
    import timm
    import torch
    from PIL import Image

    image = torch.rand(2, 3, 64, 64)

    def made(source: str, cache: str | None = None, **mode: Any) -> Any:
        return timm.create_model(source, pretrained=True, cache_dir=cache, **mode).eval()

    def different(ours: Mapping[str, Any], theirs: Mapping[str, Any], head: bool = False) -> str:
        names = [key for key in {**ours, **theirs} if not (head and key.startswith("fc."))]
        return ", ".join(key for key in names if not torch.equal(ours[key], theirs[key]))

    found = {}
    for mode in (
        {},
        {"num_classes": 0},
        {"num_classes": 10},
        {"features_only": True},
        {"features_only": True, "output_stride": 16},
        {"in_chans": 1},
    ):
        told = ", ".join(f"{key}={value}" for key, value in mode.items()) or "plain"
        try:
            with tempfile.TemporaryDirectory() as cache, torch.no_grad():
                theirs, ours = made(f"hf-hub:{name}@{revision}", cache, **mode), made(f"local-dir:{bundle}", **mode)
                found[told] = different(ours.state_dict(), theirs.state_dict(), head="num_classes" in mode)
                if "features_only" in mode and not all(map(torch.equal, theirs(image), ours(image))):
                    found[told] += "other feature maps"
        except Exception:
            found[told] = traceback.format_exc()
    try:
        from transformers import AutoImageProcessor, AutoModel
    except ImportError:
        return found
    ours = made(f"local-dir:{bundle}")
    photo = Image.fromarray((torch.rand(90, 120, 3) * 255).byte().numpy())
    prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(ours), is_training=False)
    with tempfile.TemporaryDirectory() as cache, torch.no_grad():
        model = AutoModel.from_pretrained(name, revision=revision, cache_dir=cache).eval()
        processor = AutoImageProcessor.from_pretrained(name, revision=revision, cache_dir=cache)
        pixels = processor(photo, return_tensors="pt")["pixel_values"]
        found["transformers, pixels"] = "" if torch.equal(pixels[0], prepare(photo)) else "other pixels"
        same = torch.equal(model(pixels).last_hidden_state, ours.forward_features(pixels))
        found["transformers"] = "" if same else "other features"
    return found


if __name__ == "__main__":
    serve()
