"""Pre-train on a folder of photos, evaluate before and after, and write a bundle.

    python examples/pretrain.py PHOTOS runs/mine bundles/mine

Started again with the same folders, it resumes. For several GPUs, use `accelerate launch -m clove_hub.training`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import clove_hub


def pretrain(photos: Path, run: Path, bundle: Path, **changes: Any) -> Path:
    """Returns the bundle's folder.

    Args:
        photos: searched recursively.
        run: the folder of the run, with everything needed to resume.
        bundle: the folder for the exported weights, which timm loads.
        changes: to the recipe `demo`, such as `schedule={"steps": 2000}`.
    """
    result = clove_hub.pretrain("demo", data={"path": photos}, run={"output": run}, **changes)
    if not result.finished:
        raise SystemExit(f"stopped after {result.steps} steps; start it again to resume")
    for model in ("random:resnet18", result.folder):
        record = clove_hub.evaluate("correspond", model, photos, seed=0)
        print(f"{model}: {record.metrics['correspond']:.1f} % of the cells are matched to their place in another crop")
    return clove_hub.export_run(result.folder, bundle, license="mit")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Pre-train on a folder of photos.")
    for name in ("photos", "run", "bundle"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    print(f"timm.create_model('local-dir:{pretrain(given.photos, given.run, given.bundle)}', pretrained=True)")
