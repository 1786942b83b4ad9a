"""The parts that all commands share: arguments, help, logging, errors and exit codes.

A `Command` describes one; `execute` does everything except its work. Exit codes: 0 done, 1 failed, 2 wrong input, 75
stopped by a signal and saved, 130 interrupted, 141 the output is a closed pipe.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import select
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TextIO

from .global_state import kept_environment

FAILED, WRONG, INTERRUPTED, UNREAD = 1, 2, 128 + signal.SIGINT, 128 + signal.SIGPIPE
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
"""Environment variables in which a launcher may have put the number of this process."""
ROW = re.compile(r" *(?:\S+(?: \S+)* {2,})?")
"""The indentation and first column of a row of help; nothing of a line of prose."""
NOISY = ("httpx", "datasets", "fsspec", "PIL")
"""Loggers whose information is not about the run."""


@dataclass(frozen=True)
class Command:
    """What a command takes and does."""

    description: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    """Does the work and returns the exit code. ValueError is wrong input; FloatingPointError, OSError and
    CalledProcessError are failures."""
    settings: Callable[[Sequence[str]], str] = lambda words: ""
    """What `--help` says of the settings, given the words that were typed."""
    logs: bool = False
    """Whether the main process prints the log of all libraries with times, as long runs do, instead of warnings and
    our own words alone."""


@dataclass(frozen=True)
class Group:
    """Several commands, selected by the first word."""

    description: str
    noun: str
    """Of the members: `command`."""
    members: Mapping[str, tuple[str, Command | Group | str]]
    """A line of help, and the member or `module:NAME` to import it from when it is chosen."""


def execute(target: Command | Group | str, arguments: Sequence[str], program: str, version: str = "") -> int:
    """Run a command with the words that follow its name; return the exit code.

    Args:
        program: what was typed before the arguments.
        version: what `--version` prints; empty where there is no such option.

    Raises:
        SystemExit: as argparse for wrong arguments (2) and for `--help` (0).
    """
    words = list(arguments)
    while not isinstance(target, Command):
        if isinstance(target, str):
            module, _, name = target.partition(":")
            target = getattr(import_module(module), name)
            continue
        parser = listing(target, program)
        if version:
            parser.add_argument("--version", action="version", version=version)
        chosen = parser.parse_args(words)
        target, words = target.members[chosen.member][1], chosen.arguments
        program, version = f"{program} {chosen.member}", ""
    parser = argparse.ArgumentParser(prog=program, description=target.description, formatter_class=Wrapped)
    target.add_arguments(parser)
    with surroundings(target.logs):
        try:
            if {"-h", "--help"} & set(words):
                parser.epilog = "\n\n".join(filter(None, (parser.epilog, target.settings(words))))
            code = target.run(parser.parse_intermixed_args(words))
            sys.stdout.flush()
        except BrokenPipeError:
            if not nobody_reads(sys.stdout):
                raise
            return UNREAD
        except KeyboardInterrupt as interruption:
            print(f"\ninterrupted. {interruption}".rstrip(), file=sys.stderr)
            return INTERRUPTED
        except ValueError as error:
            tell(error)
            return WRONG
        except (FloatingPointError, OSError, subprocess.CalledProcessError) as error:
            tell(error)
            return FAILED
    return code


class Wrapped(argparse.HelpFormatter):
    """Help whose paragraphs and tables fit the terminal; argparse joins all lines, or keeps them as they are.

    Options and `hf-hub:` are not broken at their hyphens.
    """

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        rows: list[tuple[int, str]] = []  # where the second line of each begins, and its text
        for line in text.splitlines():
            column = ROW.match(line).end()  # type: ignore[union-attr]  # it matches every line
            if line and not column and rows and rows[-1][1] and not rows[-1][0]:
                rows[-1] = 0, f"{rows[-1][1]} {line}"
            else:
                rows.append((column, line))
        width = min(width, 100)
        return "\n".join(
            textwrap.fill(row, width, subsequent_indent=" " * min(column, width // 2), break_on_hyphens=False)
            for column, row in rows
        )


def listing(group: Group, program: str) -> argparse.ArgumentParser:
    """The parser that chooses a member."""
    width = max(map(len, group.members))
    lines = [f"  {name:<{width}}  {summary}" for name, (summary, _) in group.members.items()]
    parser = argparse.ArgumentParser(
        prog=program,
        description=group.description,
        epilog="\n".join([f"{group.noun}s:", *lines]),
        formatter_class=Wrapped,
    )
    noun = group.noun.upper()
    parser.add_argument("member", choices=group.members, metavar=noun, help=f"one of those below; see {noun} --help")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help=f"the {group.noun}'s own arguments")
    return parser


def user_path(text: str) -> Path:
    """A path as typed, with `~` expanded: the `type` of every path argument."""
    return Path(os.path.expanduser(text))


def require_installed(names: Sequence[str], extra: str) -> None:
    """Raise ValueError if a module is missing that this extra of clove-hub installs."""
    if absent := [name for name in names if find_spec(name) is None]:
        raise ValueError(f"{' and '.join(absent)} must be installed for this: pip install 'clove-hub[{extra}]'")


@contextmanager
def surroundings(logs: bool) -> Iterator[None]:
    """Set up logging for a command, and restore it and the environment variables afterwards."""
    root, noisy = logging.getLogger(), [logging.getLogger(name) for name in NOISY]
    own = logging.getLogger("clove_hub")
    levels = {logger: logger.level for logger in (root, own, *noisy)}
    handler = logging.StreamHandler()
    handler.addFilter(lambda record: not _prints_itself(logging.getLogger(record.name)))
    if logs:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        root.setLevel(logging.INFO if rank() == 0 else logging.WARNING)
        for logger in noisy:
            logger.setLevel(logging.WARNING)
    else:
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        own.setLevel(logging.INFO if rank() == 0 else logging.WARNING)
    root.addHandler(handler)
    try:
        with kept_environment():
            yield
    finally:
        root.removeHandler(handler)
        for logger, level in levels.items():
            logger.setLevel(level)


def _prints_itself(logger: logging.Logger) -> bool:
    """Whether a library's logger writes to the terminal already, as huggingface_hub's does."""
    own = any(type(handler) is logging.StreamHandler for handler in logger.handlers)
    return logger.parent is not None and (own or _prints_itself(logger.parent))


def rank() -> int:
    """The number of this process among those that a launcher started."""
    return next((int(os.environ[name]) for name in RANKS if os.environ.get(name, "").isdigit()), 0)


def tell(error: BaseException) -> None:
    """Prints an error on the process where it happened; all but the first process say which they are."""
    message = str(error)
    if isinstance(error, OSError) and error.strerror:
        message = ": ".join(str(part) for part in (error.filename, error.strerror) if part is not None)
    where = f" (process {rank()} on {socket.gethostname()})" if rank() else ""
    sys.stderr.write(f"error{where}: {message}\n")  # in one piece: other processes write to the same terminal


def nobody_reads(stream: TextIO) -> bool:
    """Whether it is a pipe whose other end is closed, as that of `clove-hub models | head` is; the rest is dropped."""
    pipe = select.poll()
    pipe.register(stream, 0)
    closed = any(event & select.POLLERR for _, event in pipe.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # or Python complains when it flushes at the end
    return closed
