"""The frame of every command: what it prints, exits with, sets up and puts back."""

import argparse
import dataclasses
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from patience import PATIENCE

from clove_hub import cli
from clove_hub.cli import main
from clove_hub.command import Command, Group, execute, user_path
from clove_hub.evaluation import PROTOCOLS
from clove_hub.evaluation.run import find_protocol
from clove_hub.methods import METHODS
from clove_hub.settings import notes
from clove_hub.training import recipe
from clove_hub.training.finetune.settings import SECTIONS, TASKS, read_settings
from clove_hub.training.settings import Evaluation
from clove_hub.training.transformers import settings as transformers_settings


def command(run, **changes: object) -> Command:
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--out", type=user_path)
        parser.add_argument("words", nargs="*")

    return Command("Bakes.", add_arguments, run, **changes)


def failing(error: BaseException):
    def run(options: argparse.Namespace) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("oven=cold: heat it"), 2, "error: oven=cold: heat it\n"),
        (FloatingPointError("the loss is nan"), 1, "error: the loss is nan\n"),
        (OSError(28, "No space left on device", "bread.txt"), 1, "error: bread.txt: No space left on device\n"),
        (OSError(28, "No space left on device"), 1, "error: No space left on device\n"),
        (subprocess.CalledProcessError(3, ["bake"]), 1, "error: Command '['bake']' returned non-zero exit status 3.\n"),
        (KeyboardInterrupt("Nothing was baked."), 130, "\ninterrupted. Nothing was baked.\n"),
        (KeyboardInterrupt(), 130, "\ninterrupted.\n"),
    ],
)
def test_errors_are_one_sentence_and_an_exit_code(error, code, said, capsys):
    assert execute(command(failing(error)), [], "bake") == code
    assert capsys.readouterr().err == said


def test_another_process_says_which_it_is(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert execute(command(failing(ValueError("no rye"))), [], "bake") == 2
    assert capsys.readouterr().err.startswith("error (process 3 on ")


def test_what_is_a_bug_stays_a_traceback():
    with pytest.raises(KeyError):
        execute(command(failing(KeyError("x"))), [], "bake")


@pytest.mark.parametrize(("logs", "level"), [(False, logging.WARNING), (True, logging.INFO)])
@pytest.mark.parametrize("end", [None, ValueError("x"), KeyError("x")])
def test_logging_and_environment_are_put_back(logs, level, end, capsys):
    root, noisy = logging.getLogger(), logging.getLogger("httpx")
    before = root.level, list(root.handlers), noisy.level, dict(os.environ)

    def run(options: argparse.Namespace) -> int:
        assert root.level == level
        os.environ["BREAD"] = "rye"
        logging.warning("hot")
        if end is not None:
            raise end
        return 75

    try:
        assert execute(command(run, logs=logs), [], "bake") == (75 if end is None else 2)
    except KeyError:
        assert isinstance(end, KeyError)
    assert (root.level, list(root.handlers), noisy.level, dict(os.environ)) == before
    assert capsys.readouterr().err.splitlines()[0].endswith(" hot")


def test_what_a_library_prints_itself_is_printed_once(capsys):
    library = logging.getLogger("library")  # as huggingface_hub while it retries
    own = logging.StreamHandler()
    library.addHandler(own)

    def run(options):
        logging.getLogger("library.http").warning("Retrying in 1s")
        logging.getLogger("other").warning("of another")
        return 0

    try:
        assert execute(Command(".", lambda parser: None, run, logs=True), [], "program") == 0
    finally:
        library.removeHandler(own)
    said = capsys.readouterr().err
    assert said.count("Retrying in 1s") == 1
    assert said.count("of another") == 1


def test_a_home_folder_in_a_path_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/baker")
    seen = []
    execute(command(lambda options: seen.append(options.out) or 0), ["--out=~/bread"], "bake")
    assert seen == [Path("/home/baker/bread")]


def test_words_and_options_may_be_mixed_and_groups_nest(capsys):
    seen: list[argparse.Namespace] = []
    inner = Group("Ovens.", "oven", {"stone": ("hot", command(lambda options: seen.append(options) or 0))})
    outer = Group("Bakery.", "command", {"bake": ("bakes", inner)})
    assert execute(outer, ["bake", "stone", "a", "--out", "o", "b=1"], "bakery") == 0
    assert (seen[0].words, seen[0].out) == (["a", "b=1"], Path("o"))
    with pytest.raises(SystemExit):
        execute(outer, ["bake", "stone", "--help"], "bakery")
    assert capsys.readouterr().out.startswith("usage: bakery bake stone [-h]")
    with pytest.raises(SystemExit) as left:
        execute(outer, ["bake", "gas"], "bakery")
    assert left.value.code == 2
    assert "invalid choice: 'gas'" in capsys.readouterr().err


# ---- the help of each command ------------------------------------------------------------------------------------


def leaves(group: Group, words: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The words of every command; figures has its kinds in its own room."""
    found = []
    for name, (_, target) in group.members.items():
        found += leaves(target, (*words, name)) if isinstance(target, Group) else [(*words, name)]
    return found


@pytest.mark.parametrize("words", leaves(cli.COMMANDS), ids=" ".join)
def test_every_command_has_help_that_fits_the_terminal(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as left:
        main([*words, "--help"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: clove-hub {' '.join(words)} ")
    assert not re.search(r"\w-\n +\w", said)  # hf-hub:... and clove-hub are for copying
    assert not [line for line in said.splitlines() if len(line) > 80 and " " in line.strip()]


def test_help_wraps_prose_and_tables(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "42")
    text = "breads:\n  rye    dark and sour, from Finland, for butter\n  wheat  light\n\nEat it\nwarm: it keeps for as long as you let it."
    with pytest.raises(SystemExit):
        execute(dataclasses.replace(command(lambda options: 0), description=text), ["--help"], "bake")
    assert (
        "\n\nbreads:\n  rye    dark and sour, from Finland,\n         for butter\n  wheat  light\n\n"
        "Eat it warm: it keeps for as long as you\nlet it.\n\n"
    ) in capsys.readouterr().out


def settings_of() -> dict[tuple[str, ...], dict[str, type]]:
    """For the words before --help the settings that are shown, by section."""
    found: dict[tuple[str, ...], dict[str, type]] = {}
    for name, entry in METHODS.items():
        shipped = next(one for one in recipe.shipped_recipes() if one.startswith(f"{name}_r50"))
        found["pretrain", shipped] = {"method": entry.settings, **recipe.SECTIONS, "": Evaluation}
    for name in PROTOCOLS:
        found["evaluate", name] = {"": find_protocol(name).Settings}
    for task in TASKS:
        settings = read_settings(task, [])
        found["downstream", "torchvision", task] = {name: type(getattr(settings, name)) for name in SECTIONS}
    for model, defaults in transformers_settings.DEFAULTS.items():
        kinds = {name: type(getattr(defaults, name)) for name in transformers_settings.SECTIONS}
        found["downstream", "transformers", model] = kinds
    return found


SETTINGS = settings_of()


@pytest.mark.parametrize("words", SETTINGS, ids=" ".join)
def test_help_shows_every_setting_with_type_default_and_note(words, capsys):
    with pytest.raises(SystemExit) as left:
        main([*words, "--help"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    told = " ".join(said.split())
    for section, kind in SETTINGS[words].items():
        noted = dict(notes(kind))
        for field in dataclasses.fields(kind):
            name = f"{section}.{field.name}" if section else field.name
            assert f"\n  {name}=" in said
            assert noted[field.name] in told, name


def test_help_shows_the_recipes_own_values(capsys):
    with pytest.raises(SystemExit):
        main(["pretrain", "clove_r50_in1k_50ep", "--help"])
    said = capsys.readouterr().out
    assert "method.global_scale=[0.24, 1.0]  ([float, float])" in said
    assert "schedule.epochs=50  (float)" in said


@pytest.mark.parametrize("words", [["pretrain", "clove_r50_in1k_20ep", "--help"]])
def test_help_on_what_there_is_not_says_so(words, capsys):
    assert main(words) == 2
    assert "no recipe is called 'clove_r50_in1k_20ep' (did you mean" in capsys.readouterr().err


def test_the_front_page_imports_nothing_heavy_and_launchers_have_the_same_frame(tmp_path):
    code = "import sys; from clove_hub.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\nprint([m for m in ('torch', 'numpy', 'timm', 'yaml') if m in sys.modules][:3])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert not {"torch", "numpy", "timm"} & set(done.stdout.splitlines()[-1].split("'"))
    for module, wrong in (("clove_hub.training", "no_recipe"), ("clove_hub.evaluation", "no_protocol")):
        more = ["--model", "random:test_resnet", "--data", str(tmp_path)] if "evaluation" in module else []
        command = [sys.executable, "-m", module, wrong, *more]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert (done.returncode, done.stderr[:6]) == (2, "error:"), done.stderr
