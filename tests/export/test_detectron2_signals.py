"""How the command that starts a training in Detectron2 ends with it; a stand-in is the training."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from clove_hub.export import seeds
from clove_hub.export.detectron2 import runs


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Ctrl-C is heard, as by a command in the foreground: what a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def stand_in(path: Path, text: str) -> str:
    """A program that is started in the place of Python; it answers to signals as Python's training does."""
    unblocked = "signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])"
    path.write_text(
        f"#!{sys.executable}\nimport os, pathlib, signal, sys, time\n{text}\n{unblocked}\ntime.sleep(1800)\n"
    )
    path.chmod(0o755)
    return str(path)


def start(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> bool:
    """`runs.train` for the first seed, with a stand-in; its folder is `folder`."""
    monkeypatch.setattr(seeds.sys, "executable", stand_in(folder / "python", text))
    return runs.train(folder / "seed_0.yaml", folder, 8)


@pytest.mark.parametrize("code", [1, 137])
def test_a_training_that_fails_is_an_error_that_names_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    told = f"pathlib.Path({str(tmp_path / 'started')!r}).write_text(' '.join(sys.argv[1:])); os._exit({code})"
    with pytest.raises(ChildProcessError, match=rf"training ended with exit code {code}.*log\.txt.*to resume from"):
        start(tmp_path, monkeypatch, told)
    started = (tmp_path / "started").read_text().split()
    assert started[:4] == ["-m", "clove_hub.export.detectron2.train_net", "--parent", str(os.getpid())]
    assert started[-4:] == ["--num-gpus", "8", "--dist-url", "auto"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_command_that_is_ended_ends_its_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    text = f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid())); os.kill(os.getppid(), {int(number)})"
    if number == signal.SIGINT:
        with pytest.raises(KeyboardInterrupt, match="stopped: run the same command again to resume"):
            start(tmp_path, monkeypatch, text)
    else:
        assert not start(tmp_path, monkeypatch, text)
    assert not Path("/proc", (tmp_path / "pid").read_text()).exists()
    assert signal.getsignal(number) == before


@pytest.mark.parametrize(("code", "stopped"), [(75, True), (0, False)])
def test_a_training_that_a_signal_ended_stops_the_command_and_one_that_is_done_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, stopped: bool
) -> None:
    (tmp_path / "scores.json").write_text("{}")
    assert start(tmp_path, monkeypatch, f"os._exit({code})") != stopped


def test_what_is_ignored_before_as_under_nohup_stays_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scores.json").write_text("{}")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert start(tmp_path, monkeypatch, "os.kill(os.getppid(), signal.SIGHUP); time.sleep(0.1); os._exit(0)")
    finally:
        signal.signal(signal.SIGHUP, before)
