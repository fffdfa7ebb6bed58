"""One screen of help for the trainer's commands; LightningCLI's own takes seconds and 600 lines."""

from lightning_qk.cli import _configs

_WHAT = {
    "fit": "Train a model, validate it on the way, and leave a report.",
    "validate": "Evaluate a model on the validation data of a job.",
    "test": "Evaluate a model on the test data of a job.",
    "predict": "Run a model over the test data of a job.",
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
    "predict": ("--config job.yaml --ckpt_path runs/job/last.ckpt",),
}


def job_help(command: str, prog: str) -> str:
    """The help of a command.

    Args:
        command: one of the trainer's commands.
        prog: name of the program.
    """
    whole = f"{prog} {command}"
    general = [
        ("-c, --config CONFIG", "a YAML file or one of the package's configs; later ones are laid over it"),
        (
            "--ckpt_path FILE",
            "checkpoint to go on from" if command == "fit" else "checkpoint with the weights",
        ),
        ("--seed_everything N", "of weights, batches and dropout"),
        ("--print_config", "print the whole configuration, all defaults in it, and stop"),
        ("--trainer.callbacks.help CLASS", "the options of a callback, such as lightning_qk.LocAteR"),
        ("--help-all", "every option of model, data and trainer: about 600 lines"),
    ]
    configs = [(name, _configs.describe(name)) for name in _configs.names()]
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
    return ["", f"{title}:", *(f"  {name:<31} {text}" for name, text in rows)]
