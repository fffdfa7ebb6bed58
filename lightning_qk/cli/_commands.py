"""The commands: what each does, with an example, and the module that has its ``parser`` and its ``run``."""

from importlib import import_module
from typing import Any, NamedTuple

PROG = "lightning-qk"
JOBS = ("fit", "validate", "test", "predict")
"""Commands of the trainer, whose options are LightningCLI's."""


class Command(NamedTuple):
    """One command.

    Attributes:
        what: it does, for the help.
        example: what may follow ``lightning-qk``.
        home: its module in this package; of a job it has no options of its own.
    """

    what: str
    example: str
    home: str = "_lightning_cli"

    @property
    def module(self) -> Any:
        """``parser(prog)`` gives its options, ``run(args, prog)`` runs it and returns the exit status."""
        return import_module(f"lightning_qk.cli.{self.home}")


COMMANDS = {
    "fit": Command("train and validate a model", "fit --config quickstart"),
    "validate": Command(
        "evaluate on the validation data", "validate --config job.yaml --ckpt_path last.ckpt"
    ),
    "test": Command("evaluate on the test data", "test --config job.yaml --ckpt_path last.ckpt"),
    "predict": Command("run a model over the test data", "predict --config job.yaml --ckpt_path last.ckpt"),
    "inspect": Command("show what is in a checkpoint's query and key weights", "inspect gpt2", "inspect"),
    "verify": Command(
        "compare what is read of a model with what its forward computes", "verify gpt2", "_verify"
    ),
    "report": Command(
        "make a run's HTML report again", "report runs/job/lightning_qk_record.safetensors", "_report"
    ),
    "watch": Command("show a run's report in a browser while the run goes on", "watch runs/job", "watch"),
    "cost": Command(
        "say what the callbacks would add to a job's steps", "cost --model config.json --ranks 8", "cost"
    ),
    "configs": Command("list or print the ready configs", "configs quickstart > job.yaml", "_configs"),
    "completion": Command("print completions for bash, zsh or fish", "completion bash", "_completion"),
    "wandb-workspace": Command(
        "make a W&B workspace of attention's health", "wandb-workspace my-team/my-project", "workspace"
    ),
}
