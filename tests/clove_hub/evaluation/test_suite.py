"""`clove-hub evaluate --suite`: what is measured of which data, the report, and going on from what is there."""

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import scenes
import torch
from starting import saved

from clove_hub import evaluate, load_backbone
from clove_hub.cli import main
from clove_hub.evaluation import suite as module
from clove_hub.evaluation.result import read

QUICK = {
    "correspond": [{"images": 4, "size": 64}],
    "dense-probe": [{"height": 64, "width": 64, "epochs": 1, "seeds": 2}],
    "retrieve": [{"regions": 3}],
    "propagate": [{"frames": 3}],
    "knn": [{}],
}


@pytest.fixture
def folders(tmp_path, monkeypatch, photos) -> list[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(module.SUITES, "quick", QUICK)
    monkeypatch.setattr(module, "RANDOM_SEEDS", 2)
    masks = scenes.segmented_images(tmp_path / "streets", size=(64, 96))
    clips = scenes.moving_clips(tmp_path / "clips", clips=1, frames=4)
    return [masks, clips, photos]


def command(folders: list[Path], out: Path, *models: object, suite: str = "quick") -> list[str]:
    data = [word for folder in folders for word in ("--data", str(folder))]
    named = [word for model in models for word in ("--model", str(model))]
    return ["evaluate", "--suite", suite, *named, *data, "--out", str(out), "--device", "cpu"]


class Page(HTMLParser):
    """Words of a page; fails where tags do not close as they opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img", "!doctype"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data.strip())


def test_models_stand_beside_random_ones_in_one_report(folders, tmp_path, capsys, monkeypatch):
    trained, out = saved(tmp_path / "trained|odd", "test_resnet"), tmp_path / "report"
    assert main(command(folders, out, trained, "random:test_vit")) == 0
    printed = capsys.readouterr().out
    assert f"-> {out / 'report.html'}" in printed
    text = (out / "report.md").read_text()
    page = Page((out / "report.html").read_text())
    for told in (text, " ".join(page.words)):
        for protocol in ("correspond", "dense-probe", "retrieve", "propagate"):
            assert f"{protocol} (version" in told
        assert "knn: none of the folders has what it reads." in told
        assert "random:test_resnet" in told
        assert "random:test_vit" in told
        assert "±" in told
        assert "2 of random weights" in told
        assert "seeds of a probe are not seeds of pre-training" in told
        assert "Seconds: " in told
        assert "height=64" in told
    assert "By class (" in " ".join(page.words)
    assert "By object (" in " ".join(page.words)
    records = [read(path) for path in (out / "results").rglob("*.json")]
    measured = {(one.protocol, one.model, one.seeds[0]) for one in records}
    for protocol in ("correspond", "dense-probe"):
        assert {(protocol, "random:test_resnet", seed) for seed in (0, 1)} < measured
    assert (
        main(["results", str(out / "results/random_test_vit")]) == 0
    )  # the command that puts them into a card reads them
    told = capsys.readouterr().out
    assert "random:test_vit" in told
    assert "random:test_resnet" not in told

    def never(*_, **__):
        raise AssertionError("measured again")

    monkeypatch.setattr(module, "run_protocol", never)
    assert main(command(folders, out, trained, "random:test_vit")) == 0  # goes on from what is there


def test_what_a_model_refuses_is_in_the_report_and_the_rest_goes_on(folders, tmp_path, capsys, monkeypatch):
    run = module.run_protocol

    def refuses(protocol, *rest):
        if protocol == "retrieve":
            raise ValueError("it has no regions <of> any kind")
        return run(protocol, *rest)

    monkeypatch.setattr(module, "run_protocol", refuses)
    out = tmp_path / "report"
    assert main(command(folders[:1], out, "random:test_resnet")) == 0
    assert "retrieve of random:test_resnet: it has no regions <of> any kind." in (out / "report.md").read_text()
    assert "it has no regions &lt;of&gt; any kind" in (out / "report.html").read_text()
    monkeypatch.setitem(module.SUITES, "quick", {"retrieve": [{}]})
    assert main(command(folders[:1], tmp_path / "none", "random:test_resnet")) == 2
    assert "nothing could be measured: retrieve of random:test_resnet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda words: [words[0], "knn", *words[1:]], "give either a protocol"),
        (lambda words: [w for w in words if w not in ("--suite", "quick")], "give either a protocol"),
        (lambda words: [*words, "--json", "a.json"], "leave out --json"),
        (lambda words: words[: words.index("--out")], "give --out DIR"),
        (
            lambda words: ["quickly" if w == "quick" else w for w in words],
            "no suite 'quickly': choose one of quick, paper, all",
        ),
        (lambda words: [*words, "--data", "absent"], "the data absent is not a folder"),
        (lambda words: ["paper" if w == "quick" else w for w in words], "no protocol of the suite paper reads"),
    ],
)
def test_what_is_wrong_is_said(change, expected, photos, tmp_path, capsys):
    assert main(change(command([photos], tmp_path / "out", "random:test_resnet"))) == 2
    assert expected in capsys.readouterr().err


def test_one_protocol_of_several_models(folders, tmp_path, capsys):
    words = [
        "evaluate",
        "correspond",
        "--model",
        "random:test_resnet",
        "--model",
        "random:test_vit",
        "--data",
        str(folders[2]),
    ]
    assert main([*words, "images=2", "size=64", "--out", str(tmp_path / "both"), "--device", "cpu"]) == 0
    assert {read(path).model for path in (tmp_path / "both").iterdir()} == {"random:test_resnet", "random:test_vit"}
    assert main([*words, "--json", "one.json"]) == 2
    assert "give --out DIR" in capsys.readouterr().err


def test_bf16_gives_nearly_the_same_and_is_recorded(photos, capsys):
    settings = {"images": 6, "size": 64, "device": "cpu"}
    plain = evaluate("correspond", "random:test_resnet", photos, **settings)
    mixed = evaluate("correspond", "random:test_resnet", photos, precision="bf16", **settings)
    assert "precision" not in plain.preprocessing
    assert mixed.preprocessing["precision"] == "bf16"
    backbone = load_backbone("random:test_resnet")
    exact, near = (replace(backbone, precision=one).pooled(torch.ones(1, 3, 64, 64)) for one in ("fp32", "bf16"))
    assert near.dtype == exact.dtype == torch.float32
    assert 1e-5 < float((near - exact).norm() / exact.norm()) < 0.05
    assert mixed.metrics["correspond"] == pytest.approx(plain.metrics["correspond"], abs=8)
    words = ["evaluate", "correspond", "--model", "random:test_resnet", "--data", str(photos), "--precision", "fp8"]
    assert main(words) == 2
    assert "precision is 'fp8'; expected fp32 or bf16" in capsys.readouterr().err
