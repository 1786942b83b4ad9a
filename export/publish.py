"""`clove-hub publish`: from a folder to a repository on the Hub, in steps that can be interrupted.

The repository is private until everything in it is verified: one commit that holds all files, checksums compared, read
back in a fresh process, tagged. The state of a publication is read only from the Hub, so an interrupted one resumes
when it is started again, and a complete one changes nothing.
"""

from __future__ import annotations

import argparse
import re
import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal

from clove_hub.command import Command, user_path
from clove_hub.global_state import kept_generators
from clove_hub.weights.finetuned import is_finetuned
from clove_hub.weights.hub import explain
from clove_hub.weights.run import is_run

from .artifacts import bundle_artifact, state_artifact
from .card import Published
from .finetuned import finetuned_artifact
from .hub import ENDPOINT, Artifact, Remote, Repository, differences
from .license import add_license_arguments
from .read_back import clear_interrupted, read_back_in_a_fresh_process
from .take_over import MADE_BY_THE_HUB, Meeting, beside, meet

Step = Literal["create", "commit", "compare", "read back", "tag", "look", "open"]


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
    take_over: str | None = None,
    keep_card: bool = False,
    remove: Collection[str] = (),
) -> str | None:
    """Print the steps to publish a bundle on the Hub, and carry them out if `yes`.

    Args:
        source: the folder of a bundle or of an exported fine-tuned model; a run's with `state`.
        repo: `organization/name`; it is created if it does not exist.
        tag: the version's tag. A tag is never moved.
        private: keep the repository private.
        yes: publish; otherwise only print what would be done.
        state: publish a run's full state instead, for continuing its pre-training.
        license: license of the weights, with `state`; a bundle's card names its license.
        license_name: with the license `other`: a short name, such as `my-license-1.0`.
        license_link: with the license `other`: the URL of its text.
        take_over: a commit whose files, which others wrote, may be replaced as the dry run showed.
        keep_card: keep a card that others wrote or edited.
        remove: files that others added and that are to be removed from the repository.

    Returns:
        The published commit; None after a dry run.

    Raises:
        ValueError: something is refused, or a step failed. The message says what was done and how to continue.

    Examples:
        >>> import clove_hub
        >>> clove_hub.publish(folder / "run" / "bundle", "acme/test_resnet.clove")
        the bundle ...
        Nothing was changed. The same command with --yes does it.
    """
    if (license or license_name or license_link) and not state:
        raise ValueError("--license needs --state; a bundle's card names its license: export again to change it")
    folder = Path(source).expanduser()
    try:
        at, terms = Published(repo, tag), (license, license_name, license_link)
        if state:
            artifact = state_artifact(folder, at, *terms)
        elif is_finetuned(folder) and not is_run(folder):
            artifact = finetuned_artifact(folder, at)
        else:
            artifact = bundle_artifact(folder, at)
        return _publish(artifact, repo, tag, private, yes, take_over, keep_card, remove)
    except OSError as error:  # from the client, whose messages may contain a token
        raise ValueError(explain(error)) from None


def _publish(
    artifact: Artifact,
    name: str,
    tag: str,
    private: bool,
    yes: bool,
    take_over: str | None,
    keep_card: bool,
    remove: Collection[str],
) -> str | None:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        raise ValueError(f"--repo {name}: expected organization/name, such as acme/resnet50.clove_in1k_400ep")
    if not re.fullmatch(r"v\d+(\.\d+){1,2}", tag):
        raise ValueError(f"--tag {tag}: expected a version such as v1.0.0")
    if ours := sorted(set(remove) & artifact.files.keys()):
        raise ValueError(
            f"--remove {' '.join(ours)}: part of what is published; --remove takes only files that others added"
        )
    repository = Repository(name)
    if yes:
        repository.require_token()
    remote = repository.look()
    met = meet(repository, remote, artifact, take_over, keep_card) if remote else Meeting(artifact)
    artifact = met.artifact
    removed = sorted(set(remove) & (remote.files if remote else {}).keys())
    steps = plan(artifact, name, remote, tag, private, removed)
    print(describe(met, name, remote, tag, steps, removed))
    if met.refusal:
        raise ValueError(f"{met.refusal}. Nothing was changed.")
    if not steps:
        assert remote is not None
        print(f"\nAlready published: {name} holds exactly this at {remote.head}, tagged {tag}. Nothing was changed.")
        return remote.head
    if not yes:
        print("\nNothing was changed. The same command with --yes does it.")
        return None
    clear_interrupted()
    folder = tempfile.gettempdir()
    needed, free = sum(file.size for file in artifact.files.values()) + (16 << 20), shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"reading back needs {needed:,} bytes in {folder}, which has {free:,} free: make room, or set TMPDIR to "
            "another folder. Nothing was changed."
        )

    done: list[str] = []
    commit = before = remote.head if remote else None
    for step in steps:
        print(f"{TELLS[step]} ...", flush=True)
        try:
            commit = _carry_out(step, repository, artifact, commit, before, tag, removed)
        except (ValueError, OSError) as error:
            reason = explain(error) if isinstance(error, OSError) else str(error)
            raise ValueError(f"{reason}.\n{_how_to_go_on(name, step, done)}") from None
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_how_to_go_on(name, step, done)) from None
        done.append(step)
    print(f"\nPublished: {ENDPOINT}/{name} at {commit}, tagged {tag}{', private' if private else ''}.")
    return commit


def plan(
    artifact: Artifact, name: str, remote: Remote | None, tag: str, private: bool, removed: Sequence[str]
) -> list[Step]:
    """The steps that are still missing, in order; none if the publication is complete.

    Args:
        removed: existing files to remove.

    Raises:
        ValueError: the tag belongs to another commit, or the repository is already public and `private` was given.
    """
    if remote is None:
        steps: list[Step] = ["create", "commit", "compare", "read back", "tag", "look"]
        return steps if private else [*steps, "open"]
    if private and not remote.private:
        raise ValueError(f"{name} is already public, and --private does not make it private again: leave --private out")
    changed = differences(artifact, remote.files).keys() | set(removed)
    tagged = remote.tags.get(tag)
    if tagged is not None and (changed or tagged != remote.head):
        major, minor, *_ = tag.split(".")
        raise ValueError(
            f"the tag {tag} of {name} is at the commit {tagged[:12]}, but "
            + (f"these files have changed: {', '.join(sorted(changed))}" if changed else "main is at another commit")
            + f". A tag is never moved: publish under a new one, such as --tag {major}.{int(minor) + 1}.0"
        )
    missing: list[Step] = ["commit"] if changed else []
    if tagged is None:  # it is set only after the other checks
        missing += ["compare", "read back", "tag"]
    opens = remote.private and not private
    if missing or opens:
        missing.append("look")
    if opens:
        missing.append("open")
    return missing


def describe(
    met: Meeting, name: str, remote: Remote | None, tag: str, steps: list[Step], removed: Sequence[str]
) -> str:
    """Describe, before publication, what would be published and by which steps."""
    artifact = met.artifact
    changed = differences(artifact, remote.files if remote else {}) | dict(met.fates)
    width = max(map(len, artifact.files))
    lines = [f"{artifact.what} -> {ENDPOINT}/{name}, tag {tag}", ""]
    for path, file in artifact.files.items():
        lines.append(f"  {path:<{width}}  {file.size:>13,} bytes  sha256 {file.sha256}  {changed.get(path, 'same')}")
    if (model := artifact.model["model"]) and name.split("/")[1] != model:
        lines.append(f"  this is {model}: the zoo finds it only in a repository of that name")
    harmful = {file: harm for file, harm in beside(artifact, remote).items() if file not in removed}
    if others := sorted((remote.files if remote else {}).keys() - artifact.files.keys() - {*removed, *harmful}):
        lines.append(f"  kept: {', '.join(others)}")
    lines += [f"  kept: {file}, {harm} (to remove it: --remove {file})" for file, harm in harmful.items()]
    lines += [f"  removed: {file}" for file in removed]
    lines += ["", *met.shown] if met.shown else []
    seen = (
        "does not exist, or you have no access to it" if remote is None else "private" if remote.private else "public"
    )
    lines += ["", f"  on the Hub: {seen}" + (f", main at {remote.head}" if remote and remote.head else "")]
    if remote and not remote.private and "commit" in steps:
        lines.append("  it is already public: the new commit is visible at once")
    return "\n".join([*lines, *(f"  {number}. {TELLS[step]}" for number, step in enumerate(steps, 1))])


TELLS: Mapping[Step, str] = {
    "create": "create the repository, private",
    "commit": "upload the new and changed files, and commit them on top of main",
    "compare": "compare the checksums that the Hub reports for that commit",
    "read back": "read that commit back in a fresh process with an empty cache",
    "tag": "tag that commit",
    "look": "check that main and the tag are at that commit",
    "open": "make the repository public",
}


def _carry_out(
    step: Step,
    repository: Repository,
    artifact: Artifact,
    commit: str | None,
    before: str | None,
    tag: str,
    removed: Sequence[str],
) -> str | None:
    """Carry out one step; return the commit of main after it, as far as known.

    Args:
        commit: the commit of main, as far as known.
        before: the commit of main when this publication started.

    Raises:
        ValueError: it failed.
    """
    name = repository.name
    if step == "create":
        repository.create()
        remote = repository.look_until(lambda remote: remote is not None)
        if remote is None:
            raise ValueError(f"{name} was created, but the Hub does not show it yet")
        if not remote.private or remote.files.keys() - MADE_BY_THE_HUB:
            raise ValueError(f"{name} was created, but is no longer empty and private: somebody else changed it")
        return remote.head
    if step == "commit":
        return repository.commit(artifact.files, removed, f"Publish {tag}", commit)
    assert commit is not None
    if step == "compare":
        if wrong := differences(artifact, repository.files(commit)):
            raise ValueError(f"{name} at {commit} differs from what was sent in {', '.join(sorted(wrong))}")
    elif step == "read back":
        sums = {path: file.sha256 for path, file in artifact.files.items()}
        read_back_in_a_fresh_process(name, commit, sums, artifact.library)
    elif step == "tag":
        repository.tag(tag, commit)
    elif step == "look":
        _require_shown(repository, commit, before, tag)
    else:
        repository.make_public()
        remote = repository.look_until(lambda remote: remote is not None and not remote.private)
        if remote is None or remote.private:
            raise ValueError(f"{name} is still private, although the Hub accepted the request to make it public")
    return commit


def _how_to_go_on(name: str, step: Step, done: list[str]) -> str:
    return (
        f"Stopped at: {TELLS[step]}. "
        + (f"Done before it: {', '.join(done)}. " if done else "Nothing was done before it. ")
        + f"{name} holds either its previous content or the complete new commit. Run the same command again: it continues "
        "from what is on the Hub."
    )


def _require_shown(repository: Repository, commit: str, before: str | None, tag: str) -> None:
    """Raise ValueError unless the Hub shows main and the tag at a commit, now or shortly after."""
    late = {before, None}

    def settled(remote: Remote | None) -> bool:
        if remote is None:
            return False
        at = remote.head, remote.tags.get(tag)
        return at == (commit, commit) or at[0] not in {commit, *late} or at[1] not in (commit, None)

    remote = repository.look_until(settled)
    head, tagged = (remote.head, remote.tags.get(tag)) if remote else (None, None)
    if (head, tagged) == (commit, commit):
        return
    found = f"expected main and {tag} at {commit}, found main at {head} and {tag} at {tagged}"
    if settled(remote):
        raise ValueError(f"somebody else changed {repository.name} in the meantime: {found}")
    raise ValueError(f"the Hub does not show the change yet, which can take a minute: {found}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=user_path,
        help="the folder of a bundle or of an exported fine-tuned model; with --state, of a run",
    )
    parser.add_argument(
        "--repo", required=True, metavar="ORG/NAME", help="the repository; created if it does not exist"
    )
    parser.add_argument("--tag", default="v1.0.0", help="the version's tag (default: %(default)s)")
    parser.add_argument("--private", action="store_true", help="keep the repository private")
    agreed = "replace what others created or changed, as shown for this commit"
    parser.add_argument("--take-over", metavar="COMMIT", help=agreed)
    kept = "keep a card that others wrote or edited"
    parser.add_argument("--keep-card", action="store_true", help=kept)
    parser.add_argument(
        "--remove", nargs="+", default=(), metavar="FILE", help="remove these files, which others added"
    )
    parser.add_argument("--yes", action="store_true", help="publish; without this, nothing is changed")
    whole = "publish a run's full state instead, for continuing its pre-training"
    parser.add_argument("--state", action="store_true", help=whole)
    add_license_arguments(parser, "license of the weights, with --state (a bundle's card names it)")


def run(options: argparse.Namespace) -> int:
    publish(**vars(options))
    return 0


PUBLISH = Command(
    "Publish a bundle on the Hub, or show what that would do. The token comes from `hf auth login` or HF_TOKEN.",
    add_arguments,
    run,
)
