"""Images that are no photos: values as they are stored, views that have a meaning, and the whole road with 1, 4 and 12 bands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.models import adapt_input_conv
from training_runs import last_checkpoint, overrides

from clove_hub.cli import main
from clove_hub.data import tiff
from clove_hub.data.bands import MEASURED, Reading
from clove_hub.data.images import BrokenImage
from clove_hub.training.bands import with_bands
from clove_hub.training.data import enough
from clove_hub.views import Jitter, View, ViewSpec, allocate, draw, for_bands, write_sample
from clove_hub.weights import load

tifffile = pytest.importorskip("tifffile", reason="pip install 'clove-hub[tiff]' reads TIFFs")

VALUES = np.random.default_rng(0).integers(0, 2**16, (70, 90, 12), dtype=np.uint16)


def folder(root: Path, bands: int, count: int = 16) -> Path:
    root.mkdir()
    layout = "contig" if bands > 1 else None
    for number in range(count):
        values = np.random.default_rng(number).integers(0, 9000, (70, 90, bands), dtype=np.uint16)
        values = values if bands > 1 else values[:, :, 0]
        tifffile.imwrite(root / f"{number}.tif", values, photometric="minisblack", planarconfig=layout)
    return root


@pytest.mark.parametrize(
    "how",
    [
        {"planarconfig": "contig", "compression": "deflate"},
        {"planarconfig": "contig", "tile": (32, 32), "compression": "lzw", "predictor": True},
        {"planarconfig": "separate"},
        {"bands_first": True, "bigtiff": True},
    ],
)
def test_values_of_16_bits_are_those_that_tifffile_reads(tmp_path: Path, how: dict) -> None:
    path, how = tmp_path / "a.tif", dict(how)
    separate = how.pop("bands_first", False) or how.get("planarconfig") == "separate"
    tifffile.imwrite(path, np.moveaxis(VALUES, -1, 0) if separate else VALUES, photometric="minisblack", **how)
    theirs = tifffile.imread(path)
    found = Reading(12, 16).read(path)
    np.testing.assert_array_equal(found, np.moveaxis(theirs, 0, -1) if separate else theirs)
    assert found.max() > 65000
    np.testing.assert_array_equal(Reading(12, 8).read(path), found >> 8)
    with pytest.raises(BrokenImage, match="it has 12 bands, expected 4"):
        Reading(4, 16).read(path)


@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small.dcm"])
def test_a_dicom_keeps_its_values(name: str) -> None:
    pydicom = pytest.importorskip("pydicom", reason="pip install 'clove-hub[dicom]' reads DICOM")
    path = Path(pydicom.data.get_testdata_file(name))
    theirs = pydicom.dcmread(path)  # both signed with 16 bits
    found = Reading(1, 16).read(path)[:, :, 0]
    np.testing.assert_array_equal(found.astype(np.int32) - 2**15, theirs.pixel_array)


def test_a_crop_keeps_16_bits(tmp_path: Path) -> None:
    spec, _ = for_bands(ViewSpec((View(size=70, scale=(1.0, 1.0), ratio=(1.0, 1.0)),)), [0.5] * 12, [0.2] * 12, 16)
    image = np.ascontiguousarray(VALUES[:, :70])
    batch = allocate(spec, 1)
    write_sample(batch, 0, image, draw(spec, 0, 0, 0, 70, 70))
    np.testing.assert_array_equal(np.rint(batch.crops[0][0, 0].numpy() * 257), image)


def test_views_leave_out_what_has_no_meaning_and_others_are_refused() -> None:
    view = View(size=32, scale=(0.2, 1.0), jitter=Jitter(), gray=0.2, solarize=0.2)
    spec, without = for_bands(ViewSpec((view,)), [0.5] * 4, [0.2] * 4, 16)
    assert without == ["saturation", "hue", "gray", "solarize"]
    assert spec.views[0].jitter == Jitter(saturation=0, hue=0)
    assert for_bands(ViewSpec((view,)), [0.5] * 3, [0.2] * 3) == (ViewSpec((view,), (0.5,) * 3, (0.2,) * 3), [])
    with pytest.raises(ValueError, match="which has no meaning for 4 bands"):
        ViewSpec((view,), (0.5,) * 4, (0.2,) * 4)


def test_only_tiles_under_the_crops_of_a_large_tiff_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiff, "LARGE", 100_000)
    monkeypatch.setattr(tiff, "_SMALL", 1)
    values = np.random.default_rng(1).integers(0, 2**16, (600, 800, 4), dtype=np.uint16)
    path = tmp_path / "large.tif"
    with tifffile.TiffWriter(path) as file:
        for step, kind in ((1, 0), (2, 1)):
            how = {"tile": (64, 64), "photometric": "minisblack", "planarconfig": "contig", "compression": "deflate"}
            file.write(values[::step, ::step], subfiletype=kind, **how)
    damaged = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        damaged[page.dataoffsets[0] : page.dataoffsets[0] + 200] = bytes(200)  # the tile in the corner
    path.write_bytes(damaged)
    large = tiff.open_large(path, None)
    assert large is not None
    assert large.shape == values.shape
    boxes = np.array([[100, 130, 200, 300], [599, 799, 1, 1], [64, 0, 536, 800]])
    for (top, left, height, width), found in zip(boxes, large.crops(boxes), strict=True):
        np.testing.assert_array_equal(found, values[top : top + height, left : left + width])
    with pytest.raises(BrokenImage):
        large.crops(np.array([[0, 0, 10, 10]]))
    half = tiff.open_large(path, 300)
    assert half is not None
    np.testing.assert_array_equal(half.crops(np.array([[0, 0, 300, 400]]))[0], values[::2, ::2])


def test_enough_pixels_are_those_with_which_the_smallest_crop_is_not_enlarged() -> None:
    spec = ViewSpec(
        (View(size=224, scale=(0.25, 1.0), ratio=(1.0, 1.0)), View(size=96, scale=(0.04, 0.2), ratio=(1.0, 1.0)))
    )
    assert enough(spec) == 480


def test_the_first_layer_is_adapted_as_timm_does_it() -> None:
    weights = load("random:test_resnet")
    adapted = with_bands(weights, 4)
    theirs = adapt_input_conv(4, weights.tensors["conv1.0.weight"])
    assert torch.equal(adapted.tensors["conv1.0.weight"], theirs)
    adapted.build()
    with pytest.raises(ValueError, match=r"is for 4 bands, but data\.bands=12"):
        with_bands(adapted, 12)


def test_measured_values_that_cannot_be_stored_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = folder(tmp_path / "data", 4, 2)
    (data / MEASURED).mkdir()
    assert main(["check", str(data), "--bands", "4", "--workers", "0"]) == 2
    printed = capsys.readouterr()
    assert "data.mean=[0." in printed.out
    assert "give the run data.mean and data.std as printed" in printed.err


@pytest.mark.parametrize("bands", [1, 4, 12])
def test_the_whole_road(tmp_path: Path, bands: int, capsys: pytest.CaptureFixture[str]) -> None:
    data, run, bundle = folder(tmp_path / "my data", bands), tmp_path / "run", tmp_path / "bundle"
    command = ["pretrain", "demo", *overrides(data, run), f"data.bands={bands}"]
    assert main(command) == 2
    assert f"`clove-hub check '{data}' --bands {bands} --depth 16` measures and stores them" in capsys.readouterr().err
    assert main(["check", str(data), "--bands", str(bands), "--workers", "0"]) == 0
    measured = json.loads((data / MEASURED).read_text())
    everything = np.concatenate([tifffile.imread(path).reshape(-1, bands) for path in data.glob("*.tif")]) / 65535
    np.testing.assert_allclose(measured["mean"], everything.mean(0), rtol=1e-9)
    np.testing.assert_allclose(measured["std"], everything.std(0), rtol=1e-6)
    capsys.readouterr()
    assert main(command) == 0
    said = capsys.readouterr().err
    assert "left out: 1 .json" not in said  # the measured values
    assert "JPEG" not in said
    (data / MEASURED).unlink()  # a run keeps its own
    assert main([*command, "schedule.steps=6", "run.amend=true"]) == 0
    assert json.loads((last_checkpoint(run) / "state.json").read_text())["preprocessing"]["mean"] == measured["mean"]
    assert main(["export", str(run), "--out", str(bundle)]) == 0
    model = timm.create_model(f"local-dir:{bundle}", pretrained=True).eval()
    assert model.pretrained_cfg["input_size"] == (bands, 64, 64)
    assert model.pretrained_cfg["first_conv"] is None  # timm 1.0.21 would begin with a random first layer
    pixels = torch.rand(2, bands, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(pixels), load(str(run)).build()(pixels))
    assert main(["evaluate", "correspond", "--model", str(bundle), "--data", str(data), "size=64", "images=4"]) == 0
