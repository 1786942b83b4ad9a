"""Licenses as the Hub spells them, `other` with its name and link included."""

from __future__ import annotations

import argparse
import difflib
import re

OTHER = "other"
LICENSES = frozenset(
    """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc
cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0
cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0
cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1
eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl
apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openmdw-1.1 openrail++ osl-3.0 postgresql ofl-1.1 ncsa
unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1
llama3.2 llama3.3 llama4 grok2-community gemma unknown other
""".split()  # noqa: SIM905
)
"""Every id that the Hub's page on licenses lists, as of 2026."""


def require_license(license: str | None, name: str | None = None, link: str | None = None) -> None:
    """Checks what a card says of its license.

    Args:
        license: one of LICENSES; None if none was chosen yet.
        name: of a license that is not among them, with `other`: an id such as `my-license-1.0`.
        link: to its text, with `other`.

    Raises:
        ValueError: it is no license of the Hub, the message names the closest one; or `other` lacks its name or link, or
            another license has them.
    """
    if license is not None and license not in LICENSES:
        near = difflib.get_close_matches(license.lower(), sorted(LICENSES), n=1)
        raise ValueError(
            f"{license!r} is not a license id of the Hub{f' (did you mean {near[0]!r}?)' if near else ''}; ids are such as "
            "mit, apache-2.0 or cc-by-nc-4.0; for any other license give --license other --license-name NAME "
            "--license-link https://..."
        )
    if license != OTHER:
        if given := [option for option, value in (("name", name), ("link", link)) if value is not None]:
            raise ValueError(
                f"--license-{given[0]} needs --license other, not {license or 'none'}: give --license "
                f"other, or leave {' and '.join(f'--license-{option}' for option in given)} out"
            )
        return
    if name is None or link is None:
        raise ValueError(
            "--license other needs --license-name with a short name such as my-license-1.0 and --license-link with the "
            "URL of its text"
        )
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name):
        written = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._")
        raise ValueError(
            f"--license-name {name}: expected lowercase letters, digits, dots and hyphens, such as {written or 'my-license-1.0'}"
        )
    if not re.fullmatch(r"https?://[^\s/]+\S*", link):
        raise ValueError(
            f"--license-link {link}: expected the URL of the license's text, https://...; a bundle holds no license "
            "file"
        )


def add_license_arguments(parser: argparse.ArgumentParser, help: str) -> None:
    """Adds --license, --license-name and --license-link to a command."""
    parser.add_argument("--license", help=help)
    parser.add_argument("--license-name", metavar="NAME", help="with --license other: a short name, my-license-1.0")
    parser.add_argument("--license-link", metavar="URL", help="with --license other: the URL of its text")
