"""The ready configs: one folder, ``configs/`` in a clone and ``lightning_qk/configs`` where it is installed."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from lightning_qk._printable import did_you_mean
from lightning_qk.cli._arguments import OneLineParser
from lightning_qk.inspect.documents import BadInput


def parser(prog: str) -> OneLineParser:
    """The options of ``lightning-qk configs``."""
    own = OneLineParser(
        prog=prog,
        description="List the configs that come with the package, or print one, to edit a copy of it.",
        epilog=f"example: {prog} quickstart > job.yaml; lightning-qk fit --config job.yaml",
    )
    own.add_argument("name", metavar="NAME", nargs="?", help="config to print; without it all are listed")
    return own


def run(args: Sequence[str], prog: str) -> int:
    """List the configs of the package, or print one.

    Returns:
        The exit status: 0.

    Raises:
        BadInput: there is no such config.
    """
    given = parser(prog).parse(args).name
    known = names()
    if given is None:
        width = max(map(len, known))
        print(f"in {folder()}:")
        for name in known:
            print(_entry(name, describe(name), width + 1))
        return 0
    given = given.removesuffix(".yaml")
    if given not in known:
        hint = did_you_mean(given, known)
        raise BadInput(f"expected a config out of {', '.join(known)}, got {given!r}{hint}")
    print((folder() / f"{given}.yaml").read_text(encoding="utf-8"), end="")
    return 0


def folder() -> Path:
    """Folder of the configs: in the package of a wheel (setup.py puts them there), else beside it."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def names() -> list[str]:
    """Names of the configs, without ``.yaml``."""
    return sorted(path.stem for path in folder().glob("*.yaml"))


def describe(name: str) -> str:
    """What a config is for: the first sentence of the comment on top of it."""
    with (folder() / f"{name}.yaml").open(encoding="utf-8") as file:
        return file.readline().lstrip("# ").split(". ")[0].rstrip(".:\n")


def resolve(given: str) -> str:
    """The path of a config.

    Args:
        given: a file, or one of :func:`names`, with ``.yaml`` or without. A file goes first. YAML itself, which
            jsonargparse takes too, is passed on.

    Raises:
        BadInput: no such file or config.
    """
    path = Path(given)
    if path.is_file():
        _check_text(path)
        return given
    if any(mark in given for mark in ":{\n"):
        return given
    name = given.removesuffix(".yaml")
    if name in names():
        return str(folder() / f"{name}.yaml")
    if path.is_dir():
        raise BadInput(f"expected a config file, got the folder {given}: name a file in it")
    hint = did_you_mean(given, _near(path)) or "; correct it"
    raise BadInput(
        f"expected a config file or one of the package's ({', '.join(names())}), got no such file: {given}{hint}"
    )


def _check_text(path: Path) -> None:
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise BadInput(f"expected a config in UTF-8, got another kind of file: {path}; correct it") from None
    except OSError as error:
        raise BadInput(
            f"expected a config that may be read, got {path} ({error.strerror}); mend its permissions"
        ) from None


def _near(path: Path) -> list[str]:
    """Suggestions for a name: the package's configs, and files of the same folder."""
    try:
        files = [str(other) for other in path.parent.glob("*.y*ml")]
    except OSError:
        files = []
    return [*names(), *files]


def resolve_arguments(args: Sequence[str]) -> list[str]:
    """The command line with the values of ``--config`` and ``-c`` as paths.

    Raises:
        BadInput: there is no such config.
    """
    out = list(args)
    for place, arg in enumerate(out):
        if arg in ("--config", "-c") and place + 1 < len(out) and not out[place + 1].startswith("-"):
            out[place + 1] = resolve(out[place + 1])
        elif arg.startswith("--config="):
            out[place] = "--config=" + resolve(arg.removeprefix("--config="))
    return out


_WHAT = {
    "fit": "Train a model, validate it on the way, and leave a report.",
    "validate": "Evaluate a model on the validation data of a job.",
    "test": "Evaluate a model on the test data of a job.",
    "predict": "Run a model over the test data of a job, a row for each input, into a file.",
}
# Name and meaning of the options that are needed most.
_MODEL = (
    ("--model.model NAME", "a folder or a name on the Hugging Face hub"),
    ("--model.model.FIELD X", "a field of the model's config (n_layer, hidden_size, ...): random weights"),
    ("--model.task TASK", "causal_lm, masked_lm, sequence_classification or image_classification"),
    ("--model.lr X", "peak learning rate"),
)
_DATA = (
    ("--data.source SOURCE", "text, csv, tsv, json or parquet files, a data set on the hub, or stdlib"),
    ("--data.tokenizer NAME", "bytes, words, a folder or a name on the hub; default: the model's own"),
    ("--data.batch_size N", "rows a batch, on each device"),
)
_TRAINER = (
    ("--trainer.max_steps N", "end after so many steps"),
    ("--trainer.log_every_n_steps N", "how often the monitors look"),
    ("--trainer.accelerator NAME", "auto, cpu, cuda, ..."),
    ("--NAME.ARGUMENT X", "an argument of a callback of the config, such as --locater.weight 0.01"),
    ("--trainer.callbacks+=CLASS", "one callback more, such as lightning_qk.CollapseGuard"),
)
_EXAMPLES = {
    "fit": (
        "--config quickstart",
        "--config finetune_classification --data.source train.tsv --model.lr 1e-4",
        "--config job.yaml --ckpt_path last",
    ),
    "validate": ("--config job.yaml --ckpt_path runs/job/last.ckpt",),
    "test": ("--config job.yaml --ckpt_path runs/job/last.ckpt --data.test_files test.tsv",),
    "predict": ("--config job.yaml --ckpt_path runs/job/last.ckpt --output predictions.csv",),
}


def job_help(command: str, prog: str) -> str:
    """The help of a command."""
    whole = f"{prog} {command}"
    general = [
        ("-c, --config CONFIG", "a YAML file or one of the package's configs; later ones are laid over it"),
        (
            "--ckpt_path FILE",
            "checkpoint to go on from; last: the newest of the run's folder"
            if command == "fit"
            else "checkpoint with the weights",
        ),
        *(
            [("--output FILE", "predictions.parquet, or another .parquet, .csv or .jsonl file")]
            if command == "predict"
            else []
        ),
        ("--run_dir DIR", "folder for all that the run writes: logs, checkpoints, record, report, config"),
        ("--seed_everything N", "of weights, batches and dropout"),
        ("--print_config", "print the whole configuration, all defaults in it, and stop"),
        ("--trainer.callbacks.help CLASS", "the options of a callback, such as lightning_qk.LocAteR"),
        ("--help-all", "every option of model, data and trainer: about 600 lines"),
    ]
    configs = [(name, describe(name)) for name in names()]
    return "\n".join(
        [
            f"usage: {whole} --config CONFIG [--config CONFIG ...] [OPTIONS]",
            "",
            _WHAT[command],
            "A job is a YAML file; options of the command line override it.",
            *_table("options", general),
            *_table("the model", _MODEL),
            *_table("the data", _DATA),
            *_table("the trainer, which is Lightning's", _TRAINER),
            *_table(f"configs of the package ({prog} configs NAME prints one, to edit)", configs),
            "",
            "examples:",
            *(f"  {whole} {example}" for example in _EXAMPLES[command]),
        ]
    )


def _table(title: str, rows: "list[tuple[str, str]] | tuple[tuple[str, str], ...]") -> list[str]:
    return ["", f"{title}:", *(_entry(name, text, 31) for name, text in rows)]


def _entry(name: str, text: str, width: int) -> str:
    """A name and its text in 80 columns."""
    begin = f"  {name:<{width}} "
    return textwrap.fill(text, 80, initial_indent=begin, subsequent_indent=" " * len(begin))
