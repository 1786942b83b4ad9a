"""The benchmarks in miniature: every command runs and says what it measured. How fast anything is, is not asserted."""

import json
import re
import sys
from pathlib import Path

import pytest
from benchmark_runs import run
from training_runs import TINY

SMALL = {key: value for key, value in TINY.items() if key.startswith(("method.", "backbone."))}
SMALL |= {"batch.total": 4, "data.workers": 1}


@pytest.fixture(scope="module")
def classes(tmp_path_factory, made_photos) -> Path:
    """The photos in a folder of one class, as the released code's data set needs them."""
    folder = tmp_path_factory.mktemp("classes")
    (folder / "one").symlink_to(made_photos)
    return folder


def benchmark(module: str, folder: Path, *arguments: object, **changes: object) -> tuple[str, dict]:
    """Runs one on the CPU with one turn; its output and what it wrote."""
    settings = SMALL | {key.replace("__", "."): value for key, value in changes.items()}
    overrides = [f"{key}={value}" for key, value in settings.items()]
    said = run(module, "--device", "cpu", "--rounds", 1, "--results", folder, *arguments, *overrides)
    return said, json.loads((folder / f"{module}_cpu.json").read_text())


def rows(record: dict) -> dict[str, dict]:
    return {row["name"].strip(): row for row in record["rows"]}


def test_the_pipeline_is_measured(classes, tmp_path):
    said, record = benchmark("pipeline", tmp_path, "--data", classes, "--images", 8, "--batches", 1)
    assert record["settings"]["photos"] == 24
    assert record["settings"]["median_height"] == 90
    assert {row["unit"] for row in record["rows"]} == {"images/s"}
    assert all(row["ours"] > 0 for row in record["rows"])
    assert "give a clone of it with --reference" in said


LIGHTLY = {  # a stand-in with lightly's names, as little as its loader needs; the real one makes the same shapes
    "lightly-9.dist-info/METADATA": "Metadata-Version: 2.1\nName: lightly\nVersion: 9\n",
    "lightly/__init__.py": "",
    "lightly/data.py": """
class LightlyDataset:
    def __init__(self, photos, transform):
        self.transform = transform
    def __len__(self):
        return 24
    def __getitem__(self, index):
        return self.transform(index), 0, "a name"
""",
    "lightly/transforms.py": """
import torch
class DINOTransform:
    def __init__(self, global_crop_size, global_crop_scale, local_crop_size, local_crop_scale, n_local_views):
        print("which is no answer")
        self.sizes = [global_crop_size] * 2 + [local_crop_size] * n_local_views
    def __call__(self, image):
        return [torch.zeros(3, size, size) for size in self.sizes]
""",
}


@pytest.fixture
def python_with_lightly(tmp_path) -> Path:
    """A Python of another environment; as ours has no lightly, this one reads it from a folder, isolated or not."""
    for name, text in LIGHTLY.items():
        path = tmp_path / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" = -I ] && shift\nPYTHONPATH={tmp_path}/site exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python


def test_the_pipeline_is_compared_with_lightlys(classes, tmp_path, python_with_lightly):
    given = ["--data", classes, "--images", 8, "--batches", 1, "--peers", python_with_lightly]
    said, record = benchmark("pipeline", tmp_path, *given)
    assert record["settings"]["lightly"] == "9"
    compared = {name for name, row in rows(record).items() if row["peers"].get("lightly", {}).get("rate", 0) > 0}
    assert compared == {
        "worker stage, DataLoader with 1 workers",
        "for each second of a worker's core",
        "both stages, DataLoader with 1 workers",
        "for each second of a core",
        "worker stage, one core",
        "worker and device stage, one core",
    }
    assert "beside lightly" in said


def test_a_python_without_lightly_is_refused(classes):
    said = run("pipeline", "--device", "cpu", "--data", classes, "--peers", sys.executable, ok=False)
    assert f"--peers {sys.executable} has no lightly: install it with {sys.executable} -m pip install 'lightly'" in said


@pytest.fixture(scope="module")
def step(tmp_path_factory) -> tuple[str, dict]:
    return benchmark("step", tmp_path_factory.mktemp("step"), "--loss-batch", 2)


def test_the_step_is_measured(step):
    said, record = step
    assert 0.99 < sum(record["ranges"].values()) < 1.01
    assert {"views", "student", "teacher", "loss", "backward", "optimizer"} <= set(record["ranges"])
    assert "with run.channels_last=false" in rows(record)
    assert 0 < record["roofline"]["share_of_peak"] < 1
    assert "TFLOP/s" in said


def test_training_from_photos_is_measured(classes, tmp_path):
    said, record = benchmark("end_to_end", tmp_path, "--data", classes, "--steps", 1)
    assert rows(record)["the host's waiting for data, a step"]["ours"] >= 0
    assert record["of_synthetic"]["rounds"] == 1
    assert "of the synthetic rate" in said


def test_a_result_says_on_what_with_what_and_when(step):
    _, record = step
    assert record["hardware"]["cores"] >= 1
    assert record["hardware"]["cpu"]
    assert record["versions"]["torch"]
    assert re.match(r"20\d\d-\d\d-\d\dT", record["date"])
    assert record["settings"]["batch"] == 4
    assert record["reference"] is None


def test_a_folder_that_is_no_clone_is_refused(tmp_path):
    assert "no contrast/loss.py" in run("step", "--reference", tmp_path, "--device", "cpu", ok=False)


def test_work_that_a_step_counts_is_the_backbones_and_the_projectors():
    """ResNet-50 does 4.09 GMAC on 224 pixels: the student's work three times, the teacher's once, and the heads."""
    import torch
    from accelerate import Accelerator

    from benchmarks.setting import made_crops
    from benchmarks.train_state import flops_per_image, make_train_state
    from clove_hub.training.recipe import load

    changes = ["data.path=x", "run.output=x", "run.precision=fp32", "method.local_views=0", "batch.total=2"]
    torch.set_num_threads(1)
    train_state = make_train_state(load("clove_r50_in1k_200ep", changes), Accelerator(cpu=True))
    macs = flops_per_image(train_state, made_crops(train_state.method.view_spec, 2)) / 2
    backbone, projector = 4.09e9, 49 * (2048 * 4096 + 4096 * 256)
    stem = 64 * 3 * 49 * 112 * 112  # images need no gradient
    expected = 2 * (4 * (backbone + projector) - stem)
    assert macs == pytest.approx(expected, rel=0.02)


def test_sides_take_turns_and_ratios_are_of_neighbors():
    from benchmarks.measure import by_turns, times_faster

    order, clock = [], iter(range(1, 100))

    def sample(name: str, factor: float):
        def take() -> float:
            order.append(name)
            return factor * next(clock)

        return take

    seconds = by_turns({"ours": sample("ours", 1.0), "released": sample("released", 2.0)}, 3)
    assert order == ["ours", "released"] * 4
    assert seconds == {"ours": [3.0, 5.0, 7.0], "released": [8.0, 12.0, 16.0]}  # the first turn does not count
    faster = times_faster(ours=seconds["ours"], others=seconds["released"])
    assert faster["median"] == 12 / 5
    assert (faster["min"], faster["max"]) == (16 / 7, 8 / 3)


# ---- against a clone ----------------------------------------------------------------------------------------------

CLONE = {  # a stand-in with the released code's names, as little as a comparison touches
    "__init__": "",
    "models/__init__": "from .CLoVE import CLoVE",
    "models/CLoVE": """
import torch
class CLoVE(torch.nn.Module):
    def __init__(self, encoder, options):
        super().__init__()
        self.net = torch.nn.Conv2d(3, options.feature_dim, 32, 32)
    def forward(self, images, momentum=None):
        large, small = self.net(torch.cat(images[:2])), self.net(torch.cat(images[2:]))
        return large, small, large.detach(), None, None
    def _update_momentum_encoder(self, momentum):
        pass
""",
    "resnet": "test_resnet = None.__class__",
    "loss": """
import torch
class TripletLoss(torch.nn.Module):
    def __init__(self, gamma, pos_ratio):
        super().__init__()
    def forward(self, large, small, targets, coordinates):
        return (large * targets).mean() + small.mean()
""",
    "lars": """
def add_weight_decay(model, decay):
    return [{"params": list(model.parameters())}]
class LARS:
    def __init__(self, optimizer):
        self.step, self.zero_grad, self.param_groups = optimizer.step, optimizer.zero_grad, optimizer.param_groups
""",
    "data/__init__": "",
    "data/transform": """
import torch
def get_transform(kind, crop, size):
    return [lambda image, s=s: (torch.ones(3, s, s), torch.tensor([0., 0., 1., 1.])) for s in (size, size, 96)]
""",
    "data/dataset": """
from PIL import Image
from pathlib import Path
class ImageFolder:
    def __init__(self, root, transform, two_crop, return_coord):
        self.samples = [(path, 0) for path in sorted(Path(root).glob("*/*.jpg"))]
        self.transform = transform
    def loader(self, path):
        return Image.open(path).convert("RGB")
    def __len__(self):
        return len(self.samples)
    def __getitem__(self, index):
        image = self.loader(self.samples[index][0])
        pairs = [self.transform[min(view, 2)](image) for view in range(8)]
        return [image for image, _ in pairs], [box for _, box in pairs], index, 0
""",
}


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clone")
    for name, text in CLONE.items():
        path = folder / "contrast" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.slow
def test_everything_is_compared_with_a_clone_in_one_command(clone, classes, tmp_path):
    views = {"method.local_views": 6, "method.local_size": 96}
    overrides = [f"{key}={value}" for key, value in (SMALL | views).items()]
    common = ["--device", "cpu", "--rounds", 1, "--results", tmp_path, "--data", classes, "--reference", clone]
    said = run("all", *common, *overrides)
    assert "give a clone" not in said
    compared = {
        row["name"].strip()
        for name in ("pipeline", "step", "end_to_end")
        for row in json.loads((tmp_path / f"{name}_cpu.json").read_text())["rows"]
        if row["faster"] and row["faster"]["median"] > 0
    }
    assert len([name for name in compared if name.startswith(("worker", "for each", "decoding"))]) == 6
    assert len([name for name in compared if name.startswith(("loss", "LARS", "whole", "on ready", "with"))]) == 5
    assert any(name.startswith("from photos") for name in compared)


def test_other_views_than_the_released_ones_are_not_compared(clone):
    said = run("step", "--reference", clone, "--device", "cpu", "method.local_views=2", ok=False)
    assert "2 + 6 views" in said


# ---- killed and resumed -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_run_of_ours_repeats_no_sample_loses_none_and_ends_with_the_same_loss(made_photos, tmp_path):
    said = run("resume_peers", "--data", made_photos, "--photos", 20, "--kills", 1, "--results", tmp_path)
    (row,) = json.loads((tmp_path / "resume_peers_cpu.json").read_text())["rows"]
    (kill,) = row["kills"]
    assert row["steps"] == 15
    assert 3 <= kill["resumed_after_step"] <= kill["killed_in_step"] <= 15
    compared = {name: kill[name] for name in row["control"]}
    nothing = {"samples_repeated": 0, "samples_lost": 0, "steps_on_other_samples": 0, "loss_difference": 0.0}
    assert compared == row["control"] == nothing
    assert "left out: --timm-train is not given" in said


def test_samples_of_a_resumed_run_are_counted_against_an_uninterrupted_one():
    from benchmarks.resume_peers import Seen, compare

    whole = Seen([["a", "b"], ["c", "d"], ["d", "a"], ["b", "c"]], [4.0, 3.0, 2.0, 1.0])
    resumed = whole.before(3).then(Seen([["d", "a"]], [3.0]))
    assert compare(whole, resumed, epoch=2) == {
        "samples_repeated": 2,  # d and a
        "samples_lost": 2,  # b and c
        "steps_on_other_samples": 1,
        "loss_difference": 1.0,
    }
    skipped = whole.before(2)  # what timm does with the rest of an epoch
    assert compare(whole, skipped, epoch=2)["samples_lost"] == 4
    assert compare(whole, skipped, epoch=2)["samples_repeated"] == 0


# ---- scaling ------------------------------------------------------------------------------------------------------


def test_scaling_md_holds_what_the_results_say():
    from benchmarks.scaling import BEGIN, DOCUMENT, END, tables
    from benchmarks.setting import RESULTS

    written = DOCUMENT.read_text().split(BEGIN)[1].split(END)[0].strip()
    assert written == tables(RESULTS), "run python -m benchmarks.scaling --write"


def test_a_measured_gpu_stands_on_top_of_the_table(tmp_path):
    from benchmarks.scaling import tables

    row = {"name": "from photos, batch 256, 8 workers", "ours": 1280.0}
    (tmp_path / "end_to_end_cuda.json").write_text(json.dumps({"hardware": {"gpu": "H999"}, "rows": [row]}))
    first = tables(tmp_path).splitlines()[2].split("|")
    # 2048 images at 1280 a second are 1.6 s; 625 steps an epoch, 200 epochs
    assert [cell.strip() for cell in first[1:7]] == ["H999, measured", "1280", "1x", "1600", "0 %", "55.6"]


@pytest.mark.slow
def test_faults_are_counted(made_photos, tmp_path):
    """A few of each kind; the script does as many as one likes."""
    words = ["--parts", "kills", "starts", "--kills", 4, "--starts", 1]
    run("faults", "--data", made_photos, "--results", tmp_path, *words)
    parts = json.loads((tmp_path / "faults_cpu.json").read_text())["parts"]
    kills, starts = (parts[name]["counts"] for name in ("kills", "starts"))
    assert (kills["kills"], kills["orphans"], kills["wrong"]) == (4, 0, 0)
    assert starts == {"pairs": 1, "one ran, one refused": 1, "all rows": 1}
