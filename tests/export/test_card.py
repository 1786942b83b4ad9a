"""The model card of a bundle: what a stranger reads, and what the Hub does."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from measured import MEASURED
from synthetic import trained, write_run

from clove_hub.export import card as cards
from clove_hub.export import export_run, exporting, write_bundle
from clove_hub.export.bundle import add_results
from clove_hub.export.card import Facts, Published
from clove_hub.export.contents import Contents
from clove_hub.export.cost import Cost, cost
from clove_hub.export.license import LICENSES, require_license
from clove_hub.export.metadata import check_metadata, eval_results, metadata
from clove_hub.weights import Preprocessing
from clove_hub.zoo.models import PREPROCESSING, Model, find_model, models


def told(model: Model, **changes: Any) -> dict[str, Any]:
    """What clove_hub.json says of an adopted model."""
    adopted = {
        "kind": "adopted",
        "name": model.name,
        "file": "released.pth",
        "sha256": "abc123",
        "format": "a checkpoint of the authors",
        "url": model.paper.code,
        "notes": ["Something that had to be said."],
    }
    provenance = {
        "method": model.method,
        "exported": model.exported,
        "model": model.name,
        "origin": adopted,
        "results": [],
        "sha256": {"model.safetensors": "def456"},
    }
    return provenance | changes


def config(model: Model) -> dict[str, Any]:
    cfg = {"input_size": [3, model.input_size, model.input_size], "license": model.paper.license, **PREPROCESSING}
    return {"architecture": model.architecture, "num_features": 2048, "pretrained_cfg": cfg}


FACTS = Facts(94_273_440, 23_508_032, Cost(4_087_136_256, 11_113_984))


def card_of(name: str, at: Published | None = None, **changes: Any) -> str:
    model = find_model(name)
    return cards.render_card(told(model, **changes), config(model), FACTS, at)


def index(card: str) -> list[dict[str, Any]]:
    (entry,) = yaml.safe_load(card.split("---\n")[1]).get("model-index", [{"results": []}])
    results: list[dict[str, Any]] = entry["results"]
    return results


def section(card: str, title: str) -> str:
    return card.split(f"\n## {title}\n")[1].split("\n## ")[0]


@pytest.mark.parametrize("name", list(models()))
def test_every_model_of_the_zoo_has_a_card_that_the_hubs_own_client_understands(name):
    card = card_of(name)
    check_metadata(card)
    model = find_model(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        understood = ModelCard(card).data
    assert understood.license == model.paper.license
    assert understood.library_name == "timm"
    assert understood.datasets == ([model.data.hub] if model.data.hub else None)
    found = [
        (result.source_name, result.source_url, result.metric_type, result.metric_value)
        for result in understood.eval_results or []
    ]
    assert found == [
        (result.source, result.url, metric, value)
        for result in model.results
        for metric, value in result.metrics.items()
    ], "no figure is lost, and each keeps its source"
    assert f"{model.data.images:,} images" in section(card, "Training")
    assert model.data.terms in section(card, "Training")
    assert model.paper.bibtex.strip() in section(card, "Citation")
    assert not re.search(r"\$\w|\bNone\b", card), "a hole in the template"


def test_a_converted_checkpoint_says_where_it_is_from_and_not_that_it_was_trained_here():
    training = section(card_of("resnet50.moco_coco_800ep"), "Training")
    for said in ("released.pth", "abc123", "a checkpoint of the authors", "Something that had to be said."):
        assert said in training
    assert "clove-hub converted the weights and did not train them" in training
    assert "the authors of [arXiv:2106.05967]" in training, "who trained the baseline"
    assert "hardware | not recorded in the file" in training
    assert "optimizer steps" not in training
    assert "vangansbeke2021revisiting" in section(card_of("resnet50.moco_coco_800ep"), "Citation")


def test_figures_stand_under_their_source_beside_those_of_the_same_source():
    evaluation = section(card_of("resnet50.pixpro_in1k_400ep", results=[MEASURED]), "Evaluation")
    page, *tables, paper, measured = re.split(r"^(?=From another|Reproduced)", evaluation, flags=re.MULTILINE)
    assert page.strip().startswith(
        "From the authors' page: [PixPro's page, Main Results](https://github.com/zdaxie/PixPro)"
    )
    assert "| APbb 60.2, AP50bb 83.8, AP75bb 67.7 |\n" in page, "with nothing to compare from another source"
    assert ["CLoVE's paper, Table" in table for table in tables] == [True] * 4
    assert "| APkp 66.6, AP50kp 87.2, AP75kp 73.0 | APkp 65.3, AP50kp 87.0, AP75kp 71.3 |" in tables[-1]
    assert "CLoVE's page" in paper
    assert "| APmk 35.8, AP50mk 63.7 | APmk 26.5, AP50mk 52.9 | APmk 19.9, AP50mk 40.7 |" in paper
    assert measured.startswith("Reproduced: measured with these weights by clove-hub.")
    assert "| voc07-svm, version 1 | mAP 12.34 |" in measured


def test_what_was_measured_here_is_never_mixed_with_what_was_printed():
    results = index(card_of("resnet50.moco_coco_800ep", results=[MEASURED]))
    printed, measured = results[:-1], results[-1]
    assert all(metric["name"].endswith("(from the paper)") for result in printed for metric in result["metrics"])
    assert all(result["source"]["url"] == "https://arxiv.org/abs/2106.05967" for result in printed)
    assert [metric["name"] for metric in measured["metrics"]] == ["mAP (reproduced)"]
    assert "source" not in measured, "the Hub then says that it is self-reported"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The miniature run of a ResNet-18 that was trained as the model is that `small_zoo` makes up."""
    recipe = {"method": {"name": "clove"}, "schedule": {"epochs": 3}}
    write_run(tmp_path / "run", "resnet18", finished=True, recipe=recipe)
    return tmp_path / "run"


@pytest.fixture
def small_zoo(monkeypatch: pytest.MonkeyPatch) -> str:
    """A model of the zoo that a miniature run can reproduce."""
    like = find_model("resnet50.clove_in1k_200ep")
    small = dataclasses.replace(
        like,
        name="resnet18.clove_photos",
        architecture="resnet18",
        data=dataclasses.replace(like.data, name="photos", images=160),
        epochs=3,
        input_size=64,
    )
    for module in (cards, exporting):
        monkeypatch.setattr(module, "find_model", {small.name: small}.__getitem__)
    return small.name


def test_a_run_that_reproduces_a_model_has_its_name_and_not_its_figures(run, small_zoo):
    bundle = export_run(run, license="mit", name=small_zoo)
    card = (bundle / "README.md").read_text()
    assert card.split("---\n")[2].strip().startswith(f"# Model card for {small_zoo}\n")
    assert index(card) == []
    evaluation = section(card, "Evaluation")
    assert (
        "From the paper, for the weights that its authors released and **not for these**: [CLoVE's paper" in evaluation
    )
    cfg = json.loads((bundle / "config.json").read_text())["pretrained_cfg"]
    assert (cfg["tag"], cfg["origin_url"]) == ("clove_photos", None)
    assert "converted" not in section(card, "Training")
    add_results(bundle, [MEASURED])
    (own,) = index((bundle / "README.md").read_text())
    assert own["metrics"][0]["value"] == 12.34


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"finished": False}, "finished False, not True"),
        ({"data": {"name": "photos", "fingerprint": "f", "images": 159}}, "images 159, not 160"),
        ({"method": "moco", "exported": "teacher"}, "method moco, not clove; exported encoder teacher, not student"),
    ],
)
def test_a_run_that_was_trained_otherwise_does_not_get_the_name(run, small_zoo, changes, message):
    (state,) = (run / "checkpoints").glob("*/state.json")
    state.write_text(json.dumps(json.loads(state.read_text()) | changes))
    with pytest.raises(ValueError, match=rf"this run is not resnet18\.clove_photos: {message}.*clove-hub pretrain"):
        export_run(run, name=small_zoo)


def test_an_adopted_bundle_twice_is_the_same_bytes(tmp_path):
    tensors = trained("resnet18").state_dict()
    for name in ("one", "two"):
        weights = Contents(
            what="random weights",
            architecture="resnet18",
            tensors={key: tensors[key] for key in sorted(tensors, reverse=name == "two")},
            method="clove",
            exported="student",
            preprocessing=Preprocessing(224, PREPROCESSING["mean"], PREPROCESSING["std"]),
            origin=told(find_model("resnet50.clove_in1k_200ep"))["origin"],
            license="mit",
        )
        write_bundle(weights, tmp_path / name)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


# ---- on the Hub and in a folder ------------------------------------------------------------------------------------


def test_snippets_load_from_the_folder_or_from_the_version_on_the_hub():
    name = "resnet50.slotcon_coco_800ep"
    local, hub = card_of(name), card_of(name, Published(f"acme/{name}", "v2.1.0"))
    assert local.count("local-dir:.") == 3
    assert "hf-hub:" not in local
    assert "clove-hub convert . --to detectron2 --out ../backbone.pth" in local
    assert "clove-hub convert . --to transformers --model rt_detr_v2 --out ../detector" in local
    assert hub.count(f"hf-hub:acme/{name}@v2.1.0") == 5
    assert "local-dir:" not in hub
    assert hub.split("---\n")[1] == local.split("---\n")[1]


def run_card(**recipe: Any) -> str:
    origin = {
        "kind": "run",
        "data": {"name": "acme/photos", "images": 160, "fingerprint": "c0ffee"},
        "recipe": recipe,
        "step": 10,
        "steps_total": 10,
        "images_seen": 160,
        "hardware": "1 x CPU",
        "versions": {"torch": "2.6"},
    }
    model = find_model("resnet50.clove_in1k_200ep")
    provenance = told(model) | {"model": None, "origin": origin}
    return cards.render_card(provenance, config(model), FACTS)


def test_a_run_on_a_data_set_of_the_hub_links_it_and_what_it_started_from():
    card = run_card(data={"source": "huggingface"}, run={"init_from": "hf-hub:acme/first-state@v1.0.0"})
    understood = ModelCard(card).data
    assert understood.datasets == ["acme/photos"]
    assert understood.base_model == "acme/first-state"
    assert "[acme/photos](https://huggingface.co/datasets/acme/photos), 160 images" in section(card, "Training")
    folder = ModelCard(run_card(data={"source": "folder"}, run={"init_from": "runs/first"})).data
    assert (folder.datasets, folder.base_model) == (None, None)


def test_the_learning_rate_in_it_is_the_one_that_was_used():
    card = run_card(optimizer={"learning_rate": 0.5}, batch={"total": 64})
    assert "| peak learning rate | 0.125 (`optimizer.learning_rate` x `batch.total` / 256) |" in section(
        card, "Training"
    )


def test_a_card_for_bands_names_the_package_that_reads_them():
    model = find_model("resnet50.clove_in1k_200ep")
    bands = config(model)
    bands["pretrained_cfg"] |= {"input_size": [5, 224, 224], "mean": [0.5] * 5, "std": [0.2] * 5}
    usage = section(cards.render_card(told(model), bands, FACTS), "How to use")
    assert "`pip install timm tifffile` installs what the snippets need. Replace `image.tif`" in usage
    assert "photo.jpg" not in usage
    assert "pip install transformers" not in usage


def test_figures_that_are_not_in_percent_are_named():
    depth = MEASURED | {"protocol": "depth, version 1", "metrics": {"delta1": 80.0, "RMSE": 0.5}}
    evaluation = section(card_of("resnet50.clove_in1k_50ep", results=[depth]), "Evaluation")
    assert "| depth, version 1 | delta1 80.0, RMSE (m) 0.5 |" in evaluation
    assert "All figures are in percent except RMSE." in evaluation
    assert "All figures are in percent. AP" in card_of("resnet50.clove_in1k_200ep")


@pytest.mark.parametrize(
    ("name", "gmacs", "activations"),
    # timm's results/benchmark-infer-amp-nhwc-pt240-cu124-rtx4090.csv, which counts norms as well.
    [("resnet18", 1.82, 2.48), ("resnet50", 4.11, 11.11), ("vit_small_patch16_224", 4.61, 11.95)],
)
def test_the_cost_of_an_image_is_that_of_timms_table(name, gmacs, activations):
    found = cost(name, 224)
    assert found.macs / 1e9 == pytest.approx(gmacs, rel=0.01)
    assert found.activations / 1e6 == pytest.approx(activations, abs=0.011)


# ---- the front matter ----------------------------------------------------------------------------------------------


GOOD = yaml.safe_load(card_of("resnet50.clove_in1k_200ep").split("---\n")[1])


def front(**changes: Any) -> str:
    return f"---\n{yaml.safe_dump({**GOOD, **changes})}---\n\n# A card\n"


def result(**changes: Any) -> list[dict[str, Any]]:
    return [{"name": "a model", "results": [GOOD["model-index"][0]["results"][0] | changes]}]


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("# no front matter", "does not begin with a front matter"),
        (front(license=None), "names no license.*--license"),
        (front(license="MIT"), "'MIT' is not a license id of the Hub .did you mean 'mit'"),
        (front(license="apache-2"), "did you mean 'apache-2.0'"),
        (front(license="other"), "--license-name"),
        (front(library_name="transformers"), "library_name is 'transformers', expected 'timm'"),
        (front(pipeline_tag="feature-extractor"), "pipeline_tag is 'feature-extractor', expected one of"),
        (front(tags="timm"), "tags are 'timm', expected a list"),
        (front(datasets=["ImageNet 1k"]), "datasets are .*expected a list of ids such as ILSVRC/imagenet-1k"),
        (front(**{"model-index": {}}), "model-index is {}, expected a list"),
        (front(**{"model-index": [{"results": []}]}), "an entry of the card's model-index has no name"),
        (front(**{"model-index": result(task={"name": "detection"})}), "has task .*expected type"),
        (front(**{"model-index": result(task={"type": "detection"})}), "of the task 'detection', expected one of"),
        (front(**{"model-index": result(dataset={"type": "coco"})}), "has dataset .*expected type and name"),
        (front(**{"model-index": result(source={"name": "a paper"})}), "has source .*expected name and url"),
        (front(**{"model-index": result(metrics=[{"type": "AP", "value": "high"}])}), "expected a type and a number"),
        (front(**{"model-index": result(metrics=[])}), "has no metrics"),
    ],
)
def test_what_the_hub_would_not_understand_is_named(card, message):
    with pytest.raises(ValueError, match=message):
        check_metadata(card)


def test_what_the_hub_understands_passes():
    check_metadata(front())
    check_metadata(front(**{"model-index": []}))
    assert all(find.paper.license in LICENSES for find in models().values())


def test_the_library_reads_every_result_back_with_its_own_source():
    of = {"task": "object-detection", "dataset": "COCO 2017", "dataset_type": "coco", "split": "val2017"}
    paper = {"kind": "from the paper", "source": "a paper, table 1", "url": "https://arxiv.org/abs/2310.00527"}
    page = {"kind": "from the authors' page", "source": "a page", "url": "https://example.org"}
    here = {"kind": "reproduced", "source": "measured here", "url": None}
    results = eval_results(
        [
            of | paper | {"protocol": "C4", "metrics": {"APbb": 41.0, "AP50bb": 60.3}},
            of | paper | {"protocol": "FPN", "metrics": {"APbb": 41.2}},
            of | page | {"protocol": "FPN", "metrics": {"APbb": 41.3}},
            of | here | {"protocol": "FPN", "metrics": {"APbb": 40.9}, "split": ""},
        ]
    )
    front = metadata("a model", results, license="mit", library_name="timm", pipeline_tag="image-feature-extraction")
    card = f"---\n{front.to_yaml()}\n---\n"
    check_metadata(card)
    understood = ModelCard(card).data
    assert understood.eval_results == results
    assert understood.model_name == "a model"
    assert [result.source_url for result in results] == [paper["url"]] * 3 + [page["url"], None]


# ---- licenses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "license", [("mit",), ("llama3.1",), ("other", "my-license-1.0", "https://example.org/x"), (None,)]
)
def test_a_license_that_the_hub_accepts_is_accepted(license):
    require_license(*license)


@pytest.mark.parametrize(
    ("license", "message"),
    [
        (("Other",), "did you mean 'other'"),
        (("other",), "--license other needs --license-name .* and --license-link"),
        (("other", "my-license"), "--license other needs"),
        (("other", "My License", "https://example.org/x"), "--license-name My License: .*such as my-license$"),
        (("other", "my-license", "LICENSE"), "--license-link LICENSE: expected the URL"),
        (("mit", "my-license"), "--license-name needs --license other, not mit"),
        ((None, None, "https://example.org/x"), "--license-link needs --license other, not none"),
    ],
)
def test_a_license_that_says_too_little_or_too_much_is_refused_with_the_way_out(license, message):
    with pytest.raises(ValueError, match=message):
        require_license(*license)
