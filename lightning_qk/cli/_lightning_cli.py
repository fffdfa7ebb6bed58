"""LightningCLI for the ready-made job, apart from the command so that its help stays quick."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info

from lightning_qk.cli._job_callbacks import KeepLast, SaveConfig, additions, newest_checkpoint
from lightning_qk.cli._quiet import prepare_loggers, quiet_libraries
from lightning_qk.data.text import TextDataModule
from lightning_qk.inspect.documents import BadInput
from lightning_qk.module import TransformerModule
from lightning_qk.module.network import make_config
from lightning_qk.module.predictions import PredictionFile


def _data_seed(seed: bool | int) -> int:
    return 0 if isinstance(seed, bool) else seed


class _JobCLI(LightningCLI):
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("model.task", "data.task")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=_data_seed)

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            _add_output(parser)
        return parser

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        given = config.get("callbacks") or []
        own = additions(given if isinstance(given, list) else [given], config)
        trainer = super()._instantiate_trainer(config, [*callbacks, *own])
        if trainer.checkpoint_callbacks:
            # Behind the one that says where, and not in its place.
            trainer.callbacks.append(KeepLast())  # type: ignore[attr-defined]
        prepare_loggers(trainer.loggers)
        return trainer

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        options = super()._prepare_subcommand_kwargs(subcommand)
        if options.get("ckpt_path") == "last":
            # Lightning looks in the folder of the run that begins, and starts a new run where that has none.
            options["ckpt_path"] = str(newest_checkpoint(self.trainer))
            rank_zero_info(f"lightning-qk: from {options['ckpt_path']}")
        else:
            _check_checkpoint(options.get("ckpt_path"))
        if subcommand != "fit" and options.get("ckpt_path") is None:
            name = self.config[subcommand].model.model
            weights = "random" if isinstance(name, dict) else f"those of {name}"
            rank_zero_info(
                f"lightning-qk: the weights are {weights}: --ckpt_path names a checkpoint of a run"
            )
        return options

    def before_predict(self) -> None:
        # Logits of all tokens do not fit into memory, and are not used.
        self.config_init["predict"]["return_predictions"] = False
        self.trainer.callbacks.append(self._file)  # type: ignore[attr-defined]

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        # The command has taken its own options out of sys.argv, which the parent warns about.
        assert isinstance(args, list)
        self.config = parser.parse_args(args)

    def before_instantiate_classes(self) -> None:
        # Before a logger has begun a run that would be left behind, empty.
        if self.subcommand == "predict":
            try:
                self._file = PredictionFile(self.config["predict"].output)
            except ValueError as error:
                raise BadInput(str(error)) from error
        fields = self.config[self.subcommand].model.model
        if isinstance(fields, dict):
            try:
                make_config(fields)
            except ValueError as error:
                raise BadInput(str(error)) from error


def _check_checkpoint(given: Any) -> None:
    """Refuse a misspelt file before the data are read.

    Raises:
        BadInput: it is not there.
    """
    # Lightning has words of its own, and reads from other places than the disk.
    if given is None or str(given) in ("best", "hpc") or ":" in str(given) or Path(given).exists():
        return
    raise BadInput(
        f"expected a checkpoint that exists after --ckpt_path, got no such file: {given}; correct it, or pass "
        "'last' for the newest of the job's runs"
    )


def _add_output(parser: LightningArgumentParser) -> None:
    parser.add_argument(
        "--output",
        type=str,
        default="predictions.parquet",
        help="File for the predictions, one row an input, that ends in .parquet, .csv or .jsonl.",
    )


def _parser_options(prog: str) -> dict[str, Any]:
    each = {command: {"exit_on_error": False} for command in LightningCLI.subcommands()}
    return {"prog": prog, "exit_on_error": False, **each}


def run(args: list[str], prog: str) -> None:
    """Parse the arguments, build model, data and trainer, and run the command.

    Raises:
        argparse.ArgumentError: the arguments do not make a job.
    """
    with quiet_libraries():
        _JobCLI(
            TransformerModule,
            TextDataModule,
            args=args,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs=_parser_options(prog),
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
        )


def _parser(command: str) -> LightningArgumentParser:
    """The options of one command, for those who want to know them without running it."""
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(Trainer, "trainer")
    parser.add_lightning_class_args(TransformerModule, "model")
    parser.add_lightning_class_args(TextDataModule, "data")
    parser.add_method_arguments(Trainer, command, skip=set(LightningCLI.subcommands()[command]))
    if command == "predict":
        _add_output(parser)
    return parser


def option_names(command: str) -> list[str]:
    """Names of a command's options as a config has them."""
    actions = _parser(command)._actions
    return ["config", "seed_everything", *(action.dest for action in actions if action.dest != "help")]


def option_strings(command: str) -> list[str]:
    """A command's options as they are typed, such as ``--model.lr``."""
    typed = [name for action in _parser(command)._actions for name in action.option_strings]
    own = ["--help", "--help-all", "--print_config", "--run_dir", "--seed_everything"]
    return sorted({*own, *(name for name in typed if name.startswith("--") and name != "--print_shtab")})
