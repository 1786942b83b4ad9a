"""From a run's folder to a bundle that timm loads bit for bit, or a refusal that says why not."""

from __future__ import annotations

import json
import logging
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import timm
import torch
import yaml
from measured import MEASURED
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from synthetic import write_checkpoint, write_run
from torch import Tensor, nn

from clove_hub.cli import main
from clove_hub.export import check_bundle, export_run
from clove_hub.export.bundle import FILES, add_results

ARCHITECTURES = ["resnet18", "resnet50", "convnext_atto"]
CLASSIFIERS = {"resnet18": "fc", "resnet50": "fc", "convnext_atto": "head.fc"}
FIRST_CONVS = {"resnet18": "conv1", "resnet50": "conv1", "convnext_atto": "stem.0"}


class Exported(NamedTuple):
    architecture: str
    run: Path
    bundle: Path
    backbone: nn.Module
    """What the run holds, built without any export."""


@pytest.fixture(scope="module", params=ARCHITECTURES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    run = tmp_path_factory.mktemp(request.param) / "run"
    backbone = write_run(run, request.param)
    return Exported(request.param, run, export_run(run), backbone)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of the smallest backbone that timm has (0.4 million parameters)."""
    write_run(tmp_path / "run", "test_resnet", steps=(10, 20))
    return tmp_path / "run"


def assert_bit_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].numpy().tobytes() == tensor.contiguous().numpy().tobytes(), name


# ---- what the bundle is ------------------------------------------------------------------------------------


def test_the_bundle_has_four_files_that_anyone_may_read_and_no_pickle(exported: Exported) -> None:
    files = sorted(exported.bundle.iterdir())
    assert [file.name for file in files] == [
        "README.md",
        "clove_hub.json",
        "config.json",
        "model.safetensors",
    ]
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o644 for file in files)
    assert stat.S_IMODE(exported.bundle.stat().st_mode) == 0o755
    with safe_open(exported.bundle / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert_bit_equal(load_file(exported.bundle / "model.safetensors"), exported.backbone.state_dict())


def test_the_config_has_exactly_the_keys_that_timm_and_transformers_take(exported: Exported) -> None:
    config = json.loads((exported.bundle / "config.json").read_text())
    cfg = config.pop("pretrained_cfg")
    assert config == {
        "architecture": exported.architecture,
        "num_classes": 0,
        "num_features": exported.backbone.num_features,
        "global_pool": "avg",
    }
    assert cfg["classifier"] == CLASSIFIERS[exported.architecture]
    assert cfg["first_conv"] == FIRST_CONVS[exported.architecture]
    assert (cfg["input_size"], cfg["pool_size"]) == ([3, 64, 64], [2, 2])  # as trained, and 1/32 of it
    assert (cfg["interpolation"], cfg["crop_pct"], cfg["crop_mode"]) == ("bicubic", 0.875, "center")
    assert (cfg["mean"], cfg["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert cfg["num_classes"] == 0
    assert cfg["license"] is None
    assert cfg["paper_ids"] == "arXiv:2310.00527"
    others = {"tag", "origin_url", "description"}
    checked = {"classifier", "first_conv", "input_size", "pool_size", "mean", "std"}
    checked |= {"interpolation", "crop_pct", "crop_mode"}
    assert cfg.keys() == {*checked, *others, "num_classes", "license", "paper_ids"}


def test_timm_builds_it_whole_and_strictly(exported: Exported) -> None:
    for kwargs in ({}, {"num_classes": 0}):
        model = timm.create_model(f"local-dir:{exported.bundle}", pretrained=True, **kwargs)
        assert_bit_equal(model.state_dict(), exported.backbone.state_dict())


def test_timm_gives_it_a_new_head_and_leaves_the_rest(exported: Exported) -> None:
    state = timm.create_model(f"local-dir:{exported.bundle}", pretrained=True, num_classes=10).state_dict()
    head = CLASSIFIERS[exported.architecture]
    assert state.pop(f"{head}.weight").shape == (10, exported.backbone.num_features)
    state.pop(f"{head}.bias")
    assert_bit_equal(state, exported.backbone.state_dict())


@pytest.mark.parametrize("kwargs", [{}, {"output_stride": 16}], ids=["stride 32", "stride 16"])
def test_timm_gives_its_feature_maps(exported: Exported, kwargs: dict[str, int]) -> None:
    image = torch.randn(2, 3, 64, 64)
    source = f"local-dir:{exported.bundle}"
    extractor = timm.create_model(source, pretrained=True, features_only=True, **kwargs).eval()
    whole = timm.create_model(exported.architecture, num_classes=0, **kwargs).eval()
    whole.load_state_dict(exported.backbone.state_dict())
    with torch.no_grad():
        last = extractor(image)[-1]
        assert last.shape[-1] == 64 // kwargs.get("output_stride", 32)
        assert torch.equal(last, whole.forward_features(image))


def test_timm_makes_it_see_gray_images(exported: Exported) -> None:
    state = timm.create_model(f"local-dir:{exported.bundle}", pretrained=True, in_chans=1).state_dict()
    first = f"{FIRST_CONVS[exported.architecture]}.weight"
    expected = dict(exported.backbone.state_dict())
    torch.testing.assert_close(state.pop(first), expected.pop(first).sum(1, keepdim=True))
    assert_bit_equal(state, expected)


def test_timm_loads_it_from_the_hub(exported: Exported, tmp_path: Path) -> None:
    """As a snapshot that the Hub's client fetched earlier, found in its cache by its commit."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshots = tmp_path / "models--somebody--weights" / "snapshots"
    snapshots.mkdir(parents=True)
    (snapshots / commit).symlink_to(exported.bundle)
    for kwargs in ({}, {"num_classes": 0}, {"num_classes": 10}, {"features_only": True}, {"in_chans": 1}):
        model = timm.create_model(f"hf-hub:somebody/weights@{commit}", pretrained=True, cache_dir=tmp_path, **kwargs)
        if not kwargs:
            assert_bit_equal(model.state_dict(), exported.backbone.state_dict())


def test_the_same_weights_give_the_same_bytes(run: Path, tmp_path: Path) -> None:
    one, two = (export_run(run, out=tmp_path / name) for name in ("one", "two"))
    for file in one.iterdir():
        assert file.read_bytes() == (two / file.name).read_bytes(), file.name


def test_provenance_says_where_the_weights_come_from_but_names_no_folder_of_the_machine(run: Path) -> None:
    bundle = export_run(run, license="mit")
    told = json.loads((bundle / "clove_hub.json").read_text())
    assert [told[key] for key in ("method", "exported", "backbone")] == ["clove", "student", "test_resnet"]
    origin = told["origin"]
    assert (origin["kind"], origin["step"]) == ("run", 20)
    assert origin["data"] == {"name": "photos", "fingerprint": "c0ffee", "images": 160}
    assert origin["recipe"]["method"] == {"name": "clove", "global_size": 64}
    assert origin["versions"] == {"clove_hub": "0.1.0", "torch": "2.6"}
    assert told["sha256"].keys() == {"model.safetensors", "config.json", "README.md"}
    for file in bundle.iterdir():
        assert b"/home/somebody" not in file.read_bytes(), file.name


@pytest.mark.parametrize("encoder", ["student", "teacher"])
def test_the_encoder_that_the_method_names_leaves(tmp_path: Path, encoder: str) -> None:
    backbone = write_run(tmp_path / "run", "test_resnet", exported=encoder)
    bundle = export_run(tmp_path / "run")
    assert_bit_equal(load_file(bundle / "model.safetensors"), backbone.state_dict())
    assert f"**Weights:** the {encoder}'s backbone" in (bundle / "README.md").read_text()


# ---- the curves ------------------------------------------------------------------------------------------------------


def write_metrics(run: Path, steps: int) -> None:
    rows = [{"step": step, "loss": 1 / step, "embedding_spread": 0.9} for step in range(1, steps + 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def curved(tmp_path: Path) -> Path:
    """The bundle of a run that has written metrics."""
    write_run(tmp_path / "run", "test_resnet")
    write_metrics(tmp_path / "run", 10)
    return export_run(tmp_path / "run")


def test_the_card_of_a_run_shows_its_curves_up_to_the_checkpoint(curved: Path, tmp_path: Path) -> None:
    assert {path.name for path in curved.iterdir()} == {*FILES, "curves.png"}
    assert "](curves.png)" in (curved / "README.md").read_text()
    assert stat.S_IMODE((curved / "curves.png").stat().st_mode) == 0o644
    write_metrics(tmp_path / "run", 20)  # the run went on; its checkpoint is of step 10
    assert (export_run(tmp_path / "run", tmp_path / "again") / "curves.png").read_bytes() == (
        curved / "curves.png"
    ).read_bytes()


def test_results_come_into_a_bundle_with_curves_and_leave_them(curved: Path) -> None:
    before = (curved / "curves.png").read_bytes()
    add_results(curved, [MEASURED])
    assert (curved / "curves.png").read_bytes() == before
    assert "](curves.png)" in (curved / "README.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: (b / "curves.png").write_bytes(b"another"), "curves.png is not what was exported"),
        (lambda b: (b / "curves.png").unlink(), "is not as exported: curves.png"),
    ],
)
def test_curves_that_were_changed_are_noticed(curved: Path, change: Callable[[Path], object], message: str) -> None:
    change(curved)
    with pytest.raises(ValueError, match=message):
        check_bundle(curved)


# ---- the card ----------------------------------------------------------------------------------------------


def front_matter(card: str) -> dict[str, object]:
    matter: dict[str, object] = yaml.safe_load(card.split("---\n")[1])
    return matter


def test_the_card_tells_what_is_known(exported: Exported) -> None:
    card = (exported.bundle / "README.md").read_text()
    assert front_matter(card) == {
        "library_name": "timm",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["timm", "transformers", "self-supervised", "clove"],
    }
    told = json.loads((exported.bundle / "clove_hub.json").read_text())
    parameters = sum(parameter.numel() for parameter in exported.backbone.parameters())
    assert told["sha256"]["model.safetensors"] in card
    assert f"Params (M): {parameters / 1e6:.3g}\n" in card
    assert "Image size: 64 x 64\n" in card
    assert f"{(exported.bundle / 'model.safetensors').stat().st_size:,} bytes" in card
    assert "**License:** not chosen yet" in card
    assert "| crop | 64 x 64 pixels, center |" in card
    assert "shorter side to 73 pixels, bicubic" in card  # 64 / 0.875, as timm rounds it
    assert "10 of 40" in card
    assert "taken before the end of the training" in card
    assert "silva2023self" in card
    assert ("--to detectron2" in card) == (exported.architecture != "convnext_atto")
    assert not re.search(r"\$\w|\bNone\b(?! is recorded)", card), "a hole in the template"


def test_the_card_of_a_finished_run_with_a_license_says_so(tmp_path: Path) -> None:
    write_run(tmp_path / "run", "test_resnet", finished=True)
    card = (export_run(tmp_path / "run", license="cc-by-nc-4.0") / "README.md").read_text()
    assert front_matter(card)["license"] == "cc-by-nc-4.0"
    assert "**License:** cc-by-nc-4.0" in card
    assert "taken before the end of the training" not in card


@pytest.fixture
def in_the_bundle(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The card, read in its folder, with a photo beside it."""
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(exported.bundle / "photo.jpg")
    monkeypatch.chdir(exported.bundle)
    yield (exported.bundle / "README.md").read_text()
    (exported.bundle / "photo.jpg").unlink()


def test_the_cards_snippets_run(in_the_bundle: str, exported: Exported) -> None:
    names: dict[str, object] = {}
    snippets = re.findall(r"```python\n(.*?)```", in_the_bundle, re.DOTALL)
    assert len(snippets) == 4
    for snippet in snippets[:3]:
        exec(snippet, own := {})  # each by itself, as a reader copies one
        names |= own
    assert names["image"].shape == (1, 3, 64, 64)
    assert names["embedding"].shape == (1, exported.backbone.num_features)
    with torch.no_grad():
        assert torch.equal(names["embedding"], exported.backbone(names["image"]))
        assert torch.equal(names["maps"][-1], exported.backbone.forward_features(names["image"]))
    assert names["classifier"](names["image"]).shape == (1, 10)


def test_the_cards_snippet_for_transformers_runs(in_the_bundle: str, exported: Exported) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    names: dict[str, object] = {}
    for snippet in re.findall(r"```python\n(.*?)```", in_the_bundle, re.DOTALL):
        exec(snippet, own := {})
        names |= own
    with torch.no_grad():
        torch.testing.assert_close(names["features"], exported.backbone.forward_features(names["image"]))


def test_the_cards_conversions_are_commands_that_work(
    in_the_bundle: str, exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To Detectron2 where it is a plain ResNet, and to transformers, where the lines that the command prints are run too."""
    commands = [command.split() for command in re.findall(r"```bash\n(.*?)\n```", in_the_bundle)]
    targets = [command[command.index("--to") + 1] for command in commands]
    assert targets == ["transformers", "detectron2"][: 1 if exported.architecture == "convnext_atto" else 2]
    for target, (program, *words, out) in zip(targets, commands, strict=True):
        assert (program, words[:2], out[:3]) == ("clove-hub", ["convert", "."], "../")
        if target == "transformers":
            pytest.importorskip("transformers", minversion="5", reason="transformers 5 is not installed")
        assert main([*words, str(tmp_path / Path(out).name)]) == 0
        said = capsys.readouterr().out
        if target == "transformers":
            exec(said[said.index("from transformers") :], names := {})
            inside = names["model"].model.backbone.model._backbone.state_dict()
            of_timm = timm.create_model(
                f"local-dir:{exported.bundle}", pretrained=True, features_only=True
            ).state_dict()
            assert_bit_equal(inside, {name: of_timm[name] for name in inside})
            assert len(inside) > len(of_timm) * 0.8


# ---- which checkpoint --------------------------------------------------------------------------------------


def step_of(bundle: Path) -> int:
    return json.loads((bundle / "clove_hub.json").read_text())["origin"]["step"]


def test_the_newest_checkpoint_leaves_unless_another_is_asked_for(run: Path, tmp_path: Path) -> None:
    assert step_of(export_run(run, out=tmp_path / "a")) == 20
    assert step_of(export_run(run, out=tmp_path / "b", checkpoint=10)) == 10
    with pytest.raises(ValueError, match=r"has no checkpoint of step 15; it has those of 10, 20"):
        export_run(run, checkpoint=15)


def flip_a_byte(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip_a_byte, r"model\.safetensors has sha256"),
        (lambda folder: (folder / "optimizer.safetensors").unlink(), r"optimizer\.safetensors is missing"),
        (lambda folder: (folder / "state.json").write_text("{"), r"state\.json cannot be read"),
        (lambda folder: (folder / "state.json").unlink(), r"state\.json cannot be read"),
        (lambda folder: (folder / "state.json").write_text('{"format": 9}'), r"format 9, expected 1"),
        (lambda folder: (folder / "state.json").write_text('{"format": 1}'), r".*lacks .*preprocessing"),
    ],
)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_with_a_warning(
    run: Path, caplog: pytest.LogCaptureFixture, damage, reason: str
) -> None:
    damage(run / "checkpoints" / "step_00000020")
    with caplog.at_level(logging.WARNING):
        assert step_of(export_run(run)) == 10
    assert re.search(rf"skipping the damaged checkpoint.*step_00000020.*{reason}", caplog.text)

    with pytest.raises(ValueError, match=reason):  # one that was asked for by name is not replaced by another
        export_run(run, checkpoint=20)


def test_a_run_with_damaged_checkpoints_only_is_refused(run: Path) -> None:
    for folder in (run / "checkpoints").iterdir():
        flip_a_byte(folder)
    with pytest.raises(ValueError, match="has 2 checkpoints and none is intact"):
        export_run(run)


def test_a_run_without_a_complete_checkpoint_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "run", "test_resnet", steps=())
    (tmp_path / "run" / "checkpoints" / ".step_00000010.partial").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "failed_00000010").mkdir()
    with pytest.raises(ValueError, match=r"has no complete checkpoint .*start its training again"):
        export_run(tmp_path / "run")


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not the folder of a run: found neither recipe\.yaml nor checkpoints/"):
        export_run(tmp_path)
    with pytest.raises(ValueError, match="is not the folder of a run: it does not exist"):
        export_run(tmp_path / "nowhere")


# ---- what does not leave -----------------------------------------------------------------------------------


def write_changed_run(run: Path, change, architecture: str = "test_resnet") -> None:
    write_run(run, "test_resnet", steps=())
    backbone = dict(timm.create_model("test_resnet", num_classes=0).state_dict())
    change(backbone)
    write_checkpoint(run / "checkpoints" / "step_00000001", backbone, architecture, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.pop("layer1.0.bn1.weight"), r"1 missing tensor \(layer1\.0\.bn1\.weight\)"),
        (lambda b: b.update({"junk": torch.ones(1)}), r"1 unexpected tensor \(junk\)"),
        (
            lambda b: b.update({"conv1.0.weight": torch.ones(3)}),
            r"mis-shaped tensor \(conv1\.0\.weight \(3,\) instead of",
        ),
        (
            lambda b: b["conv1.0.weight"].fill_(torch.nan),
            r"none is intact \(.*student\.backbone\.conv1\.0\.weight holds non-finite values",
        ),
        (
            lambda b: b.update({n: t.half() for n, t in b.items() if t.ndim == 4}),
            r"tensors of torch\.float16",
        ),
        (lambda b: b.clear(), r"holds no tensors under student\.backbone\.\*"),
    ],
)
def test_a_backbone_that_is_not_exactly_timms_does_not_leave(tmp_path: Path, change, message: str) -> None:
    write_changed_run(tmp_path / "run", change)
    with pytest.raises(ValueError, match=message):
        export_run(tmp_path / "run", out=tmp_path / "bundle")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"], "something was left behind"


def test_a_backbone_that_timm_does_not_know_is_refused_with_the_nearest_names(tmp_path: Path) -> None:
    write_changed_run(tmp_path / "run", lambda b: None, architecture="resnet_18")
    with pytest.raises(ValueError, match=r"'resnet_18' is not an architecture of timm .*did you mean .*resnet18"):
        export_run(tmp_path / "run")


@pytest.mark.parametrize("license", ["", "MIT License", "Apache-2.0"])
def test_what_is_no_license_id_is_refused(run: Path, license: str) -> None:
    with pytest.raises(ValueError, match=r"is not a license id of the Hub.*; ids are such as mit, apache-2\.0"):
        export_run(run, license=license)


# ---- where it goes -----------------------------------------------------------------------------------------


def test_a_bundle_replaces_a_bundle_and_an_empty_folder(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert step_of(export_run(run, out=tmp_path / "out", checkpoint=10)) == 10
    assert step_of(export_run(run, out=tmp_path / "out")) == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"], "something was left behind"


def test_a_folder_of_something_else_is_not_replaced(run: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds something other than a bundle \(run, thesis\.tex\).*--out"):
        export_run(run, out=tmp_path)
    bundle = export_run(run, out=tmp_path / "bundle")
    (bundle / "notes.txt").write_text("added by hand")
    with pytest.raises(ValueError, match=r"holds something other than a bundle \(notes\.txt\)"):
        export_run(run, out=bundle)
    assert (bundle / "notes.txt").exists()


def test_a_file_in_the_way_is_not_replaced(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ValueError, match=r"out is a file; give another folder with --out"):
        export_run(run, out=tmp_path / "out")
    with pytest.raises(ValueError, match=r"cannot write in .*out: .*give another folder with --out"):
        export_run(run, out=tmp_path / "out" / "bundle")


def test_a_full_disk_leaves_the_old_bundle(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = export_run(run, out=tmp_path / "out", checkpoint=10)
    write = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if path.name == "README.md":
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ValueError, match=r"cannot write .*out: No space left on device"):
        export_run(run, out=out)
    assert step_of(out) == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"], "something was left behind"


# ---- the self-check ----------------------------------------------------------------------------------------


def tamper_weights(bundle: Path) -> None:
    flip_a_byte(bundle)


def reseal(bundle: Path, *names: str) -> None:
    """Makes the sums fit again, as somebody would who changes a bundle on purpose."""
    import hashlib

    told = json.loads((bundle / "clove_hub.json").read_text())
    told["sha256"] |= {name: hashlib.sha256((bundle / name).read_bytes()).hexdigest() for name in names}
    (bundle / "clove_hub.json").write_text(json.dumps(told))


def add_junk(bundle: Path) -> None:
    path = bundle / "model.safetensors"
    save_file(load_file(path) | {"junk": torch.ones(1)}, path, metadata={"format": "pt"})
    reseal(bundle, "model.safetensors")


def add_metadata(bundle: Path) -> None:
    path = bundle / "model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt", "author": "me"})
    reseal(bundle, "model.safetensors")


def cast(bundle: Path) -> None:
    path = bundle / "model.safetensors"
    save_file({n: t.double() for n, t in load_file(path).items()}, path, metadata={"format": "pt"})
    reseal(bundle, "model.safetensors")


def add_unknown_key(bundle: Path) -> None:
    config = json.loads((bundle / "config.json").read_text())
    config["pretrained_cfg"]["clove_hub"] = 1
    (bundle / "config.json").write_text(json.dumps(config))
    reseal(bundle, "config.json")


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (tamper_weights, r"model\.safetensors is not what was exported"),
        (lambda b: (b / "config.json").write_text("{}"), r"config\.json is not what was exported"),
        (lambda b: (b / "README.md").write_text("better than all"), r"README\.md is not what was exported"),
        (
            lambda b: (b / "clove_hub.json").write_text("{}"),
            r"clove_hub\.json lacks sha256, which is not what was exported",
        ),
        (lambda b: (b / "secret.env").write_text("TOKEN="), r"expected exactly .*unexpected: secret\.env"),
        (lambda b: (b / "config.json").unlink(), r"expected exactly .*unexpected: config\.json"),
        (add_junk, r"test_resnet\): 1 unexpected tensor \(junk\)"),
        (add_metadata, r"has the metadata .*author.*, expected only format: pt"),
        (cast, r"loaded by timm as a whole, differs from its file in 90 tensors \(conv1\.0\.weight"),
        (add_unknown_key, r"timm does not load .* as a whole"),
    ],
)
def test_the_self_check_finds_what_was_tampered_with(run: Path, tamper, message: str) -> None:
    bundle = export_run(run)
    check_bundle(bundle)
    tamper(bundle)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        check_bundle(bundle)


def test_a_bundle_that_fails_its_check_is_not_left_lying_about(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_bit_off(*args: object, **kwargs: object) -> nn.Module:
        model = create_model(*args, **kwargs)
        with torch.no_grad():
            model.conv1[0].weight[0, 0, 0, 0].neg_()
        return model

    create_model = timm.create_model
    monkeypatch.setattr(timm, "create_model", one_bit_off)
    with pytest.raises(ValueError, match=r"differs from its file in 1 tensor \(conv1\.0\.weight\)"):
        export_run(run, out=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_export_says_how_to_load_it_in_lines_that_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run)]) == 0
    said = capsys.readouterr().out
    assert "test_resnet, the student of clove after step 20 of 40" in said
    code = "\n".join(line.strip() for line in said.splitlines() if line.startswith("    "))
    names: dict[str, object] = {}
    exec(code, names)
    assert len(names["maps"](torch.zeros(1, 3, 64, 64))) == 5


def test_the_command_exports_and_refuses(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(run), "--out", str(tmp_path / "out"), "--checkpoint", "10", "--license", "mit"]
    assert main(["export", *arguments]) == 0
    assert step_of(tmp_path / "out") == 10
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text()
    capsys.readouterr()
    assert main(["export", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'nowhere'} is not the folder of a run")
