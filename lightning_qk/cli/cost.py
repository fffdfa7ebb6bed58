"""The command ``lightning-qk cost``: what the callbacks would add to a job, before it starts."""

from lightning_qk.cli._arguments import OneLineParser
from lightning_qk.inspect.documents import BadInput

_FORMS = {
    "limit": "LocAteR()",
    "variance": "LocAteR(weight)",
}
"""Form → how it is asked for."""


def run(args: list[str], prog: str) -> int:
    """Print a table.

    Returns:
        The exit status: 0.

    Raises:
        BadInput: a wrong command line, or no config.
    """
    options = parser(prog).parse(args)
    for name in ("ranks", "every", "batch", "length"):
        if getattr(options, name) < 1:
            raise BadInput(f"expected --{name} of at least 1, got {getattr(options, name)}: correct it")
    from lightning_qk.cli.inspect import quiet
    from lightning_qk.inspect.cost import CALLBACKS, FORMS, TOGETHER, Cost, Job, read_widths, step_flops

    with quiet():
        model = read_widths(options.model)
    job = Job(options.ranks, options.batch, options.length, options.sharded, options.weight_bytes)
    step = step_flops(model, job)
    print(
        f"{model.layers} layers, {model.heads} heads of {model.d_head} over {model.kv_heads} keys, width "
        f"{model.d_model}, {_short(model.parameters)} weights"
        + (f" ({_short(model.active)} a token)" if model.active != model.parameters else "")
    )
    print(
        f"{job.ranks} ranks{', weights sharded' if job.sharded else ''}, {job.batch} × {job.length} tokens "
        f"a rank: {_short(step)} flops a step and rank"
    )
    print(
        f"\n{'':<21}{'flops':>8}{'of step':>8}{'launches':>9}{'network':>9}{'calls':>6}{'to host':>8}"
        f"{'LAPACK':>8}"
    )
    average = [0.0] * len(Cost._fields)
    for name, cost_of in (CALLBACKS | {"LocAteR": FORMS[options.locater]}).items():
        cost = cost_of(model, job)
        every = 1 if name == "LocAteR" else options.every
        average = [total + part / every for total, part in zip(average, cost, strict=True)]
        print(_line(f"{name}{'' if name == 'LocAteR' else ' *'}", cost, step))
    # Of the monitors' calls one sends what all of them have.
    average[Cost._fields.index("collectives")] -= (
        (job.ranks > 1) * TOGETHER * (len(CALLBACKS) - 2) / options.every
    )
    print(_line("all, a step", Cost(*(round(part) for part in average)), step))
    print(
        f"\n*: a measured step, 1 of {options.every}. launches: calls of torch's operators.\n"
        "network: bytes that a rank sends, in so many collective calls, which monitors\n"
        "make together. to host: bytes. LAPACK: flops of eigenproblems in a thread.\n"
        f"Formulas of the code for the monitors' defaults and {_FORMS[options.locater]},\n"
        "checked against counts; none is a time."
    )
    return 0


def parser(prog: str) -> OneLineParser:
    """The options of ``lightning-qk cost``."""
    own = OneLineParser(
        prog=prog,
        description="Print what the callbacks would add to each step of a job: operations, launches, traffic. "
        "Nothing is run and no weights are read.",
        epilog=f"example: {prog} --model config.json --ranks 8 --every 50",
    )
    own.add_argument(
        "--model",
        required=True,
        metavar="CONFIG_OR_FOLDER",
        help="a model's config.json, or a folder that has one",
    )
    for name, default, text in (
        ("ranks", 1, "processes"),
        ("every", 50, "steps from one measured to the next"),
        ("batch", 1, "sequences of a rank's step"),
        ("length", 4096, "tokens of a sequence"),
    ):
        own.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{text}; default: %(default)s"
        )
    own.add_argument(
        "--locater",
        default="limit",
        choices=_FORMS,
        help="form of the penalty: that of LocAteR(), over tokens of the step, or of LocAteR(weight), of weights "
        "alone; default: %(default)s",
    )
    own.add_argument("--sharded", action="store_true", help="every rank has a part of each weight (FSDP2)")
    own.add_argument(
        "--weight-bytes", type=int, default=2, choices=(2, 4), help="bytes of a weight; default: %(default)s"
    )
    return own


def _line(name: str, cost: tuple[int, ...], step: int) -> str:
    flops, launches, network, collectives, to_host, on_host = cost
    return (
        f"{name:<21}{_short(flops):>8}{flops / step:>8.2%}{launches:>9,}{_short(network):>9}{collectives:>6,}"
        f"{_short(to_host):>8}{_short(on_host):>8}"
    )


def _short(number: float) -> str:
    """Three digits and a letter."""
    for unit in ("", "k", "M", "G", "T", "P"):
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}E"
