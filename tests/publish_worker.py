"""A process in which the publish command runs again and again, because importing torch and timm takes seconds.

Started with the environment of a `LoopbackHub`. Each line of its input is an order: the command's arguments, and
what changes in its environment. Each line of its output tells the exit code and what was printed and logged.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping

from clove_hub.export import publish
from clove_hub.export.read_back import read_back


def read_back_here(repository: str, commit: str, sums: Mapping[str, str], with_timm: bool) -> None:
    """With an empty cache, but without the seconds that a fresh process takes."""
    with tempfile.TemporaryDirectory() as cache:
        read_back(repository, commit, sums, with_timm, cache)


def main() -> None:
    publish.read_back_in_a_fresh_process = read_back_here
    time.sleep = lambda seconds: None  # the client waits between its tries
    answers = sys.stdout
    for line in sys.stdin:
        order = json.loads(line)
        printed = io.StringIO()
        handler = logging.StreamHandler(printed)
        logging.getLogger().addHandler(handler)
        before = dict(os.environ)
        os.environ.update(order["environment"])
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                code = publish.publish_main(order["arguments"])
            except BaseException:
                traceback.print_exc()
                code = -1
        os.environ.clear()
        os.environ.update(before)
        logging.getLogger().removeHandler(handler)
        print(json.dumps({"code": code, "printed": printed.getvalue()}), file=answers, flush=True)


if __name__ == "__main__":
    main()
