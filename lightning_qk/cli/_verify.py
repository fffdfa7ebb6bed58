"""``lightning-qk verify``: is what is read of a model's weights and attention what its forward computes?"""

import argparse
import inspect
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_qk._printable import one_line, print_lines, printable
from lightning_qk.cli._arguments import OneLineParser, add_opening
from lightning_qk.inspect.documents import BadInput

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lightning_qk.inspect.sources import Checkpoint
    from lightning_qk.verification.check import Verified
    from lightning_qk.verification.statistics import Agreement

_DESCRIPTION = """\
Run a model once, with its real weights in float32 on the CPU, and compare,
layer by layer:
  q, k        the queries and keys that its attention received, with W x + b as
              read from its weights
  statistics  what monitors would measure, with dense softmax in float64
Each column is the largest relative difference.

Models of text run on two pieces of text, with padding at the end of one; images
and sounds are random numbers.
"""
_EPILOG = """\
exit status: 0 every layer is verified; 1 a layer differs, or was not read or
  not compared; 2 wrong options, or a model that cannot be opened or run;
  130 interrupted.

examples:
  lightning-qk verify runs/tuned
  lightning-qk verify gpt2 --text sample.txt
  lightning-qk verify last.ckpt --json verified.json
"""
_ROWS = 2
_LEAST = 4


class Layer(NamedTuple):
    """What was found of one layer.

    Attributes:
        name: qualified name.
        label: its short name.
        weights: of its queries and keys.
        statistics: of its attention.
    """

    name: str
    label: str
    weights: "Verified"
    statistics: "Agreement"

    @property
    def ok(self) -> bool:
        """Whether both are verified."""
        return self.weights.ok and self.statistics.ok


def run(args: Sequence[str], prog: str) -> int:
    """Run the command.

    Returns:
        The exit status: 0, 1 where a layer is not verified, or 130 where it was interrupted.

    Raises:
        BadInput: wrong options, or a model that cannot be opened or run.
    """
    options = parser(prog).parse(args)
    if options.length < _LEAST:
        raise BadInput(f"expected --length of at least {_LEAST}, got {options.length}: raise it")
    # After the help, which stays quick.
    from lightning_qk.cli.inspect import naming, quiet
    from lightning_qk.inspect.export import check_targets, write_text

    check_targets([options.json])
    try:
        with quiet(), naming(options.model):
            title, facts, layers = _verify(options)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; nothing is written", file=sys.stderr)
        return 130
    if options.json is not None:
        write_text(options.json, _as_json(title, facts, layers))
    if str(options.json) != "-":
        _print(title, facts, layers)
    return 0 if all(layer.ok for layer in layers) else 1


def parser(prog: str) -> OneLineParser:
    """The options of the command."""
    own = OneLineParser(
        prog=prog,
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    own.add_argument(
        "model",
        metavar="CHECKPOINT",
        help="folder, file or name on the hub, as of `lightning-qk inspect`; of a folder of them, the newest",
    )
    own.add_argument(
        "--text", metavar="FILE", default="stdlib", help="text to run on; default: that of Python's library"
    )
    own.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="folder, name on the hub or 'bytes'; default: its own, or random tokens where it has none",
    )
    own.add_argument(
        "--length", type=int, default=32, metavar="N", help="tokens in each of two sequences (default: 32)"
    )
    own.add_argument(
        "--json", type=Path, metavar="FILE", help="all that was found, as JSON; - for standard output"
    )
    add_opening(own)
    return own


def _verify(options: argparse.Namespace) -> tuple[str, dict[str, str], list[Layer]]:
    """Open the model, run it twice, and compare."""
    from lightning_qk.inspect import Options, open_source
    from lightning_qk.inspect.skeleton import build_skeleton, fill

    how = Options(
        options.trust, options.revision, options.base, options.config, series=False, prefix=options.prefix
    )
    checkpoint = open_source(options.model, how)[-1]
    model = build_skeleton(
        checkpoint.config, trust=options.trust, tensors=checkpoint.tensors, size=checkpoint.size
    )
    from lightning_qk.heads.sites import attention_sites

    sites = [site.name for site in attention_sites(model)]
    if not sites:
        raise BadInput(
            f"expected a model with attention layers, got {checkpoint.title} ({type(model).__name__}), which "
            "has none"
        )
    weights = checkpoint.weights(model)
    weights.check_depth(sites)
    missing = fill(model, weights)
    ids, text = _tokens(model, checkpoint, options)
    batch = _inputs(model, ids, checkpoint.title)
    facts = {"model": type(model).__name__, "inputs": _described(batch, text)}
    return checkpoint.title, facts, _compare(model, batch, missing)


def _tokens(
    model: "nn.Module", checkpoint: "Checkpoint", options: argparse.Namespace
) -> "tuple[Tensor | None, str]":
    """Tokens of the text and where they are from; None for a model that takes no text or has no tokenizer."""
    from lightning_qk.inspect.text import text_blocks, tokenizer_of

    asked = options.tokenizer is not None or options.text != "stdlib"
    if "input_ids" not in inspect.signature(model.forward).parameters:
        if asked:
            raise BadInput(
                f"expected a model of text for --text or --tokenizer, got {type(model).__name__}: leave them out"
            )
        return None, ""
    try:
        tokenizer = tokenizer_of(checkpoint, options.tokenizer)
    except BadInput:
        if asked:
            raise
        return None, "random tokens"
    blocks = text_blocks(model, tokenizer, options.text, options.length, _ROWS)
    if blocks.shape[1] < _LEAST:
        raise BadInput(
            f"expected text of at least {_LEAST} tokens after --text, got {blocks.shape[1]}: pass another file"
        )
    if len(blocks) < _ROWS:
        blocks = blocks[:1].repeat(_ROWS, 1)
    return blocks[:_ROWS], "Python's library" if options.text == "stdlib" else options.text


def _inputs(model: "nn.Module", ids: "Tensor | None", title: str) -> dict[str, Any]:
    """The first arguments that the model takes."""
    from lightning_qk.verification.inputs import InputMaker, first_that_runs

    batch, error = first_that_runs(model, InputMaker(model, ids=ids).candidates(), seconds=600)
    if batch is None:
        why = "none is known for its forward" if error is None else f"its forward raises: {one_line(error)}"
        raise BadInput(
            f"expected a model that runs on text, images or sound, got {title} ({type(model).__name__}; "
            f"{why}): call lightning_qk.verify(model, batch) with a batch of its own"
        )
    return batch


def _described(batch: dict[str, Any], text: str) -> str:
    """The model's inputs in words."""
    shapes = {name: tuple(value.shape) for name, value in batch.items() if hasattr(value, "shape")}
    shown = ", ".join(f"{name} {'×'.join(map(str, shape))}" for name, shape in shapes.items())
    return f"{shown} ({text})" if "input_ids" in shapes else shown


def _compare(model: "nn.Module", batch: dict[str, Any], missing: Sequence[str]) -> list[Layer]:
    from lightning_qk.heads.reader import ProjectionReader
    from lightning_qk.verification.check import unchecked
    from lightning_qk.verification.model import verify
    from lightning_qk.verification.statistics import Agreement, check_statistics

    reader = ProjectionReader(model, allow_empty=True)
    weights = verify(model, batch)
    heads = {name: plan.heads for name, plan in reader.layers.items()}
    statistics = check_statistics(model, batch, heads)
    uncalled = Agreement(math.nan, "its attention was not called")
    names = list(dict.fromkeys([*weights, *statistics]))
    labels = reader.labels
    layers = []
    for name in names:
        own = weights.get(name) or unchecked("its attention layer was not found")
        lacking = [tensor for tensor in missing if tensor.startswith(f"{name}." if name else "")]
        if lacking:
            own = unchecked(f"the checkpoint lacks {lacking[0]!r}, which was taken for zero")
        layers.append(Layer(name, labels[name], own, statistics.get(name, uncalled)))
    return layers


def _as_json(title: str, facts: dict[str, str], layers: Sequence[Layer]) -> str:
    from lightning_qk._version import __version__

    return (
        json.dumps(
            {
                "version": __version__,
                "checkpoint": title,
                **facts,
                "verified": all(layer.ok for layer in layers),
                "layers": [
                    {
                        "label": layer.label,
                        "name": layer.name,
                        "verified": layer.ok,
                        "weights": {
                            "status": layer.weights.status.value,
                            "query": _number(layer.weights.query),
                            "key": _number(layer.weights.key),
                            "reason": layer.weights.reason,
                        },
                        "statistics": {
                            "verified": layer.statistics.ok,
                            "error": _number(layer.statistics.error),
                            "reason": layer.statistics.reason,
                        },
                    }
                    for layer in layers
                ],
            },
            allow_nan=False,
        )
        + "\n"
    )


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _print(title: str, facts: dict[str, str], layers: Sequence[Layer]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from lightning_qk.architecture.labels import shorten

    console = Console()
    table = Table(title=escape(printable(f"{title} ({facts['model']})")), header_style="bold")
    table.add_column("layer", overflow="fold")
    for head in ("q", "k", "statistics"):
        table.add_column(head, justify="right")
    table.add_column("verdict")
    for layer in layers:
        errors = (layer.weights.query, layer.weights.key, layer.statistics.error)
        cells = [f"{error:.1e}" if math.isfinite(error) else "-" for error in errors]
        colour = "green" if layer.ok else "red"
        table.add_row(escape(layer.label), *cells, f"[{colour}]{_verdict(layer)}[/]")
    console.print(table)
    count = len(layers)
    lines = [
        f"Run on {facts['inputs']}",
        *(f"{shorten(labels)}: {reason}" for reason, labels in _reasons(layers).items()),
        f"q and k verified on {sum(layer.weights.ok for layer in layers)} of {count} layers, statistics on "
        f"{sum(layer.statistics.ok for layer in layers)} of {count}",
    ]
    print_lines(console, lines)


def _verdict(layer: Layer) -> str:
    """One or two words, the worst first."""
    from lightning_qk.verification.check import Status

    if layer.ok:
        return layer.weights.status.value
    wrong = not layer.statistics.ok and math.isfinite(layer.statistics.error)
    return "differs" if wrong or layer.weights.status is Status.DIFFERS else "not checked"


def _reasons(layers: Sequence[Layer]) -> dict[str, list[str]]:
    """What is not verified → the layers."""
    found: dict[str, list[str]] = {}
    for layer in layers:
        if not layer.weights.ok:
            found.setdefault(f"q and k: {_plain(layer.weights.reason)}", []).append(layer.label)
        if not layer.statistics.ok:
            found.setdefault(f"statistics: {_plain(layer.statistics.reason)}", []).append(layer.label)
    return found


def _plain(reason: str) -> str:
    """Without the numbers, which the table has, so that layers share it."""
    return re.sub(r": the largest difference .*| by [0-9.e+-]+$", "", reason)
