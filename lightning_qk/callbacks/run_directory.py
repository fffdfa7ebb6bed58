"""The folder of a run, in which record, report and config go."""

import os

from lightning.pytorch import Trainer


def run_directory(trainer: Trainer) -> str:
    """Folder of this run: the first logger's own, the same on every rank.

    A collective call under several processes, which all of them come to whatever a logger raises.
    """
    return trainer.strategy.broadcast(own_run_directory(trainer))


def own_run_directory(trainer: Trainer) -> str:
    """What this process takes for the run's folder, which counts on rank zero; no collective call."""
    try:
        folder = _own_directory(trainer)
    except Exception:  # a logger that cannot be reached, say
        folder = None
    return folder or str(trainer.default_root_dir)


def _own_directory(trainer: Trainer) -> str | None:
    """What this process takes for the run's folder. Not ``trainer.log_dir``, which is a collective call."""
    logger = trainer.logger
    if logger is None:
        return None
    # TensorBoard's and CSV's log_dir is a folder of the run; of other loggers it is save_dir, which many runs
    # share: theirs is where ModelCheckpoint puts their checkpoints.
    own = getattr(logger, "log_dir", None)
    if own is not None:
        return str(own)
    if logger.save_dir is None:
        return None
    parts = [str(part) for part in (logger.name, logger.version) if part is not None]
    return os.path.join(logger.save_dir, *parts)
