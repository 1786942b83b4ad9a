"""The Detectron2 config that a converted backbone's settings extend: find it, and check it against the backbone."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from clove_hub.weights import Weights

from .settings import BUILDERS, Base

INSTALL = "https://detectron2.readthedocs.io/en/latest/tutorials/install.html"


def find_base(given: str) -> Base:
    """A file, or a config of Detectron2's model zoo by name (`COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml`).

    Raises:
        ValueError: Detectron2 is not installed, or there is no such file.
    """
    if find_spec("detectron2") is None:
        raise ValueError(f"--base {given} needs Detectron2 to build and check the detector: {INSTALL}")
    from detectron2 import model_zoo

    path = Path(given).expanduser()
    if path.suffix not in (".yaml", ".yml", ".py"):
        raise ValueError(f"--base {given}: a config of Detectron2 ends in .yaml, or in .py for a LazyConfig")
    if not path.is_file():
        try:
            path = Path(model_zoo.get_config_file(given))
        except RuntimeError as error:
            raise ValueError(f"--base {given} is neither a file nor a config of Detectron2's model zoo") from error
    path = path.resolve()
    if path.suffix == ".py":
        return Base(path)
    from detectron2.config import get_cfg

    cfg = get_cfg()
    try:
        cfg.merge_from_file(str(path))
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(f"--base {given} is not a config of Detectron2's own networks: {error!s:.200}") from error
    return Base(path, cfg.MODEL.BACKBONE.NAME)


def require_place(base: Base, backbone: Weights) -> None:
    """Raise ValueError if the detector of a YAML config would have another network, or random weights instead of it."""
    if base.lazy:
        return  # checked when the config file is loaded
    network = backbone.plain_resnet
    if network is None:
        if base.builder not in BUILDERS:
            raise ValueError(
                f"{base.path} builds its backbone with {base.builder}; {backbone.architecture}, which Detectron2 "
                f"does not build itself, replaces only {' or '.join(BUILDERS)}: choose a config with a pyramid (FPN)"
            )
        return
    if not base.builder.endswith(("build_resnet_backbone", "resnet_fpn_backbone")):
        raise ValueError(
            f"{base.path} builds its backbone with {base.builder}, which is not a ResNet: choose another config"
        )
    if not network.bottleneck and merged(base.path).MODEL.ROI_HEADS.NAME.startswith("Res5"):
        raise ValueError(
            f"{base.path} has a ResNet-50's last stage in its head (C4), but {backbone.architecture} has basic blocks: "
            "Detectron2 would leave most of that stage random. Choose a config with a pyramid (FPN)"
        )


def merged(path: Path) -> Any:
    """Detectron2's defaults merged with a YAML file, for the CPU."""
    from detectron2.config import get_cfg

    cfg = get_cfg()
    cfg.merge_from_file(str(path))
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def require_held_by(base: Base, backbone: Weights, folder: Path, weights: str) -> float:
    """Build the detector of the written settings, load the written weights, and compare it with timm.

    Args:
        folder: the folder of the written files.
        weights: the name of the converted file in it.

    Returns:
        As `require_same`.

    Raises:
        ValueError: as `require_same`, or the settings do not fit the config.
    """
    from .verify import load_into, require_same

    path = folder / weights
    try:
        model = _built(base, path, needs_ours=backbone.plain_resnet is None)
    except (AssertionError, AttributeError, ImportError, KeyError, TypeError) as error:
        raise ValueError(f"{base.path}: Detectron2 cannot build this detector ({error!s:.200})") from error
    load_into(model, str(path))
    return require_same(model, backbone)


def _built(base: Base, path: Path, needs_ours: bool) -> Any:
    """The detector in eval mode on the CPU, from the settings beside the weights."""
    if base.lazy:
        from detectron2.config import LazyConfig, instantiate

        return instantiate(LazyConfig.load(str(path.with_suffix(".py"))).model).eval()
    from detectron2.modeling import build_model

    from .config import replace_sync_bn

    if needs_ours:
        from . import backbone as builders  # noqa: F401  (registers them before the defaults are taken)
    cfg = merged(path.with_suffix(".yaml"))
    replace_sync_bn(cfg)
    return build_model(cfg).eval()
