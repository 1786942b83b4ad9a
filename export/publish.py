"""`clove-hub publish`: from a folder to a repository on the Hub, in steps each of which may be the last.

The repository is private until everything in it has been proved: one commit that holds all files, sums compared,
read back by a process that knows nothing, tagged. What a step has done is seen on the Hub and nowhere else, so an
interrupted publication goes on by being started again, and one that is complete changes nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal

from clove_hub.command import Command, user_path
from clove_hub.global_state import kept_generators
from clove_hub.runs import STATE_FILE
from clove_hub.weights import load
from clove_hub.weights.bundle import PROVENANCE
from clove_hub.weights.hub import explain
from clove_hub.weights.run import find_checkpoint, is_run

from .bundle import check_bundle, without_folders
from .card import Published
from .card_files import CARD, published_files
from .hub import ENDPOINT, OTHER_WEIGHTS, SAME_MODEL, Artifact, File, Remote, Repository, differences
from .license import add_license_arguments, require_license
from .others import ask, keep_card, of_others
from .read_back import clear_abandoned, read_back_in_a_fresh_process
from .state_card import render_state_card

Step = Literal["create", "commit", "compare", "read back", "tag", "look", "open"]

MADE_BY_THE_HUB = {".gitattributes"}
"""What a repository has from its first moment."""
WAITS = (1, 2, 4, 8)
"""Seconds between the looks at a repository that does not show yet what it has accepted."""


@kept_generators()
def publish(
    source: str | Path,
    repo: str,
    tag: str = "v1.0.0",
    private: bool = False,
    yes: bool = False,
    state: bool = False,
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    take_over: bool = False,
    keep_card: bool = False,
) -> str | None:
    """Publishes a bundle on the Hub; prints what that takes, and does it if `yes`.

    Args:
        source: a bundle's folder; a run's with `state`.
        repo: `organization/name`; it is made if it does not exist.
        tag: of this version. A tag is never moved.
        private: leave the repository private in the end.
        state: publish a run's full state, for continuing its pre-training, instead.
        license: of the weights, with `state`; a bundle's card names its license.
        license_name: with the license `other`: a short name, such as `my-license-1.0`.
        license_link: with the license `other`: the address of its text.
        take_over: replace or remove what somebody else has put into the repository.
        keep_card: leave its README.md as it is.

    Returns:
        The commit that holds it, once it is published; None after a dry run.

    Raises:
        ValueError: something is refused, or a step failed. The message says what was done and how to go on.

    Example:
        >>> import clove_hub
        >>> clove_hub.publish(folder / "run" / "bundle", "acme/test_resnet.clove")
        the bundle ...
        Nothing was changed. The same command with --yes does it.
    """
    if (license or license_name or license_link) and not state:
        raise ValueError("--license goes with --state; a bundle's card names its license: export again to change it")
    folder = Path(source).expanduser()
    try:
        at, terms = Published(repo, tag), (license, license_name, license_link)
        artifact = state_artifact(folder, at, *terms) if state else bundle_artifact(folder, at)
        return _publish(artifact, repo, tag, private, yes, take_over, keep_card)
    except OSError as error:  # of the client, whose messages may hold a token
        raise ValueError(explain(error)) from None


def _publish(
    artifact: Artifact, name: str, tag: str, private: bool, yes: bool, take_over: bool, card_stays: bool
) -> str | None:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        raise ValueError(f"--repo {name}: expected organization/name, such as acme/resnet50.clove_in1k_400ep")
    if not re.fullmatch(r"v\d+(\.\d+){1,2}", tag):
        raise ValueError(f"--tag {tag}: expected a version such as v1.0.0")
    repository = Repository(name)
    if yes:
        repository.require_token()
    remote = repository.look()
    if card_stays:
        artifact = keep_card(repository, remote, artifact)
    theirs = of_others(repository, remote, artifact) if remote else {}
    steps = plan(artifact, name, remote, tag, private)
    print(describe(artifact, name, remote, tag, steps, theirs))
    if theirs and not take_over:
        if yes:
            raise ValueError(f"{ask(name, theirs)}. Nothing was changed.")
        print(f"\n{ask(name, theirs)}.")
    if not steps:
        assert remote is not None
        print(f"\nAlready published: {name} holds exactly this at {remote.head}, tagged {tag}. Nothing was changed.")
        return remote.head
    if not yes:
        print("\nNothing was changed. The same command with --yes does it.")
        return None
    folder = tempfile.gettempdir()
    needed, free = sum(file.size for file in artifact.files.values()) + (16 << 20), shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"reading back takes {needed:,} bytes in {folder}, which has {free:,}: make room, or set TMPDIR to a folder "
            "that has. Nothing was changed."
        )

    for left in clear_abandoned():
        print(f"{left}: of an earlier publication that was killed while it read back; removed")
    done: list[str] = []
    commit = remote.head if remote else None
    removed = sorted(OTHER_WEIGHTS & remote.files.keys()) if remote else []
    for step in steps:
        print(f"{TELLS[step]} ...", flush=True)
        try:
            commit = _carry_out(step, repository, artifact, removed, commit, tag)
        except (ValueError, OSError) as error:
            reason = explain(error) if isinstance(error, OSError) else str(error)
            raise ValueError(f"{reason}.\n{_how_to_go_on(name, step, done)}") from None
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_how_to_go_on(name, step, done)) from None
        done.append(step)
    print(f"\nPublished: {ENDPOINT}/{name} at {commit}, tagged {tag}{', private' if private else ''}.")
    return commit


def plan(artifact: Artifact, name: str, remote: Remote | None, tag: str, private: bool) -> list[Step]:
    """The steps that are still missing, in order; none if everything is as it should be.

    Raises:
        ValueError: the tag belongs to another commit, or the repository is public already and was to be private.
    """
    if remote is None:
        steps: list[Step] = ["create", "commit", "compare", "read back", "tag", "look"]
        return steps if private else [*steps, "open"]
    if private and not remote.private:
        raise ValueError(f"{name} is public already, and --private cannot take back what was seen: leave it out")
    changed = differences(artifact, remote.files)
    tagged = remote.tags.get(tag)
    if tagged is not None and (changed or tagged != remote.head):
        major, minor, *_ = tag.split(".")
        raise ValueError(
            f"the tag {tag} of {name} is at the commit {tagged[:12]}, and "
            + (f"main differs in {', '.join(sorted(changed))}" if changed else "main has moved on since")
            + f". A tag is never moved: publish under a new one, such as --tag {major}.{int(minor) + 1}.0"
        )
    missing: list[Step] = ["commit"] if changed else []
    if tagged is None:  # it is set only after the other proofs
        missing += ["compare", "read back", "tag"]
    opens = remote.private and not private
    if missing or opens:
        missing.append("look")
    if opens:
        missing.append("open")
    return missing


def describe(
    artifact: Artifact, name: str, remote: Remote | None, tag: str, steps: list[Step], theirs: Mapping[str, str]
) -> str:
    """What would be published and what that takes, for people to read before it happens.

    Args:
        theirs: as `of_others` gives it.
    """
    changed = differences(artifact, remote.files if remote else {})
    width = max(map(len, artifact.files))
    lines = [f"{artifact.what} -> {ENDPOINT}/{name}, tag {tag}", ""]
    for path, file in artifact.files.items():
        lines.append(f"  {path:<{width}}  {file.size:>13,} bytes  sha256 {file.sha256}  {changed.get(path, 'same')}")
    if (model := artifact.model["model"]) and name.split("/")[1] != model:
        lines.append(f"  this is {model}: the zoo will not find it in a repository with another name")
    if others := sorted((remote.files if remote else {}).keys() - artifact.files.keys() - OTHER_WEIGHTS):
        lines.append(f"  left as they are: {', '.join(others)}")
    for path, difference in sorted(theirs.items()):
        lines += ["", f"  {path} is not as clove-hub wrote it:", *(f"    {line}" for line in difference.splitlines())]
    seen = "does not exist, or is hidden from you" if remote is None else "private" if remote.private else "public"
    lines += ["", f"  on the Hub: {seen}" + (f", main at {remote.head}" if remote and remote.head else "")]
    if remote and not remote.private and "commit" in steps:
        lines.append("  it is public already: the new commit can be seen from its first moment")
    return "\n".join([*lines, *(f"  {number}. {TELLS[step]}" for number, step in enumerate(steps, 1))])


TELLS: Mapping[Step, str] = {
    "create": "create the repository, private",
    "commit": "upload what is new or changed, and commit it on top of what main is now",
    "compare": "compare the sums that the Hub tells of that commit",
    "read back": "read that commit back in a fresh process with an empty cache",
    "tag": "tag that commit",
    "look": "look whether main and the tag are at that commit",
    "open": "make the repository public",
}


def _carry_out(
    step: Step, repository: Repository, artifact: Artifact, removed: Collection[str], commit: str | None, tag: str
) -> str | None:
    """One step; returns the commit that main is at after it, as far as is known.

    Args:
        removed: the files to remove.

    Raises:
        ValueError: it failed.
    """
    name = repository.name
    if step == "create":
        repository.create()
        remote = repository.look()
        if remote is None or not remote.private or remote.files.keys() - MADE_BY_THE_HUB:
            raise ValueError(f"{name} was created, but is not a new and private repository now")
        return remote.head
    if step == "commit":
        return repository.commit(artifact.files, removed, f"Publish {tag}", commit)
    assert commit is not None
    if step == "compare":
        if wrong := differences(artifact, repository.files(commit)):
            raise ValueError(f"{name} at {commit} does not hold what was sent: {', '.join(sorted(wrong))}")
    elif step == "read back":
        sums = {path: file.sha256 for path, file in artifact.files.items()}
        read_back_in_a_fresh_process(name, commit, sums, artifact.told_in == PROVENANCE)
    elif step == "tag":
        repository.tag(tag, commit)
    elif step == "look":
        _look(repository, commit, tag)
    else:
        repository.make_public()
        remote = repository.look()
        if remote is None or remote.private:
            raise ValueError(f"{name} is still private, although the Hub agreed to make it public")
    return commit


def _look(repository: Repository, commit: str, tag: str) -> None:
    """Looks until main and the tag are at the commit: the Hub may show both later than it has accepted them.

    Raises:
        ValueError: they are not, after some tries; the message says what is there.
    """
    for wait in (*WAITS, None):
        remote = repository.look()
        if remote is not None and (remote.head, remote.tags.get(tag)) == (commit, commit):
            return
        if remote is None or remote.tags.get(tag) not in (None, commit) or wait is None:
            break
        time.sleep(wait)
    name = repository.name
    if remote is None:
        raise ValueError(f"{name} is not there any more, or the token may not see it now")
    found = remote.tags.get(tag)
    if found not in (None, commit):
        raise ValueError(f"somebody else set the tag {tag} of {name}, to {found}: publish under another one with --tag")
    if remote.head != commit:
        raise ValueError(
            f"main of {name} is at {remote.head}, and {tag} was published at {commit}: somebody committed since, or the Hub "
            "does not show the commit yet"
        )
    raise ValueError(f"the Hub accepted the tag {tag} of {name} and does not show it yet: wait a minute")


def _how_to_go_on(name: str, step: Step, done: list[str]) -> str:
    return (
        f"Stopped at: {TELLS[step]}. "
        + (f"Done before: {', '.join(done)}. " if done else "Nothing had been done before. ")
        + f"{name} holds either what it held or the complete new commit. Run the same command again: it looks at what "
        "is there and goes on from that."
    )


# ---- what can be published: a bundle, or the full state of a pre-training run -----------------------------------------


def bundle_artifact(folder: Path, at: Published) -> Artifact:
    """A bundle, after it has passed its self-check, with the card that it has on the Hub.

    Raises:
        ValueError: it is no bundle, fails `check_bundle`, or its card names no license or is nothing for the Hub.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not the folder of a bundle; `clove-hub export RUN` makes one")
    if is_run(folder):
        raise ValueError(
            f"{folder} is a run: publish the bundle that `clove-hub export {folder}` makes, or the run's full state "
            "with --state"
        )
    check_bundle(folder)
    rendered = published_files(folder, at)
    told = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    return Artifact(
        what=f"the bundle {folder}",
        files={name: File(rendered.get(name, folder / name)) for name in sorted({*told["sha256"], PROVENANCE})},
        told_in=PROVENANCE,
        model={key: told.get(key) for key in SAME_MODEL},
    )


def state_artifact(
    run: Path, at: Published, license: str | None, license_name: str | None, license_link: str | None
) -> Artifact:
    """The newest whole checkpoint of a run, with a card, and without the names of the machine's folders.

    Args:
        license: of the weights, as in `require_license`.

    Raises:
        ValueError: no license was given or it is none, or as `find_checkpoint`.
    """
    if license is None:
        raise ValueError(
            "--state needs --license, for weights without a license may be used by nobody: mit, apache-2.0, "
            "cc-by-nc-4.0, ..."
        )
    require_license(license, license_name, license_link)
    found = find_checkpoint(run)
    load(found.folder)  # nobody could take the backbone from a state that is refused here
    raw = json.loads((found.folder / STATE_FILE).read_text(encoding="utf-8"))
    files = {name: File(found.folder / name) for name in found.files}
    terms = {"license": license, "license_name": license_name, "license_link": license_link}
    card = render_state_card(found, {name: file.sha256 for name, file in files.items()}, terms, at)
    told = without_folders(raw) | {"sha256": {CARD: File(card.encode()).sha256}}  # by which an edited card is known
    state = (json.dumps(told, indent=1, ensure_ascii=False) + "\n").encode()
    return Artifact(
        what=f"the state in {found.folder}",
        files=dict(sorted((files | {STATE_FILE: File(state), CARD: File(card.encode())}).items())),
        told_in=STATE_FILE,
        model={key: raw.get(key) for key in SAME_MODEL},
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=user_path, help="a bundle's folder; a run's with --state")
    parser.add_argument("--repo", required=True, metavar="ORG/NAME", help="the repository; made if it does not exist")
    parser.add_argument("--tag", default="v1.0.0", help="of this version (default: %(default)s)")
    parser.add_argument("--private", action="store_true", help="leave the repository private in the end")
    parser.add_argument("--yes", action="store_true", help="do it; without this nothing is changed")
    whole = "publish a run's full state, for continuing its pre-training, instead"
    parser.add_argument("--state", action="store_true", help=whole)
    add_license_arguments(parser, "of the weights, with --state (a bundle's card names it)")
    over = "replace or remove what somebody else has put into the repository; without --yes the differences are shown"
    parser.add_argument("--take-over", action="store_true", help=over)
    parser.add_argument("--keep-card", action="store_true", help="leave the repository's README.md as it is")


def run(options: argparse.Namespace) -> int:
    publish(**vars(options))
    return 0


PUBLISH = Command(
    "Publish a bundle on the Hub, or tell what that would do. The token comes from `hf auth login` or HF_TOKEN.",
    add_arguments,
    run,
)
