"""`clove-hub evaluate`: the command and its function."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clove_hub.command import Command, rank, user_path
from clove_hub.global_state import kept_generators
from clove_hub.settings import Given, described, shown

from ..weights import SOURCE
from . import PROTOCOLS

if TYPE_CHECKING:
    from ..weights.backbone import Precision
    from .result import Record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    width = max(map(len, PROTOCOLS))
    parser.epilog = (
        "protocols (see docs/protocols):\n"
        + "\n".join(f"  {name:<{width}}  {text}" for name, text in PROTOCOLS.items())
        + "\n\nover several processes: torchrun --nproc-per-node N -m clove_hub.evaluation PROTOCOL ..."
    )
    parser.add_argument("protocol", nargs="?", metavar="PROTOCOL", help="one of those below")
    parser.add_argument(
        "--suite", metavar="SUITE", help="quick, paper or all, instead of a protocol: a report of several protocols"
    )
    parser.add_argument(
        "--model", required=True, action="append", metavar="SOURCE", help=f"{SOURCE}; may be given several times"
    )
    parser.add_argument(
        "--data",
        required=True,
        action="append",
        type=user_path,
        metavar="DIR",
        help="the folder that the protocol reads; with a suite, may be given several times",
    )
    parser.add_argument("--json", type=user_path, metavar="OUT", help="the file to write the result to")
    parser.add_argument(
        "--out", type=user_path, metavar="DIR", help="the folder of a suite's report, or of several models' results"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument(
        "--precision", default="fp32", help="precision of the forward pass: fp32 or bf16 (default: fp32)"
    )
    parser.add_argument("--device", help="cpu, cuda, ... (default: an accelerator if there is one)")
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="settings of the protocol, such as levels=[-1,-2]"
    )


def run(options: argparse.Namespace) -> int:
    from .progress import progress_shown

    if (options.protocol is None) == (options.suite is None):
        raise ValueError(f"give either a protocol ({', '.join(PROTOCOLS)}) or --suite")
    with progress_shown():
        return _run_suite(options) if options.suite else _run_protocol(options)


def _run_suite(options: argparse.Namespace) -> int:
    from .collected import markdown
    from .suite import evaluate_suite

    if options.json or options.settings:
        raise ValueError(
            "--suite has its own settings and writes its results into --out: leave out --json and key=value"
        )
    if options.out is None:
        raise ValueError("--suite needs a folder for its report: give --out DIR")
    rows = evaluate_suite(
        options.suite,
        options.model,
        options.data,
        options.out,
        seed=options.seed,
        device=options.device,
        precision=options.precision,
    )
    if rank() == 0:
        print(markdown(rows))
        print(f"\n-> {options.out / 'report.html'}, {options.out / 'report.md'}, {options.out / 'results'}")
    return 0


def _run_protocol(options: argparse.Namespace) -> int:
    from .result import check_writable, in_digits, notes, with_unit, write

    given = parse_settings(options.settings)
    if len(options.data) > 1:
        raise ValueError(
            f"{options.protocol} reads one folder, but --data names {len(options.data)}: give one, or use --suite"
        )
    if len(options.model) > 1 and options.json:
        raise ValueError("--json is the file of one result: give --out DIR for several models")
    places = [options.json] if options.json else []
    if options.out is not None:
        places = [options.out / f"{options.protocol}-{number}.json" for number in range(1, len(options.model) + 1)]
    for place in places:
        check_writable(place)
    for number, model in enumerate(options.model):
        record = evaluate(
            options.protocol,
            model,
            options.data[0],
            seed=options.seed,
            device=options.device,
            precision=options.precision,
            **given,
        )
        if rank() != 0:
            continue
        for name, value in record.metrics.items():
            deviation = f" ± {in_digits(name, record.deviations[name])}" if name in record.deviations else ""
            print(f"{with_unit(name):<16}{in_digits(name, value):>7}{deviation}")
        print(
            f"{record.model}, {record.protocol} v{record.version} by the rule {record.rule}, {record.data.samples} samples"
        )
        for note in notes(record):
            print(note)
        if places:
            write(record, places[number])
            print(f"-> {places[number]}")
    return 0


def settings(words: Sequence[str]) -> str:
    """Those of the protocol among the words."""
    from .run import find_protocol

    named = next((word for word in words if word in PROTOCOLS), None)
    if named is None:
        return "PROTOCOL --help shows the settings of a protocol."
    return f"settings of {named} (key=value):\n\n{described(find_protocol(named).Settings) or '  none'}"


EVALUATE = Command("Evaluate a backbone by a protocol.", add_arguments, run, settings)


@kept_generators()
def evaluate(
    protocol: str,
    model: str | Path,
    data: str | Path,
    *,
    seed: int = 0,
    device: str | None = None,
    precision: Precision = "fp32",
    **settings: Any,
) -> Record:
    """Evaluate a backbone by a protocol.

    Args:
        protocol: one of `clove_hub.evaluation.PROTOCOLS`.
        model: what `load_backbone` takes: a run, a bundle, `hf-hub:organization/name`, a model of timm, `random:resnet18`.
        data: the folder that the protocol reads.
        seed: random seed.
        device: an accelerator by default if there is one.
        precision: of the forward pass, `fp32` or `bf16`.
        settings: settings that differ from the protocol's defaults, by name.

    Raises:
        ValueError: the model cannot be loaded, a setting is refused, or something is wrong with the data.

    Examples:
        >>> import clove_hub
        >>> record = clove_hub.evaluate("correspond", "random:test_resnet", photos, images=2, device="cpu")
        >>> record.protocol, record.settings["images"]
        ('correspond', 2)
    """
    from ..weights import load_backbone
    from .processes import process_group
    from .run import fine_tuned, make_settings, run_protocol

    if protocol == "fcn":
        raise ValueError(fine_tuned(str(model), data, settings.get("schedule", "revisiting_voc")))
    make_settings(protocol, settings)  # wrong settings should raise before the model is fetched
    with process_group(device) as place:
        backbone = load_backbone(model, seed=seed)
        args = backbone.weights.model_args if backbone.weights else {}
        network = backbone.model.to(place)
        return run_protocol(
            protocol, network, backbone.preprocessing, data, settings, seed, backbone.name, args, precision
        )


def parse_settings(given: Sequence[str]) -> dict[str, Given]:
    """`["top_k=5", "levels=[-1, -2]"]` -> `{"top_k": "5", "levels": "[-1, -2]"}`; the last counts where a key is repeated.

    Raises:
        ValueError: one is not of the form key=value.
    """
    settings = {}
    for item in given:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise ValueError(f"{shown(item)} is not a setting; expected key=value")
        settings[key] = Given(value)
    return settings
