"""The record and the report of a run, from all callbacks of its trainer."""

from collections.abc import Callable
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer

from lightning_qk.callbacks._output import end_progress_bar
from lightning_qk.callbacks._run_facts import describe_run
from lightning_qk.callbacks._trainer import describe_error, logging_step, model_info
from lightning_qk.callbacks.callback import OBSERVES, SUMS_UP, Callback
from lightning_qk.loggers.loggers import log_file
from lightning_qk.record.history import STATE, RunRecord

REPORT_NAME = "lightning_qk_report.html"
RECORD_NAME = "lightning_qk_record.safetensors"

_LARGE = 10**8
"""Bytes of a table of every head that are told before they are written."""


def gather(trainer: Trainer, pl_module: LightningModule, state: str, steps: int) -> RunRecord:
    """The record of all callbacks of a trainer.

    Args:
        trainer: the trainer.
        pl_module: its module.
        state: how the run stands, in a few words that end before the step: ``"finished"``.
        steps: how many are done.
    """
    record = RunRecord(info=model_info(trainer, pl_module) | describe_run(trainer))
    of = f" of {trainer.max_steps:,}" if trainer.max_steps > 0 else ""
    record.info[STATE] = f"{state} at step {steps:,}{of}"
    own = [callback for callback in trainer.callbacks if isinstance(callback, Callback)]  # type: ignore[attr-defined]
    for callback in sorted(own, key=lambda one: one.place not in (OBSERVES, SUMS_UP)):
        callback.contribute(record)
        record.notes += [one for one in getattr(callback, "notes", ()) if one not in record.notes]
    return record


def write_run(
    trainer: Trainer,
    pl_module: LightningModule,
    folder: Path,
    note: Callable[[str], None],
    error: BaseException | None = None,
) -> None:
    """Print the table of health and write record, history and report; nothing where nothing was measured.

    Args:
        trainer: the trainer.
        pl_module: its module.
        folder: where the files go.
        note: is given a sentence where the history of the heads cannot be written.
        error: what ended the run; None where it ended by itself.
    """
    from lightning_qk.record.health import print_health
    from lightning_qk.report.report import write_report

    record = gather(trainer, pl_module, _ending(error), logging_step(trainer))
    if not any(len(history) for history in record.histories.values()):
        return
    end_progress_bar(trainer)
    # First what needs no disk.
    print_health(record)
    record.save(folder / RECORD_NAME)
    _write_history(trainer, record, folder, note)
    path = write_report(record, folder / REPORT_NAME)
    print(f"Report: {path}")


def _ending(error: BaseException | None) -> str:
    if error is None:
        return "finished"
    return (
        "interrupted"
        if isinstance(error, KeyboardInterrupt)
        else f"failed with {describe_error(error)[:300]}"
    )


def _write_history(trainer: Trainer, record: RunRecord, folder: Path, note: Callable[[str], None]) -> None:
    """Every head's history beside the report, and to the loggers that keep files."""
    from lightning_qk.record.parquet import HISTORY_NAME, history_size, write_history

    size = history_size(record)
    if size >= _LARGE:
        print(f"Every head at every measured step: about {size / 1e6:,.0f} MB, {folder / HISTORY_NAME}")
    try:
        path = write_history(record, folder / HISTORY_NAME)
    except Exception as error:
        note(f"the history of the heads could not be written ({describe_error(error)})")
        return
    description = (
        "Every head at every kept step: step, layer, layer_index, head, key, value. Read it with "
        "pandas.read_parquet."
    )
    log_file(trainer, path, name="lightning_qk_history", kind="history", description=description)
