"""The files of the human surface for DensePose's training and scoring, which its code downloads on first use.

It downloads the first when training starts and the others when it ends: without a network, that fails days too late.
"""

from __future__ import annotations

import os
from pathlib import Path

FROM = "https://dl.fbaipublicfiles.com/densepose/data/"
FILES = ("UV_symmetry_transforms.mat", "SMPL_subdiv.mat", "SMPL_SUBDIV_TRANSFORM.mat", "Pdist_matrix.pkl")


def require_surface(fetch: bool) -> None:
    """Check that the files are where DensePose looks for them.

    Args:
        fetch: whether to download missing ones.

    Raises:
        ValueError: some are missing, or cannot be downloaded.
    """
    from detectron2.utils.file_io import PathManager

    # Detectron2's download cache.
    folder = Path(os.environ.get("FVCORE_CACHE", "~/.torch/iopath_cache")).expanduser() / "densepose" / "data"
    absent, reason = [name for name in FILES if not (folder / name).is_file()], ""
    if fetch:
        try:
            while absent:
                PathManager.get_local_path(FROM + absent[0])
                del absent[0]
        except OSError as error:
            reason = f" and cannot be downloaded ({error})"
    if absent:
        raise ValueError(
            f"DensePose needs {', '.join(absent)}, which {'is' if len(absent) == 1 else 'are'} not in {folder}{reason}. "
            f"Download from {FROM} on a machine with a network, and copy the files into that folder"
        )
