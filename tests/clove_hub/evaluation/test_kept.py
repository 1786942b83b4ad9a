"""Feature maps on disk: the same as in memory, gone on from after an interruption, removed at the end."""

import errno
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from clove_hub.data.images import read_image
from clove_hub.evaluation.dense_probe import channel_moments
from clove_hub.evaluation.kept import kept_maps
from clove_hub.evaluation.reading import normalized
from clove_hub.weights import load_backbone


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    random, folder = np.random.default_rng(0), tmp_path / "photos"
    folder.mkdir()
    for number in range(11):
        Image.fromarray(random.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / f"{number:02}.png")
    return sorted(folder.iterdir())


def keep(photos, load=None, levels=(-1, -2), backbone=None):
    backbone = backbone or load_backbone("random:test_resnet")
    seen = backbone.preprocessing

    def plain(path):
        return normalized(read_image(path), seen.mean, seen.std)

    return kept_maps(backbone, photos[0].parent, photos, load or plain, levels, 4, photos=photos, shown="whole"), plain


def test_maps_are_those_of_the_backbone_in_half_precision(photos, tmp_path):
    backbone = load_backbone("random:test_resnet")
    context, load = keep(photos, backbone=backbone)
    with torch.no_grad():
        exact = backbone.maps(torch.stack([load(path) for path in photos]), (-1, -2))
        with context as kept:
            assert kept.images == list(range(11))
            for level, truth in zip(kept.levels, exact, strict=True):
                assert len(level) == 11
                deviation = truth.std((0, 2, 3), keepdim=True).clamp(min=1e-2 * float(truth.std()))
                assert float(((level[:] - truth) / deviation).abs().max()) < 1e-2  # 2^-11 of up to twenty deviations
                chosen = torch.tensor([7, 0, 7])
                assert torch.equal(level[chosen], level[:][chosen])
                for ours, theirs in zip(
                    channel_moments(level, 3), torch.std_mean(level[:], (0, 2, 3), correction=0)[::-1], strict=True
                ):
                    torch.testing.assert_close(ours, theirs)
    assert not list((tmp_path / "cache/clove-hub/features").iterdir())


def test_large_channels_with_little_variation_keep_it(photos):
    class Offset(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one = torch.nn.Parameter(torch.ones(1))

        def forward_features(self, pixels):
            return 1000 + 1e-2 * torch.nn.functional.avg_pool2d(pixels, 32)

    backbone = load_backbone("random:test_resnet")
    backbone = type(backbone)(Offset(), backbone.preprocessing, "offset")
    context, load = keep(photos, levels=(-1,), backbone=backbone)
    with torch.no_grad(), context as kept:
        truth = Offset().forward_features(torch.stack([load(path) for path in photos]))
        assert float((kept.levels[0][:] - truth).abs().max()) < 2e-4  # half precision of 1000 itself would be 0.5


def test_an_interrupted_evaluation_goes_on_where_it_was(photos, tmp_path):
    seen = []

    def until_the_ninth(path):
        seen.append(path.name)
        if path.name == "08.png":
            raise KeyboardInterrupt
        return load(path)

    context, load = keep(photos, until_the_ninth)
    with pytest.raises(KeyboardInterrupt), context, torch.no_grad():
        pass
    assert list((tmp_path / "cache/clove-hub/features").iterdir())
    again = []

    def counted(path):
        again.append(path.name)
        return load(path)

    context, _ = keep(photos, counted)
    with torch.no_grad(), context as kept:
        assert again == ["08.png", "09.png", "10.png"]
        resumed = [level[:] for level in kept.levels]
    context, _ = keep(photos)
    with torch.no_grad(), context as kept:
        assert all(torch.equal(one, level[:]) for one, level in zip(resumed, kept.levels, strict=True))


def test_a_changed_photo_or_model_is_seen_anew(photos):
    def fails(path):
        raise KeyboardInterrupt

    context, load = keep(photos, fails)
    with pytest.raises(KeyboardInterrupt), context:
        pass
    first = []
    context, _ = keep(photos, lambda path: first.append(path) or load(path))
    with pytest.raises(RuntimeError), torch.no_grad(), context:
        raise RuntimeError  # after all has been seen
    Image.new("RGB", (64, 64)).save(photos[3])
    os.utime(photos[3], (1, 1))
    second = []
    context, _ = keep(photos, lambda path: second.append(path) or load(path))
    with torch.no_grad(), context:
        assert len(second) >= len(photos)
    other = load_backbone("random:test_resnet", seed=1)
    third = []
    context, _ = keep(photos, lambda path: third.append(path) or load(path), backbone=other)
    with torch.no_grad(), context:
        assert len(third) >= len(photos)


def test_two_at_once_do_not_share_a_folder(photos, tmp_path):
    (one, _), (two, _) = keep(photos), keep(photos)
    with torch.no_grad(), one as first, two as second:
        assert first.levels[0].file != second.levels[0].file
        assert torch.equal(first.levels[0][:], second.levels[0][:])


def test_broken_photos_are_left_out(photos):
    photos[2].write_bytes(b"no picture")
    context, _ = keep(photos)
    with torch.no_grad(), context as kept:
        assert kept.images == [0, 1, *range(3, 11)]
        assert kept.left_out[0][0] == "02.png"
        assert len(kept.levels[0]) == 10


def test_a_full_disk_is_said_before_and_while_it_fills(photos, monkeypatch):
    from clove_hub.evaluation import kept as module

    usage = module.shutil.disk_usage
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage(path)._replace(free=100))
    context, _ = keep(photos)
    with pytest.raises(ValueError, match=r"need 0\.0 GB on disk.*set XDG_CACHE_HOME"), torch.no_grad(), context:
        pass
    monkeypatch.setattr(module.shutil, "disk_usage", usage)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "_store", full)
    context, _ = keep(photos)
    with pytest.raises(ValueError, match=r"the disk is full\. Free some space"), torch.no_grad(), context:
        pass


@pytest.mark.slow
def test_a_killed_command_goes_on_from_what_it_had_seen(photos, tmp_path):
    """With signal 9, in the middle of seeing 400 images; the figures are those of a run that was left alone."""
    random = np.random.default_rng(0)
    data = tmp_path / "data"
    for name in ("images", "labels"):
        (data / name).mkdir(parents=True)
    names = [f"{number:03}" for number in range(400)]
    for name in names:
        Image.fromarray(random.integers(0, 256, (128, 128, 3), np.uint8)).save(data / f"images/{name}.png")
        Image.fromarray(random.integers(0, 3, (128, 128), np.uint8)).save(data / f"labels/{name}.png")
    (data / "train.txt").write_text("\n".join(names))
    (data / "test.txt").write_text("\n".join(names[:8]))
    (data / "classes.json").write_text('{"classes": ["a", "b", "c"]}')
    command = [
        sys.executable,
        "-m",
        "clove_hub.cli",
        "evaluate",
        "dense-probe",
        "--model",
        "random:resnet10t",
        "--data",
        str(data),
    ]
    settings = ["height=128", "width=128", "epochs=1", "seeds=1", "batch=4"]
    features = tmp_path / "cache/clove-hub/features"
    process = subprocess.Popen([*command, *settings], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list(features.glob("*/0*.json"))) < 10:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    noted = {path: path.stat().st_mtime_ns for path in features.glob("*/0*.json")}
    assert 10 <= len(noted) < 100
    lines = []
    for _ in range(2):  # goes on; then from nothing
        done = subprocess.run([*command, *settings], capture_output=True, text=True, check=True)
        lines.append([line for line in done.stdout.splitlines() if "mIoU" in line])
        assert not list(features.iterdir())
    assert lines[0]
    assert lines[0] == lines[1]


@pytest.mark.slow
def test_evaluations_that_share_a_key_never_take_a_folder_that_is_going(photos, tmp_path):
    """Two readings of the same maps begin and end in any order: one once removed the folder that another had just taken."""
    turns = (
        "from clove_hub.evaluation.kept import own_folder\n"
        "for _ in range(100):\n"
        "    with own_folder('k') as folder:\n"
        "        (folder / 'a').write_text('x')\n"
        "        assert (folder / 'a').read_text() == 'x'\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", turns]) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert not list((tmp_path / "cache/clove-hub/features").iterdir())
