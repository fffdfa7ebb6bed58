"""What a run was: its data, batches, the trainer's settings and what intervened, for loggers and the report."""

import inspect
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer

from lightning_qk.callbacks.callback import OBSERVES, Callback, arguments

_TRAINER = (
    "max_steps",
    "max_epochs",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "val_check_interval",
    "check_val_every_n_epoch",
    "log_every_n_steps",
    "precision",
    "num_nodes",
    "world_size",
)


def run_settings(trainer: Trainer) -> dict[str, Any]:
    """Settings of trainer and data as plain values, for the configuration of a logger's run.

    Args:
        trainer: the trainer, in ``setup`` or later.

    Returns:
        ``trainer`` and, where the data module says what its data are (``facts``) or has hyperparameters, ``data``.
    """
    own = {name: getattr(trainer, name, None) for name in _TRAINER}
    own["strategy"] = type(trainer.strategy).__name__
    data = _data_facts(trainer)
    return {"trainer": own, **({"data": data} if data else {})}


def _data_facts(trainer: Trainer) -> dict[str, Any]:
    module = getattr(trainer, "datamodule", None)
    if module is None:
        return {}
    facts = getattr(module, "facts", None)
    found = dict(facts) if isinstance(facts, Mapping) else dict(getattr(module, "hparams", None) or {})
    return {"class": type(module).__name__, **found}


def describe_run(trainer: Trainer) -> dict[str, str]:
    """Title → the same in words, for the report."""
    found = {
        "Data": _data_in_words(trainer),
        "Batch": _batch_in_words(trainer),
        "Trainer": _in_words(trainer),
    }
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        # What others put among them is nothing that a job has chosen.
        is_ours = "._" in type(callback).__module__
        if isinstance(callback, Callback) and callback.place != OBSERVES and not is_ours:
            found[type(callback).__name__] = _changed(callback) or "as it is by default"
    return {title: text for title, text in found.items() if text}


def _data_in_words(trainer: Trainer) -> str:
    facts = _data_facts(trainer)
    rows = facts.pop("rows", None)
    words = [f"{name.replace('_', ' ')} {value}" for name, value in facts.items() if _is_plain(value)]
    if isinstance(rows, Mapping):
        words.append("rows: " + ", ".join(f"{split} {count:,}" for split, count in rows.items()))
    if not facts:
        loader = trainer.train_dataloader
        dataset = getattr(loader, "dataset", None)
        if dataset is None:
            return ""
        try:
            words = [f"{type(dataset).__name__}, {len(dataset):,} rows"]
        except TypeError:  # a stream
            words = [type(dataset).__name__]
    return "; ".join(words)[:300]


def _batch_in_words(trainer: Trainer) -> str:
    loader = trainer.train_dataloader
    size = getattr(loader, "batch_size", None)
    if not isinstance(size, int):
        return ""
    factors = [f"{size} rows"]
    if trainer.accumulate_grad_batches > 1:
        factors.append(f"{trainer.accumulate_grad_batches} batches")
    if trainer.world_size > 1:
        factors.append(f"{trainer.world_size} processes")
    whole = size * trainer.accumulate_grad_batches * trainer.world_size
    return " × ".join(factors) + (f" = {whole:,} rows a step" if len(factors) > 1 else "")


def _in_words(trainer: Trainer) -> str:
    words = []
    if trainer.max_steps > 0:
        words.append(f"at most {trainer.max_steps:,} steps")
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        words.append(f"at most {trainer.max_epochs:,} epochs")
    if trainer.gradient_clip_val:
        words.append(f"gradients clipped at {trainer.gradient_clip_val}")
    words.append(f"logs every {trainer.log_every_n_steps} steps")  # type: ignore[attr-defined]
    return ", ".join(words)


def _changed(callback: Callback) -> str:
    """Arguments that are not what they are by default."""
    defaults = {
        name: one.default
        for base in type(callback).__mro__
        if "__init__" in vars(base)
        for name, one in inspect.signature(inspect.unwrap(vars(base)["__init__"])).parameters.items()
    }
    known = {name: getattr(callback, name, None) for name in arguments(type(callback))}
    changed = {name: value for name, value in known.items() if value != defaults.get(name)}
    return ", ".join(f"{name} {value}" for name, value in changed.items() if _is_plain(value))


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool)
