"""Before a training in another framework: a rehearsal that stops what would fail days later; after it: seeds that diverged."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from clove_hub.evaluation.result import write_text
from clove_hub.export import rehearsal
from clove_hub.export.detectron2.layouts import require_layout
from clove_hub.export.detectron2.miniature import TEST, TRAIN, write_miniature
from clove_hub.export.detectron2.rehearsal import require_found
from clove_hub.export.detectron2.tasks import TASKS
from clove_hub.export.rehearsal import REHEARSED, Step, rehearse
from clove_hub.export.seeds import DIVERGED, SCORES, Found, run_seeds, unlike


def steps(*codes: str) -> Callable[[Path], Sequence[Step]]:
    return lambda folder: [Step(f"step {number}", ["-c", code]) for number, code in enumerate(codes, start=1)]


# ---- the rehearsal ---------------------------------------------------------------------------------------------------


def test_what_fails_is_named_with_its_reason_its_log_and_a_way_out(tmp_path: Path) -> None:
    code = "print('much'); import numpy; numpy.nonesuch"
    with pytest.raises(ValueError, match="the rehearsal failed at step 2: AttributeError: module 'numpy'") as caught:
        rehearse(tmp_path, ["numpy"], steps("pass", code, "open('never', 'w')"), {})
    said = str(caught.value)
    assert "Nothing was trained. Once that is fixed, run the same command again" in said
    log = Path(said.partition("full output: ")[2].partition(")")[0])
    assert log.read_text().startswith("much")
    assert not (tmp_path / REHEARSED).exists()
    rehearse(tmp_path, ["numpy"], steps("pass"), {})  # mended
    assert not (tmp_path / "rehearsal").exists()


def test_a_step_that_ends_well_and_printed_something_wrong_has_failed(tmp_path: Path) -> None:
    def check(printed: str) -> None:
        if "from iteration 2" not in printed:
            raise ValueError("it began again")

    def prepare(folder: Path) -> Sequence[Step]:
        return [Step("going on", ["-c", "print('from iteration 0')"], check, advice="Do this.")]

    with pytest.raises(ValueError, match=r"failed at going on: it began again .*Nothing was trained\. Do this\."):
        rehearse(tmp_path, [], prepare, {})


def test_it_is_done_once_and_again_with_other_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counted = steps(f"open({str(tmp_path / 'count')!r}, 'a').write('x')")
    for _ in range(2):
        rehearse(tmp_path, ["numpy", "nonesuch"], counted, {})
    assert (tmp_path / "count").read_text() == "x"
    assert json.loads((tmp_path / REHEARSED).read_text())["versions"]["nonesuch"] is None
    monkeypatch.setattr(rehearsal, "version", lambda name: "another")
    rehearse(tmp_path, ["numpy", "nonesuch"], counted, {})
    assert (tmp_path / "count").read_text() == "xx"


def test_figures_of_the_truth_itself_must_be_high(tmp_path: Path) -> None:
    path = tmp_path / "made.json"
    good = {group: dict.fromkeys(names, 100.0) for group, names in TASKS["coco_c4"].metrics.items()}
    path.write_text(json.dumps(good))
    require_found(TASKS["coco_c4"], path)
    for wrong in (None, -1.0, 40.0):
        path.write_text(json.dumps(good | {"segm": good["segm"] | {"AP": wrong}}))
        with pytest.raises(ValueError, match=f"has segm AP {wrong}, expected about 100"):
            require_found(TASKS["coco_c4"], path)
    path.write_text(json.dumps({"bbox": {"AP": 30.0, "AP50": 30.0, "AP75": 30.0}}))
    require_found(TASKS["voc_c4"], path)  # most classes are in none of a few images


# ---- a few images ----------------------------------------------------------------------------------------------------


def write_listed(root: Path, file: str, images: str, more: dict[str, object]) -> None:
    """Twelve images, of which every second shows something that counts."""
    rows = [{"id": number, "file_name": f"{number}.jpg"} for number in range(12)]
    annotations = [
        {"id": number, "image_id": number, "iscrowd": int(not number % 2)} | (more if number % 2 else {})
        for number in range(12)
    ]
    write_text(root / file, json.dumps({"images": rows, "annotations": annotations, "categories": [{"id": 1}]}))
    for row in rows:
        write_text(root / images / str(row["file_name"]), "x")


@pytest.mark.parametrize(
    ("layout", "stem", "more"),
    [("coco", "instances", {}), ("coco_keypoints", "person_keypoints", {"num_keypoints": 3})],
)
def test_a_miniature_of_coco_has_images_that_count(
    tmp_path: Path, layout: str, stem: str, more: dict[str, object]
) -> None:
    for split in ("train", "val"):
        write_listed(tmp_path / "all", f"coco/annotations/{stem}_{split}2017.json", f"coco/{split}2017", more)
    photo = write_miniature(layout, tmp_path / "all", tmp_path / "few")
    assert photo == tmp_path / "few/coco/val2017/1.jpg"
    found = require_layout(layout, tmp_path / "few")
    assert (found.train, found.test) == (TRAIN, TEST)
    document = json.loads((tmp_path / f"few/coco/annotations/{stem}_train2017.json").read_text())
    assert [row["id"] for row in document["images"]] == [1, 3, 5, 7]
    assert {row["image_id"] for row in document["annotations"]} == {1, 3, 5, 7}
    if more:
        write_listed(tmp_path / "none", f"coco/annotations/{stem}_train2017.json", "coco/train2017", {})
        with pytest.raises(ValueError, match="has no annotation that coco_keypoints could be scored on"):
            write_miniature(layout, tmp_path / "none", tmp_path / "nothing")


def test_a_miniature_of_voc_and_cityscapes_is_whole(tmp_path: Path) -> None:
    root = tmp_path / "all"
    for year, split in (("VOC2007", "trainval"), ("VOC2012", "trainval"), ("VOC2007", "test")):
        names = [f"{split}{number}" for number in range(9)]
        write_text(root / year / "ImageSets/Main" / f"{split}.txt", "\n".join(names) + "\n")
        for name in names:
            write_text(root / year / "Annotations" / f"{name}.xml", "x")
            write_text(root / year / "JPEGImages" / f"{name}.jpg", "x")
    for split in ("train", "val"):
        for number in range(9):
            stem = f"ulm/ulm_{number}"
            write_text(root / f"cityscapes/leftImg8bit/{split}/{stem}_leftImg8bit.png", "x")
            truth = root / f"cityscapes/gtFine/{split}"
            objects = [{"label": "car" if number > 2 else "sky"}]
            write_text(truth / f"{stem}_gtFine_polygons.json", json.dumps({"objects": objects}))
            for kind in ("instanceIds", "labelIds"):
                write_text(truth / f"{stem}_gtFine_{kind}.png", "x")
    photos = {layout: write_miniature(layout, root, tmp_path / "few") for layout in ("voc", "cityscapes")}
    assert photos["voc"].is_file()
    assert photos["cityscapes"].is_file()
    voc, cityscapes = (require_layout(layout, tmp_path / "few") for layout in photos)
    assert (voc.train, voc.test, cityscapes.train, cityscapes.test) == (2 * TRAIN, TEST, TRAIN, TEST)
    shown = sorted(path.name for path in (tmp_path / "few/cityscapes/leftImg8bit/val/ulm").iterdir())
    assert shown == ["ulm_3_leftImg8bit.png", "ulm_4_leftImg8bit.png"]


# ---- seeds -----------------------------------------------------------------------------------------------------------


def test_a_seed_that_diverges_is_left_out_and_the_others_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained = []

    def train(number: int, folder: Path) -> bool:
        trained.append(number)
        if number == 1:
            write_text(folder / DIVERGED, "the loss became NaN\n")
            raise ChildProcessError("exit code 1")
        write_text(folder / SCORES, "{}")
        return True

    expected = ({0: {}, 2: {}, 3: {}, 4: {}}, ["seed 1 diverged and is left out: the loss became NaN"])
    first = run_seeds(tmp_path, 5, train)
    assert first is not None
    assert (first[:2], type(first.seconds)) == (expected, float)
    assert "seed 1 diverged" in caplog.text
    assert run_seeds(tmp_path, 5, train) == (*expected, None), "how long the first call took is not known to the second"
    assert trained == [0, 1, 2, 3, 4], "the second call trains none"
    for number in (0, 2, 3, 4):
        (tmp_path / f"seed_{number}" / SCORES).rename(tmp_path / f"seed_{number}" / DIVERGED)
    with pytest.raises(FloatingPointError, match="seed 0 diverged"):
        run_seeds(tmp_path, 5, train)


def test_another_failure_of_a_seed_stops_all_and_so_does_a_signal(tmp_path: Path) -> None:
    def broken(number: int, folder: Path) -> bool:
        raise ChildProcessError("exit code 1")

    with pytest.raises(ChildProcessError, match="exit code 1"):
        run_seeds(tmp_path, 5, broken)
    assert run_seeds(tmp_path, 5, lambda number, folder: False) is None


def test_a_part_of_a_data_set_says_so() -> None:
    assert unlike(Found(118_287, 5000, "f"), (118_287, 5000)) == []
    assert unlike(Found(8, 2, "f"), (118_287, 5000)) == [
        "trained on 8 images, the data set has 118287",
        "scored on 2 images, the data set has 5000",
    ]
