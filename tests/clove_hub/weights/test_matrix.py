"""Every kind of source in every command that takes one, typed as a user types: it works, or a sentence says why not.

All of them hold a ResNet-18, made by the commands and packages that make them for users.
"""

import argparse
import re
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from fine_tuning import SEGMENTER
from hub_cache import fetched
from safetensors.torch import save_file
from synthetic import released_tensors, save_released, trained
from timm.models import save_for_hf
from timm.utils import CheckpointSaver
from training_runs import last_checkpoint, overrides

from clove_hub.cli import main

pytest_plugins = ["downstream_fixtures"]

METHOD = {
    "backbone__model": "resnet18",
    "method__projector_hidden": 24,
    "method__feature_dim": 16,
    "method__attention_heads": 8,
    "method__attention": "standard",
    "schedule__steps": 1,
    "schedule__warmup_epochs": 0,
}
"""As the heads of the made released checkpoint."""

ALONE = r"holds only a backbone, not the teacher and the heads\. Give a run's folder"
HEADLESS = "has no attention heads: give a run of clove"
FILE_ALONE = r"only its backbone can be taken\. Found \d+ tensors"
KINDS = {
    # Of each the commands that cannot take it, and the sentence that they say.
    "run": {},
    "checkpoint": {},
    "bundle": {"pretrain": ALONE, "attention": HEADLESS},
    "local-dir": {"pretrain": ALONE, "attention": HEADLESS},
    "hub bundle": {"pretrain": ALONE, "attention": HEADLESS},
    "hub bundle at a revision": {"pretrain": ALONE, "attention": HEADLESS},
    "hub state": {},
    "released": {"attention": HEADLESS},
    "timm state dict": {"pretrain": FILE_ALONE, "attention": HEADLESS},
    "torchvision with fc": {"pretrain": FILE_ALONE, "attention": HEADLESS},
    "mmseg": {"pretrain": FILE_ALONE, "attention": HEADLESS},
    "detectron2": {"pretrain": FILE_ALONE, "attention": HEADLESS},
    "train.py of timm": {"pretrain": FILE_ALONE, "attention": HEADLESS},
    "save_for_hf": {"pretrain": ALONE, "attention": HEADLESS},
    "name of timm": {"pretrain": ALONE, "attention": HEADLESS},
    "tag of timm": {"pretrain": ALONE, "attention": HEADLESS},
    "adopted": {"pretrain": ALONE, "attention": HEADLESS},
    "random": {"pretrain": ALONE, "attention": HEADLESS},
}
COMMANDS = {
    "inspect": "inspect SOURCE",
    "to timm": "convert SOURCE --to timm --out OUT.safetensors",
    "to torchvision": "convert SOURCE --to torchvision --out OUT.pth",
    "to detectron2": "convert SOURCE --to detectron2 --out OUT.pth",
    "evaluate": "evaluate correspond --model SOURCE --data PHOTOS images=2 size=64",
    "compare": "figures compare --model SOURCE --data PHOTOS --photos 1 --size 64 --dpi 40 --out OUT.png",
    "attention": "figures attention SOURCE --data PHOTOS --photos 1 --size 64 --dpi 40 --out OUT.png",
    "mmseg": "downstream mmseg voc12aug --backbone SOURCE --out OUT",
    "torchvision": "downstream torchvision segmentation --backbone SOURCE --data STREETS --out OUT",
    "pretrain": "pretrain demo run.init_from=SOURCE",
}


@pytest.fixture(scope="module")
def sources(made_photos, tmp_path_factory) -> dict[str, str]:
    """What a user types for each kind; what is fetched lies in `cache` beside them."""
    home = tmp_path_factory.mktemp("sources")
    run, bundle, cache = home / "run", home / "bundle", home / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        assert main(["pretrain", "demo", *overrides(made_photos, run, **METHOD)]) == 0
        assert main(["export", str(run), "--out", str(bundle), "--license", "mit"]) == 0
        for to in ("mmseg", "detectron2"):
            assert main(["convert", str(bundle), "--to", to, "--out", str(home / f"{to}.pth")]) == 0
        torch.save(torchvision.models.resnet18().state_dict(), home / "torchvision.pth")
        adopt = ["adopt", str(home / "torchvision.pth"), "--as", "resnet18.my_tag", "--license", "mit"]
        assert main(adopt) == 0
    save_file(trained("resnet18").state_dict(), home / "timm.safetensors")
    save_released(home / "released.pth", "clove", released_tensors("clove"))
    model = timm.create_model("resnet18", num_classes=3)
    options = argparse.Namespace(model="resnet18", num_classes=3, mean=None, crop_pct=None, img_size=None)
    saver = CheckpointSaver(model, torch.optim.SGD(model.parameters(), 0.1), options, checkpoint_dir=home)
    saver.save_checkpoint(epoch=3, metric=71.0)
    save_for_hf(timm.create_model("resnet18", num_classes=3), home / "saved", safe_serialization=True)
    hub = cache / "hub"
    commit = fetched(hub, "acme/bundle", bundle)
    fetched(hub, "acme/state", last_checkpoint(run))
    fetched(hub, "timm/resnet18.a1_in1k", _timms(home / "timms"))
    return {
        "run": f"{run}",
        "checkpoint": f"{last_checkpoint(run)}",
        "bundle": f"{bundle}",
        "local-dir": f"local-dir:{bundle}",
        "hub bundle": "hf-hub:acme/bundle",
        "hub bundle at a revision": f"hf-hub:acme/bundle@{commit}",
        "hub state": "hf-hub:acme/state",
        "released": f"{home / 'released.pth'}",
        "timm state dict": f"{home / 'timm.safetensors'}",
        "torchvision with fc": f"{home / 'torchvision.pth'}",
        "mmseg": f"{home / 'mmseg.pth'}",
        "detectron2": f"{home / 'detectron2.pth'}",
        "train.py of timm": f"{home / 'last.pth.tar'}",
        "save_for_hf": f"{home / 'saved'}",
        "name of timm": "resnet18",
        "tag of timm": "resnet18.a1_in1k",
        "adopted": "resnet18.my_tag",
        "random": "random:resnet18",
        "cache": f"{cache}",
    }


def _timms(folder: Path) -> Path:
    """A repository as timm's own are."""
    folder.mkdir()
    save_file(timm.create_model("resnet18").state_dict(), folder / "model.safetensors")
    return folder


@pytest.fixture(autouse=True)
def _in_a_place_of_its_own(sources, tmp_path, monkeypatch, as_in_a_process_of_its_own):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", sources["cache"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", f"{sources['cache']}/hub")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_source_works_in_a_command_or_a_sentence_says_why_not(
    kind, command, sources, made_photos, streets, tmp_path, capsys
):
    words = {"SOURCE": sources[kind], "PHOTOS": f"{made_photos}", "STREETS": f"{streets}"}
    typed = []
    for word in COMMANDS[command].split():
        for name, value in words.items():
            word = word.replace(name, value)
        typed.append(re.sub("^OUT", f"{tmp_path / 'out'}", word))
    if command == "torchvision":
        typed += [f"{key}={value}" for key, value in (SEGMENTER | {"schedule.steps": 1, "run.pictures": 0}).items()]
    if command == "pretrain":
        typed += overrides(made_photos, tmp_path / "out", **METHOD)
    code = main(typed)
    said = capsys.readouterr()
    refusal = KINDS[kind].get(command)
    assert code == (0 if refusal is None else 2), said.err
    if refusal is not None:
        *_, last = said.err.splitlines()  # before it, what was found among the photos
        assert last.startswith("error: "), said.err
        assert re.search(refusal, last), said.err
    elif command == "inspect":
        assert re.search(r"architecture +resnet18, ", said.out), said.out
        assert "refused" not in said.out
