"""`clove-hub results`: rows are models by their weights, tables are what may be compared, cards get their own figures."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import scenes
from PIL import Image
from rendering import assert_readable
from synthetic import write_run

from clove_hub.cli import main
from clove_hub.data.files import Data
from clove_hub.evaluation import PROTOCOLS, collected
from clove_hub.evaluation.result import Record, plain, read, write
from clove_hub.evaluation.run import find_protocol
from clove_hub.export.detectron2 import tasks as detectron2_tasks
from clove_hub.figures.bars import draw_results
from clove_hub.training.finetune.settings import PRESETS
from clove_hub.weights import load
from clove_hub.zoo.models import find_model, protocols

OURS, OTHERS = "a" * 64, "b" * 64


def made(**changes: object) -> Record:
    """A fine-tuning's."""
    known = Record(
        protocol="torchvision-detection",
        version=1,
        rule="own",
        split="val",
        model="ours",
        architecture="resnet50",
        weights=OURS,
        metrics={"APbb": 10.0},
        deviations={},
        seeds=(0,),
        randomness="fine-tuning",
        random_weights=False,
        absent=(),
        left_out=(),
        data=Data("photos", "f" * 64, 4),
        settings={"batch": {"total": 2}, "steps": 5, "train_images": 9},
        preprocessing={"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]},
        items={"class": {"cat": {"APbb": 10.0}}},
        seconds=2.0,
        versions={},
        date="2026-01-01",
    )
    return dataclasses.replace(known, **changes)


def put(path: Path, value: float = 10.0, seed: int = 0, **changes: object) -> None:
    settings = {"batch": {"total": 2}, "steps": 5, "train_images": 9, "run": {"seed": seed}}
    record = made(metrics={"APbb": value}, items={"class": {"cat": {"APbb": value}}}, seeds=(seed,), settings=settings)
    write(dataclasses.replace(record, **changes), path)


def table(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["results", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["results", *map(str, arguments)]) == 2
    return capsys.readouterr().err


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_results_are_collected_over_seeds(tmp_path, capsys, caplog):
    for seed, value in enumerate((10.0, 12.0, 17.0)):
        put(tmp_path / f"a{seed}/results.json", value, seed)
    put(tmp_path / "older/results.json", 99.0, 1, date="2025-01-01")
    put(tmp_path / "b/results.json", 5.0, model="theirs", weights=OTHERS)
    out = tmp_path / "new" / "rows.json"
    found = table(capsys, tmp_path, "--json", out, "--plot", tmp_path / "plots" / "plot.png")
    assert "| ours | aaaaaaaaaaaa | 13.00 ± 3.61 | 3 of fine-tuning |" in found
    assert "| theirs | bbbbbbbbbbbb | 5.00 | 1 of fine-tuning |" in found
    assert "older/results.json (seed 1) is left out: the same was measured again later, in " in caplog.text
    ours, other = json.loads(out.read_text())
    assert ours["metrics"]["APbb"] == ours["items"]["class"]["cat"]["APbb"] == pytest.approx(13)
    assert ours["deviations"]["APbb"] == pytest.approx(np.std([10, 12, 17], ddof=1))
    assert (ours["seeds"], other["seeds"]) == ([0, 1, 2], [0])
    assert ours["seconds"] == 6
    assert Image.open(tmp_path / "plots" / "plot.png").size[0] > 300


def test_a_path_merges_no_two_models_and_splits_none(tmp_path, capsys):
    """A run that was trained further between two seeds; and a run beside its bundle."""
    put(tmp_path / "1.json", 10.0, 0, model="runs/a")
    put(tmp_path / "2.json", 20.0, 1, model="runs/a", weights=OTHERS)
    put(tmp_path / "3.json", 30.0, 1, model="bundles/a")
    found = table(capsys, tmp_path)
    assert "| aaaaaaaaaaaa | 20.00 ± 14.14 | 2 of fine-tuning |" in found
    assert "| runs/a | bbbbbbbbbbbb | 20.00 | 1 of fine-tuning |" in found


def test_images_that_are_normalized_otherwise_are_another_row(tmp_path, capsys):
    put(tmp_path / "1.json", 10.0)
    put(tmp_path / "2.json", 20.0, 1, preprocessing={"mean": [0.0, 0.0, 0.0], "std": [0.2, 0.2, 0.2]})
    assert "| preprocessing.mean=[0.0, 0.0, 0.0] | 20.00 |" in table(capsys, tmp_path)


def test_random_weights_are_one_row_over_their_seeds(tmp_path, capsys):
    for seed in range(3):
        changes = {"model": "random:resnet50", "random_weights": True, "weights": str(seed) * 64}
        put(tmp_path / f"{seed}.json", 10.0 + seed, seed, **changes)
    put(tmp_path / "another.json", 1.0, model="random:resnet18", architecture="resnet18", random_weights=True)
    found = table(capsys, tmp_path)
    assert "| random:resnet50 | random | 11.00 ± 1.00 | 3 of random weights, 3 of fine-tuning |" in found
    assert "| random:resnet18 | random | 1.00 |" in found


def test_means_of_means_are_means_of_all():
    values = {(0, 1): [3.0, 5.0], (2, 3, 4): [7.0, 8.0, 12.0]}
    records = []
    for seeds, figures in values.items():
        spread = {"APbb": float(np.std(figures, ddof=1))}
        settings = {"seeds": len(seeds)}  # how many there are is no other way to compute
        mean = {"APbb": float(np.mean(figures))}
        records.append((Path("x"), made(metrics=mean, seeds=seeds, deviations=spread, settings=settings)))
    (row,) = collected.collect(records)
    assert row.record.metrics["APbb"] == pytest.approx(7)
    assert row.record.deviations["APbb"] == pytest.approx(np.std([3, 5, 7, 8, 12], ddof=1))
    (row,) = collected.collect([*records[:1], (Path("x"), dataclasses.replace(records[1][1], deviations={}))])
    assert row.record.deviations == {}  # that of three seeds is not known


def test_a_metric_that_some_seeds_lack_is_a_mean_over_fewer(tmp_path, capsys):
    put(tmp_path / "1.json", 10.0)
    put(tmp_path / "2.json", seed=1, metrics={"APbb": 20.0, "APsbb": 4.0})
    assert "15.00 ± 7.07 | 4.00 (1 of 2 seeds) | 2 of fine-tuning |" in table(capsys, tmp_path)


def test_a_copy_of_a_result_counts_once_and_part_of_a_mean_not_at_all(tmp_path, capsys, caplog):
    for name in ("1.json", "copy.json"):
        put(tmp_path / name, 10.0, seeds=(0, 1, 2), deviations={"APbb": 1.0})
    assert "| 10.00 ± 1.00 | 3 of fine-tuning |" in table(capsys, tmp_path)
    assert caplog.text == ""
    put(tmp_path / "older.json", 99.0, seeds=(2, 3), deviations={"APbb": 1.0}, date="2025-01-01")
    assert "| 10.00 ± 1.00 | 3 of fine-tuning |" in table(capsys, tmp_path)
    assert "older.json (seed 2, 3) is left out" in caplog.text


def test_what_has_nothing_random_counts_once(tmp_path, capsys, caplog):
    for seed in range(3):
        put(tmp_path / f"{seed}.json", 10.0, seed, randomness="", date=f"2026-01-0{seed + 1}")
    assert "| 10.00 | nothing random |" in table(capsys, tmp_path)
    assert "1.json (seed 1) is left out: the same was measured again later" in caplog.text


def test_settings_in_which_rows_differ_are_shown(tmp_path, capsys):
    put(tmp_path / "a/results.json", 1.0)
    put(tmp_path / "b/results.json", 2.0, settings={"batch": {"total": 2}, "steps": 50, "train_images": 9})
    found = table(capsys, tmp_path)
    assert "| steps=5 | 1.00 | 1 of fine-tuning |" in found
    assert "| steps=50 | 2.00 | 1 of fine-tuning |" in found


@pytest.mark.parametrize(
    "change",
    [{"version": 2}, {"rule": "jabri"}, {"split": "test"}, {"data": Data("photos", "e" * 64, 4)}],
)
def test_what_cannot_be_compared_stands_in_tables_of_its_own(change, tmp_path, capsys):
    put(tmp_path / "1.json", 10.0)
    put(tmp_path / "2.json", 20.0, 1, **change)
    found = table(capsys, tmp_path)
    assert found.count("### torchvision-detection") == 2
    assert "| 10.00 | 1 of fine-tuning |" in found


def test_what_figures_leave_out_is_said_below_them(tmp_path, capsys):
    put(tmp_path / "1.json", left_out=(("a.jpg", "cut off"),), absent=("cow",))
    found = table(capsys, tmp_path)
    assert "ours: 1 image left out (a.jpg: cut off)." in found
    assert "ours: classes that never occurred: cow." in found


# ---- what is read ----------------------------------------------------------------------------------------------------


def test_records_of_any_name_are_found_and_other_files_passed_over(tmp_path, capsys):
    put(tmp_path / "deep" / "mine.json", 10.0)
    (tmp_path / "annotations.json").write_text('{"info": {}, "images": []}')
    (tmp_path / "clove_hub.json").write_text('{"format": 1, "method": "clove"}')
    (tmp_path / "link.json").symlink_to(tmp_path / "deep" / "mine.json")
    (tmp_path / "broken.json").symlink_to(tmp_path / "nowhere")
    assert "| 10.00 | 1 of fine-tuning |" in table(capsys, tmp_path, tmp_path / "deep" / "mine.json")


def test_of_a_runs_evaluations_the_newest_step_of_each_counts(tmp_path, capsys):
    rows = []
    for step, value in ((0, 1.0), (3, 2.0), (4, 3.0)):
        for asked in ("here", "there"):
            data = Data(asked, asked * 16, 4)
            record = made(model=f"run (step {step})", metrics={"APbb": value}, data=data, weights=str(step) * 64)
            rows.append({"step": step, "asked": {"data": asked}, "record": plain(record)})
    lines = [json.dumps(row) + "\n" for row in rows]
    (tmp_path / "evaluations.jsonl").write_text("".join(lines) + '{"step": 5, "as')
    for path in (tmp_path, tmp_path / "evaluations.jsonl"):
        found = table(capsys, path)
        assert found.count("| run (step 4) | 444444444444 | 3.00 | 1 of fine-tuning |") == 2
        assert "step 3" not in found


def test_a_record_of_format_1_stands_apart_and_says_why(tmp_path, capsys):
    lacking = ("rule", "split", "architecture", "weights", "randomness", "random_weights", "absent", "left_out")
    document = plain(made(metrics={"APbb": 10.0, "AP/cat": 10.0})) | {"format": 1}
    for name in (*lacking, "preprocessing", "items", "seconds"):
        del document[name]
    (tmp_path / "results.json").write_text(json.dumps(document))
    put(tmp_path / "new.json", 20.0, 1)
    del document["format"]
    (tmp_path / "evaluations.jsonl").write_text(json.dumps({"step": 1, "asked": {}, "record": document}) + "\n")
    found = table(capsys, tmp_path)
    assert "### torchvision-detection (version 1, rule not recorded) on photos, 4 samples" in found
    assert "| ours | not recorded | 10.00 | 1 |" in found
    assert "AP/cat" not in found
    assert "ours: of format 1, which records neither weights nor rule" in found
    assert "| ours | aaaaaaaaaaaa | 20.00 |" in found


def test_what_is_no_result_is_refused_by_its_path(tmp_path, capsys):
    assert "holds no result" in refused(capsys, tmp_path)
    assert "nowhere does not exist" in refused(capsys, tmp_path / "nowhere")
    (tmp_path / "results.json").write_text("{}")
    assert "results.json is not a result" in refused(capsys, tmp_path)
    for content, message in (
        ('{"step": 1}\n', "evaluations.jsonl cannot be read as a run's evaluations (KeyError: 'asked')"),
        ("3}\n", "evaluations.jsonl cannot be read"),
        (
            '{"step": 1, "asked": ' + "[" * 100_000 + "}\n",
            "evaluations.jsonl cannot be read as a run's evaluations (Rec",
        ),
        ('{"step": 1, "asked": {}, "record": {"a": 1}}\n', "evaluations.jsonl, step 1 is not a result"),
        ('{"step": 1', "evaluations.jsonl has no complete line"),
    ):
        (tmp_path / "evaluations.jsonl").write_text(content)
        assert message in refused(capsys, tmp_path / "evaluations.jsonl")


def test_what_cannot_be_written_is_named(tmp_path, capsys):
    put(tmp_path / "1.json")
    (tmp_path / "file").write_text("")
    assert f"{tmp_path} is a folder" in refused(capsys, tmp_path / "1.json", "--json", tmp_path)
    assert "below.json cannot be written" in refused(
        capsys, tmp_path / "1.json", "--json", tmp_path / "file" / "below.json"
    )
    assert f"--plot {tmp_path / 'plot.abc'}" in refused(capsys, tmp_path / "1.json", "--plot", tmp_path / "plot.abc")


# ---- the papers' figures ---------------------------------------------------------------------------------------------


def voc07(**changes: object) -> Record:
    settings = {"cost": 0.5, "resize": 256, "crop": 224, "batch": 32}
    known = {"protocol": "linear-svm", "rule": "revisiting", "split": "test", "metrics": {"mAP": 80.0}}
    return made(**{**known, "data": Data("VOC2007", "v" * 64, 4952), "settings": settings, **changes})


def test_a_papers_figure_stands_beside_the_same_rule_alone():
    (printed,) = (r.metrics["mAP"] for r in find_model("resnet50.moco_coco_800ep").results if r.protocol == "voc07_svm")

    def rows(record: Record) -> str:
        return collected.markdown(collected.collect([(Path("x"), record)]))

    assert f"| {printed:g} | - |" in rows(voc07())
    for change in (
        {"rule": "own"},
        {"rule": "vissl"},
        {"protocol": "knn"},
        {"settings": {"cost": 1.0, "resize": 256, "crop": 224}},
        {"data": Data("my photos", "v" * 64, 100)},
        {"left_out": (("a.jpg", "cut off"),)},
        {"rule": None},
    ):
        assert "resnet50.moco" not in rows(voc07(**change)), change


def test_detectron2s_results_stand_beside_the_papers_unless_its_config_was_changed():
    changes = {"protocol": "coco_fpn", "rule": "coco_fpn", "data": Data("COCO 2017", "c" * 64, 5000)}
    beside = collected.markdown(collected.collect([(Path("x"), made(**changes))]))
    assert "| supervised (CLoVE's paper) | - | 38.9 | - |" in beside
    changed = collected.markdown(collected.collect([(Path("x"), made(**changes | {"rule": "changed"}))]))
    assert "supervised" not in changed


def davis(**changes: object) -> Record:
    numbers = {"context": 20, "radius": 12, "top_k": 10, "temperature": 0.05, "frames": None}
    known = {"protocol": "propagate", "rule": "videowalk", "metrics": {"J&F": 60.0}}
    settings = {"rule": "videowalk", "level": -2, "fine": True, **numbers}
    return made(**{**known, "data": Data("DAVIS", "d" * 64, 30), "settings": settings, **changes})


def test_the_papers_figures_on_davis_stand_beside_videowalks_rule_alone():
    def rows(record: Record) -> str:
        return collected.markdown(collected.collect([(Path("x"), record)]))

    assert "| 66.2 |" in rows(davis())
    settings = davis().settings
    for change in ({"rule": "dino"}, {"rule": "ours"}, {"data": Data("clips", "d" * 64, 3)}):
        assert "66.2" not in rows(davis(**change)), change
    for change in ({"radius": 8}, {"frames": 20}, {"level": -1, "fine": False}):
        assert "66.2" not in rows(davis(settings=settings | change)), change


@pytest.mark.parametrize(("case", "images"), [("voc", (10_582, 1449)), ("cityscapes", (2975, 500))])
def test_revisitings_fcn_stands_beside_the_papers_under_its_own_rule_and_on_all_images(case, images):
    model = find_model("resnet50.moco_knn_coco_200ep")
    (printed,) = (r.metrics["mIoU"] for r in model.results if r.protocol == f"{case}_segmentation")

    def rows(rule: str, train: int, test: int) -> str:
        settings = {"batch": {"total": 16}, "steps": 5, "train_images": train}
        changes = {"protocol": "torchvision-segmentation", "metrics": {"mIoU": 50.0}, "settings": settings}
        record = made(**changes, rule=rule, data=Data("data", "d" * 64, test))
        return collected.markdown(collected.collect([(Path("x"), record)]))

    rule = f"fcn_revisiting_{case}"
    assert f"| {printed:g} | - |" in rows(rule, *images)
    for other in ((f"fcn_{case}", *images), ("changed", *images), (rule, 100, images[1]), (rule, images[0], 100)):
        assert "resnet50.moco" not in rows(*other), other


def test_every_paper_protocol_is_measured_by_something_here_and_by_the_same_rule():
    here = {(name, find_protocol(name).RULE) for name in PROTOCOLS}
    here |= {(f"torchvision-{preset.task}", name) for name, preset in PRESETS.items()}
    here |= {(task, task) for task in detectron2_tasks.TASKS}
    assert {(how.measured_by, how.rule) for how in protocols().values()} <= here


# ---- the plot --------------------------------------------------------------------------------------------------------


def test_the_legend_covers_no_bar():
    records = []
    for number in range(6):
        for protocol in ("a", "b"):
            name = f"runs/a_rather_long_name_of_a_run_{number}"
            records.append((Path("x"), made(protocol=protocol, model=name, weights=str(number) * 64)))
    figure = draw_results(collected.collect(records))
    assert_readable(figure)
    assert len(figure.axes) == 2
    boxes = [axes.get_window_extent() for axes in figure.axes]
    legends = [part.legends[0].get_window_extent() for part in figure.subfigs]
    assert not any(legend.overlaps(box) for legend in legends for box in boxes)
    assert all(box.height > 100 for box in boxes)  # pixels


# ---- a bundle's card -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    write_run(folder / "run", "resnet18")
    assert main(["export", str(folder / "run"), "--out", str(folder / "bundle")]) == 0
    return folder / "bundle"


@pytest.fixture
def bundle(exported, tmp_path) -> Path:
    copied = tmp_path / "bundle"
    copied.mkdir()
    for file in exported.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    return copied


def of(bundle: Path) -> dict[str, object]:
    source = load(bundle)
    seen = {"mean": list(source.preprocessing.mean), "std": list(source.preprocessing.std)}
    return {"weights": source.fingerprint, "preprocessing": seen}


def test_results_go_into_the_card_of_the_bundle_that_they_are_of(bundle, tmp_path, capsys):
    for seed, value in enumerate((31.0, 31.5)):
        put(tmp_path / f"results/{seed}.json", value, seed, model=f"name {seed}", **of(bundle))
    table(capsys, tmp_path / "results", "--into", bundle)
    card = (bundle / "README.md").read_text()
    assert "31.25" in card
    assert "reproduced" in card
    assert "9 training images, 5 steps of 2 images; mean of 2 seeds of fine-tuning" in card
    assert "torchvision-detection, version 1, rule own" in card


def test_a_card_says_how_many_images_were_left_out_and_no_split_where_there_is_none(bundle, tmp_path, capsys):
    left_out = (("/home/somebody/photos/a.jpg", "cut off"),)
    put(tmp_path / "1.json", split="", left_out=left_out, absent=("cow",), **of(bundle))
    table(capsys, tmp_path / "1.json", "--into", bundle)
    card = (bundle / "README.md").read_text()
    assert "1 image left out; classes that never occurred: cow." in card
    assert "somebody" not in card
    assert "split" not in card.split("---\n")[1]


def test_an_evaluation_goes_into_the_card_of_what_was_evaluated(bundle, tmp_path, capsys):
    """Measured with the run, written into the bundle made from it; of another model, refused."""
    data = scenes.class_images(tmp_path / "classes")
    own, other = tmp_path / "own.json", tmp_path / "other.json"
    for model, out in ((bundle, own), ("random:resnet18", other)):
        assert main(["evaluate", "knn", "--model", str(model), "--data", str(data), "--json", str(out)]) == 0
    table(capsys, own, "--into", bundle)
    card = (bundle / "README.md").read_text()
    assert f"top1 {read(own).metrics['top1']:g}" in card
    assert "knn, version 2, rule wu2018" in card
    assert "other.json was measured with other weights (random:resnet18, " in refused(capsys, other, "--into", bundle)
    assert (bundle / "README.md").read_text() == card


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "0" * 64}, "other weights (ours, 000000000000)"),
        ({"weights": None}, "format 1 does not record which weights were measured: evaluate"),
        ({"preprocessing": {"mean": [0.0] * 3, "std": [1.0] * 3}}, "another mean of the images"),
        ({"preprocessing": {"mean": 3}}, "another mean of the images than"),
    ],
)
def test_figures_of_other_weights_never_go_into_a_card(changes, message, bundle, tmp_path, capsys):
    card = (bundle / "README.md").read_text()
    put(tmp_path / "results/mine.json", 1.0, **of(bundle))
    put(tmp_path / "results/wrong.json", 99.0, 1, **of(bundle) | changes)
    error = refused(capsys, tmp_path / "results", "--into", bundle)
    assert message in error
    assert "wrong.json" in error
    assert "mine.json" not in error
    assert (bundle / "README.md").read_text() == card


@pytest.mark.parametrize(
    "changes",
    [
        {"seeds": ()},
        {"settings": {"batch": {"total": 3}}},
        {"settings": {"batch": {"total": 3}, "steps": 1, "train_images": 2, "notes": 3}},
    ],
)
def test_a_result_that_lacks_what_a_card_would_say_goes_into_it_without(changes, bundle, tmp_path, capsys):
    put(tmp_path / "1.json", **of(bundle) | changes)
    assert "wrote 1 result into its card" in table(capsys, tmp_path / "1.json", "--into", bundle)


@pytest.mark.parametrize("changes", [{"results": [1]}, {"results": [{"protocol": "x"}]}, {"origin": {"kind": "run"}}])
def test_a_bundle_that_does_not_say_what_its_card_is_made_of_is_left_as_it_is(changes, bundle, tmp_path, capsys):
    path = bundle / "clove_hub.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    put(tmp_path / "1.json", **of(bundle))
    before = {each.name: each.read_bytes() for each in bundle.iterdir()}
    error = refused(capsys, tmp_path / "1.json", "--into", bundle)
    assert "clove_hub.json does not say what a card is made of" in error
    assert {each.name: each.read_bytes() for each in bundle.iterdir()} == before
