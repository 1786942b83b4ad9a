"""The table of models: what the cards say, and what is made of it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from loopback_hub import LoopbackHub, Repository, regular

from clove_hub.cli import main
from clove_hub.export.license import LICENSES
from clove_hub.zoo import models as zoo
from clove_hub.zoo import places
from clove_hub.zoo.listing import markdown

ROOT = Path(__file__).parents[3]
REFERENCE = {  # what the design's table of reference numbers says, by model, protocol and metric
    ("resnet50.clove_in1k_200ep", "coco_c4"): {"APbb": 40.6, "APmk": 35.4},
    ("resnet50.clove_in1k_400ep", "coco_c4"): {"APbb": 41.0, "APmk": 35.5},
    ("resnet50.clove_in1k_200ep", "coco_fpn"): {"APbb": 40.8, "APmk": 36.8},
    ("resnet50.clove_in1k_400ep", "coco_fpn"): {"APbb": 41.2, "APmk": 37.1},
    ("resnet50.clove_in1k_200ep", "lvis_fpn"): {"APbb": 23.6, "APmk": 23.3},
    ("resnet50.clove_in1k_400ep", "lvis_fpn"): {"APbb": 24.3, "APmk": 23.9},
    ("resnet50.clove_in1k_200ep", "cityscapes_fpn"): {"APmk": 35.7, "AP50mk": 64.1},
    ("resnet50.clove_in1k_400ep", "cityscapes_fpn"): {"APmk": 37.2, "AP50mk": 65.3},
    ("resnet50.clove_in1k_200ep", "coco_keypoints"): {"APkp": 66.9},
    ("resnet50.clove_in1k_400ep", "coco_keypoints"): {"APkp": 67.0},
    ("resnet50.clove_in1k_200ep", "voc_c4"): {"APbb": 60.1, "AP50bb": 83.7, "AP75bb": 67.7},
    ("resnet50.clove_in1k_400ep", "voc_c4"): {"APbb": 59.9, "AP50bb": 83.8, "AP75bb": 67.8},
    ("resnet50.clove_in1k_50ep", "voc_c4"): {"APbb": 58.5},
    ("resnet50.clove_in1k_200ep", "densepose_fpn"): {"APgps": 66.6, "APgpsm": 67.5, "APmk": 68.2},
    ("resnet50.clove_in1k_400ep", "densepose_fpn"): {"APgps": 66.3, "APgpsm": 67.3, "APmk": 68.3},
    ("resnet50.slotcon_coco_800ep", "coco_fpn"): {"APbb": 41.0, "APmk": 37.0},
    ("resnet50.slotcon_cocoplus_800ep", "coco_fpn"): {"APbb": 41.8, "APmk": 37.8},
    ("resnet50.slotcon_in1k_100ep", "coco_fpn"): {"APbb": 41.4, "APmk": 37.2},
    ("resnet50.slotcon_in1k_200ep", "coco_fpn"): {"APbb": 41.8, "APmk": 37.8},
    ("resnet50.moco_knn_coco_200ep", "voc07_svm"): {"mAP": 85.1},
    ("resnet50.moco_knn_coco_800ep", "voc07_svm"): {"mAP": 85.9},
    ("resnet50.moco_knn_coco_200ep", "voc_segmentation"): {"mIoU": 71.9},
    ("resnet50.moco_knn_coco_800ep", "voc_segmentation"): {"mIoU": 73.5},
    ("resnet50.moco_knn_coco_200ep", "cityscapes_segmentation"): {"mIoU": 72.2},
    ("resnet50.moco_knn_coco_800ep", "cityscapes_segmentation"): {"mIoU": 72.3},
    ("resnet50.moco_knn_coco_800ep", "davis"): {"J&F": 66.2},
    ("resnet50.moco_coco_200ep", "voc07_svm"): {"mAP": 76.1},
    ("resnet50.moco_coco_800ep", "voc07_svm"): {"mAP": 81.0},
    ("resnet50.moco_coco_200ep", "voc_segmentation"): {"mIoU": 66.2},
    ("resnet50.moco_coco_800ep", "voc_segmentation"): {"mIoU": 71.1},
    ("resnet50.moco_coco_200ep", "cityscapes_segmentation"): {"mIoU": 70.3},
    ("resnet50.moco_coco_800ep", "cityscapes_segmentation"): {"mIoU": 71.3},
    ("resnet50.moco_coco_800ep", "davis"): {"J&F": 63.2},
}


def test_the_zoo_has_its_thirteen_models_with_every_figure_of_the_papers():
    table = zoo.models()
    assert len(table) == 13
    for (name, protocol), figures in REFERENCE.items():
        found = [r.metrics for r in table[name].results if r.protocol == protocol]
        assert found, (name, protocol)
        assert figures.items() <= found[0].items(), (name, protocol)


def test_what_a_card_says_agrees_with_the_recipe_that_trains_it():
    for model in zoo.models().values():
        recipe = yaml.safe_load((ROOT / "training/recipes" / f"{model.recipe}.yaml").read_text())
        assert recipe["method"]["name"] == model.method
        assert recipe["backbone"]["model"] == model.architecture
        assert recipe["schedule"]["epochs"] == model.epochs
        assert recipe["method"].get("global_size", model.input_size) == model.input_size
        assert model.training == {
            "batch_size": recipe["batch"]["total"],
            "learning_rate": recipe["optimizer"]["learning_rate"],
            **({"prototypes": recipe["method"]["prototypes"]} if "prototypes" in recipe["method"] else {}),
        }
        assert model.paper.license in LICENSES


def test_figures_say_who_printed_them():
    def sources(name: str) -> set[tuple[str, str]]:
        return {(result.source.split(",")[0], result.url) for result in zoo.find_model(name).results}

    clove, slotcon = ("CLoVE's page", "https://github.com/sthalles/CLoVE"), "https://github.com/CVMI-Lab/SlotCon"
    paper = ("CLoVE's paper", "https://arxiv.org/abs/2310.00527")
    assert sources("resnet50.clove_in1k_200ep") == {paper}
    assert sources("resnet50.slotcon_in1k_200ep") == {("SlotCon's page", slotcon), clove, paper}
    ((_, baseline),) = sources("resnet50.moco_coco_800ep")
    assert baseline == "https://arxiv.org/abs/2106.05967", "not the paper of MoCo v2, whose authors did not train it"


def test_nothing_in_the_tables_is_left_over():
    table = zoo.models().values()
    trained_here = {"densecl", "byol"}  # of which nobody's weights are in the zoo
    assert {model.method for model in table} == set(zoo.papers()) - trained_here
    assert {model.data for model in table} == set(zoo.data().values())
    assert {result.protocol for model in table for result in model.results} == set(zoo.protocols())
    assert {data.images for data in zoo.data().values()} == {1_281_167, 118_287, 241_690}


def card(**changes: str) -> str:
    lines = {
        "architecture": "resnet50",
        "method": "clove",
        "exported": "student",
        "data": "coco",
        "epochs": "1",
        "recipe": "demo",
        "input_size": "224",
        "results": "[]",
    }
    front = "\n".join(f"{key}: {value}" for key, value in (lines | changes).items() if value)
    return f"---\n{front}\n---\n\nA few words.\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# No front matter", "does not begin with a front matter"),
        ("---\n- a\n---\n", "is a list, expected keys and values"),
        ("---\na: [\n---\n", "is not valid YAML"),
        (card(epoch="3"), "unknown key 'epoch' .did you mean 'epochs'"),
        (card(epochs=""), "'epochs' is missing"),
        (card(epochs="many"), "epochs is 'many', expected int"),
        (card(data="photos"), "data 'photos' is not one of imagenet_1k, coco, cocoplus"),
        (card(data=""), "'data' is missing"),
        (card(method="dino"), "method 'dino' is not one of clove, slotcon"),
        (card(exported="both"), "exported 'both' is not one of student, teacher"),
        (card(architecture="resnet18"), "with the architecture 'resnet18'"),
        (card(training="{lr: 1.0}"), "expected some of epoch, .*learning_rate"),
        (card(weights="drive.google.com/x"), "expected an address that begins with https://"),
        (card(sha256="[c0ffee]"), "expected a list of checksums of 64"),
        (card(results=""), "has no list of `results`"),
        (card(results="[{paper: clove, at: Table 1, figures: {coco: {AP: 1}}}]"), "'coco' is not a protocol"),
        (card(results="[{at: Table 1, figures: {voc_c4: {AP: 1}}}]"), "expected `paper` or `page`"),
        (
            card(results="[{paper: dino, at: Table 1, figures: {voc_c4: {AP: 1}}}]"),
            "expected `paper` or `page` .of clove",
        ),
        (card(results="[{paper: clove, figures: {voc_c4: {AP: 1}}}]"), "expected .* `at`"),
        (card(results="[{paper: clove, at: Table 1, figures: {voc_c4: {AP: 600}}}]"), "expected them in percent"),
    ],
)
def test_a_card_with_a_mistake_is_named(text, message):
    with pytest.raises(ValueError, match=message) as error:
        zoo.read_card("resnet50.made_up", text)
    assert "resnet50.made_up" in str(error.value)


def test_an_unknown_model_names_the_nearest():
    with pytest.raises(ValueError, match=r"did you mean resnet50\.clove_in1k_"):
        zoo.find_model("resnet50.clove_in1k_300ep")


def test_the_documentations_table_is_current():
    page = (ROOT / "docs/zoo.md").read_text()
    block = re.search(r"<!-- clove-hub models --markdown -->\n(.*?)<!-- end -->", page, re.S)
    assert block
    assert block[1].strip() == markdown(list(zoo.models().values()))


def test_no_id_is_claimed_before_a_namespace_is_chosen(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("CLOVE_HUB_NAMESPACE", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["models"]) == 0
    printed = capsys.readouterr().out
    assert "hf-hub:" not in printed
    assert printed.count("by the authors, to be adopted: https://") == 13
    for model in zoo.models().values():
        assert f"by the authors, to be adopted: {model.weights}\n" in printed
    assert main(["models", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["weights"]["where"] for row in rows} == {"released"}
    assert rows[0]["released"] == {
        "page": "https://github.com/sthalles/CLoVE",
        "link": "https://drive.google.com/drive/folders/1LKWsiOGpVlZGBaI7xiKD4VeZmsWyHoNW?usp=sharing",
        "sha256": [],
    }
    assert main(["models", "--check"]) == 2
    assert "CLOVE_HUB_NAMESPACE" in capsys.readouterr().err

    # By the environment, by the settings, and by what was adopted on this machine.
    (tmp_path / "clove-hub/models/resnet50.clove_in1k_50ep").mkdir(parents=True)
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "clove-hub/models/resnet50.clove_in1k_50ep" / name).touch()
    (tmp_path / "clove-hub/config.yaml").write_text("namespace: by-settings\n")
    assert main(["models"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("(not checked)") == 12
    assert "hf-hub:by-settings/resnet50.pixpro_in1k_400ep (not checked)" in printed
    assert str(tmp_path / "clove-hub/models/resnet50.clove_in1k_50ep") in printed
    monkeypatch.setenv("CLOVE_HUB_NAMESPACE", "by-environment")
    assert places.namespace() == ("by-environment", None)
    monkeypatch.setenv("CLOVE_HUB_NAMESPACE", "by-environment@v1.0.0")
    assert main(["models", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)[-1]
    wanted = {"where": "hub", "id": f"by-environment/{row['name']}", "revision": "v1.0.0", "checked": False}
    assert row["weights"] == wanted


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name: x", "expected one key"),
        ("namespace: [", "cannot be read"),
        ("namespace: a/b", "cannot be a user"),
        ("namespace: a@", "or my-organization@v1.0.0 for"),
    ],
)
def test_wrong_settings_are_named(monkeypatch, tmp_path, capsys, content, message):
    monkeypatch.delenv("CLOVE_HUB_NAMESPACE", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "clove-hub").mkdir()
    (tmp_path / "clove-hub/config.yaml").write_text(content)
    assert main(["models"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "config.yaml" in error


def test_listing_the_models_needs_no_torch():
    code = (
        "import sys; from clove_hub.cli import main; main(['models']); "
        "assert not {'torch', 'timm', 'huggingface_hub', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.network
def test_asked_to_check_it_lists_only_what_the_hub_has(tmp_path):
    name, empty = "resnet50.clove_in1k_400ep", "resnet50.clove_in1k_200ep"
    command = [sys.executable, "-m", "clove_hub.cli", "models", "--check"]
    environment = {
        "PATH": os.environ["PATH"],
        "CLOVE_HUB_NAMESPACE": "acme",
        "XDG_CACHE_HOME": str(tmp_path),
        "XDG_CONFIG_HOME": str(tmp_path),
    }
    with LoopbackHub() as hub:
        environment["HF_ENDPOINT"] = hub.url
        for model, files in ((name, {"model.safetensors": regular(b"weights")}), (empty, {})):
            hub.repositories[f"acme/{model}"] = repository = Repository(private=False)
            repository.commit("weights", files)
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert [line.split()[-1] for line in done.stdout.splitlines() if "hf-hub:" in line] == [f"hf-hub:acme/{name}"]
    assert "(not checked)" not in done.stdout
    assert done.stdout.count("by the authors, to be adopted") == 12

    gone = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert gone.returncode == 2
    assert re.fullmatch(
        r"error: the Hub cannot be reached: .*(Check the network, proxies|HF_HUB_OFFLINE).*\n", gone.stderr
    ), gone.stderr
