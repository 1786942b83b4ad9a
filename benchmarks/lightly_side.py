"""lightly's loader beside ours, in a process of another Python: started, asked, ended."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from clove_hub.training.recipe import Recipe
from clove_hub.views import ViewSpec

from .peers import python_with

PROGRAM = Path(__file__).with_name("lightly_loader.py")


class Lightly:
    """lightly's DINO transform on the recipe's photos, with our sizes and areas; its strengths of color are its own.

    Args:
        python: one that has lightly.
        spec: two large views and some small ones, as the transform makes.
        workers: of a loader.

    Raises:
        ValueError: lightly is not installed there, or the views are others.
    """

    def __init__(self, python: str, recipe: Recipe, spec: ViewSpec, workers: int) -> None:
        program, self.version = python_with(python, "lightly", "--peers", "lightly")
        sizes = [view.size for view in spec.views]
        large, small = spec.views[0], spec.views[-1]
        if len(sizes) < 3 or sizes[:2] != [large.size] * 2 or sizes[2:] != [small.size] * (len(sizes) - 2):
            raise ValueError(f"lightly's DINO transform makes two large views and small ones, not {sizes}")
        self.shapes = [[recipe.batch.total, 3, size, size] for size in sizes]
        transform = {
            "global_crop_size": large.size,
            "global_crop_scale": large.scale,
            "local_crop_size": small.size,
            "local_crop_scale": small.scale,
            "n_local_views": len(sizes) - 2,
        }
        order = {"photos": recipe.data.path, "transform": transform, "batch": recipe.batch.total, "workers": workers}
        self.process = subprocess.Popen(
            [program, "-I", str(PROGRAM), json.dumps(order)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Lightly:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.kill()
        self.process.communicate()

    def batches(self, count: int) -> Iterator[None]:
        """`count` batches of a loader of its own; they stay in that process."""
        self._ask(do="open", batches=count)
        try:
            for _ in range(count):
                shapes = self._ask(do="next")
                assert shapes == self.shapes, f"lightly makes views of {shapes}, not of {self.shapes}"
                yield
        finally:
            if self.process.poll() is None:
                self._ask(do="close")

    def seconds(self, indices: Sequence[int]) -> float:
        """Of these photos, on one core and without a loader."""
        return float(self._ask(do="items", indices=list(indices)))

    def _ask(self, **request: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise ValueError(
                f"the process with lightly ended with exit code {self.process.wait()}; the reason is above"
            )
        return json.loads(answer)
