"""What the command adds to every job: the run's config, a last checkpoint, a short summary and a narrow bar."""

import os
import platform
from pathlib import Path
from typing import Any

import lightning
import torch
import transformers
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint, ModelSummary, RichProgressBar
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_qk._version import __version__
from lightning_qk.callbacks.run_directory import run_directory
from lightning_qk.inspect.documents import BadInput

CONFIG_NAME = "lightning_qk_config.yaml"
LAST_NAME = "last.ckpt"
# A bar, the speed and the metrics need more.
_NARROW = 110


class SaveConfig(SaveConfigCallback):
    """Writes the whole config, with seed and versions, into the run's own folder, beside record and report."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write it, once; evaluations do not replace that of a fit."""
        if self.already_saved:
            return
        folder = Path(run_directory(trainer))
        if not trainer.loggers and folder.resolve() == Path.cwd():
            return  # there is no folder that is the run's
        path = folder / CONFIG_NAME
        if trainer.is_global_zero and (stage == "fit" or not path.exists()):
            folder.mkdir(parents=True, exist_ok=True)
            text = self.parser.dump(self.config, skip_none=False)
            versions = (
                f"lightning-qk {__version__}, torch {torch.__version__}, lightning {lightning.__version__}, "
                f"transformers {transformers.__version__}, Python {platform.python_version()}"
            )
            seed = os.environ.get("PL_GLOBAL_SEED", "was not set")
            path.write_text(f"# {versions}\n# seed {seed}\n{text}", encoding="utf-8")
        self.already_saved = True


class KeepLast(Checkpoint):
    """Leaves ``last.ckpt`` beside the other checkpoints when a fit ends, is interrupted or fails."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the weights that the run ended with."""
        self._keep(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep them where all processes come here: writing a checkpoint waits for the others."""
        if trainer.world_size == 1 or isinstance(exception, KeyboardInterrupt | SIGTERMException):
            self._keep(trainer)

    def _keep(self, trainer: Trainer) -> None:
        beside = next(
            (one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint) and one.dirpath),
            None,
        )
        if beside is None or not trainer.training or not trainer.global_step or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        path = Path(str(beside.dirpath)) / LAST_NAME
        try:
            if not self._linked(trainer, beside, path):
                trainer.save_checkpoint(path, weights_only=False)
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            rank_zero_warn(
                f"lightning-qk: expected to write {path}, got {reason}: make room or check its folder"
            )

    def _linked(self, trainer: Trainer, beside: ModelCheckpoint, path: Path) -> bool:
        """Give a checkpoint of the same step a second name, which costs no room; whether that was done."""
        newest = Path(beside.best_model_path) if beside.monitor is None and beside.best_model_path else None
        if getattr(beside, "_last_global_step_saved", None) != trainer.global_step or newest is None:
            return False
        done = False
        if trainer.is_global_zero and newest.is_file() and newest != path:
            beginning = path.with_name(f".{path.name}.{os.getpid()}")
            try:
                os.link(newest, beginning)
                beginning.replace(path)
                done = True
            except OSError:  # a file system without links
                beginning.unlink(missing_ok=True)
        return bool(trainer.strategy.broadcast(done))


class Summary(ModelSummary):
    """One line on the model, in place of a table whose FLOPs are zero for models of transformers."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print it."""
        network = getattr(pl_module, "model", None)
        kind = type(network if network is not None else pl_module).__name__
        parameters = list(pl_module.parameters())
        count = sum(one.numel() for one in parameters)
        trained = sum(one.numel() for one in parameters if one.requires_grad)
        which = "all of them trained" if trained == count else f"{trained:,} of them trained"
        rank_zero_info(f"lightning-qk: {kind} with {count:,} parameters, {which}")


class NarrowBar(RichProgressBar):
    """Lightning's bar in one line: without a version and, in a narrow terminal, without bar and speed."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Those of the module, without the version of the run."""
        metrics = dict(super().get_metrics(trainer, pl_module))
        metrics.pop("v_num", None)
        return metrics

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        """Columns that leave room for the metrics."""
        from rich import get_console

        columns = super().configure_columns(trainer)
        if get_console().width >= _NARROW:
            return columns
        left_out = ("CustomBarColumn", "ProcessingSpeedColumn")
        return [one for one in columns if type(one).__name__ not in left_out]


def additions(callbacks: list[Callback], config: dict[str, Any]) -> list[Callback]:
    """A summary and a bar, where the config has no other and does not switch them off."""
    found: list[Callback] = []
    kinds = {base.__name__ for one in callbacks for base in type(one).__mro__}
    if config.get("enable_model_summary") is not False and "ModelSummary" not in kinds:
        found.append(Summary())
    if config.get("enable_progress_bar") is not False and "ProgressBar" not in kinds:
        found.append(NarrowBar())
    return [] if config.get("barebones") else found


def newest_checkpoint(trainer: Trainer) -> Path:
    """The checkpoint that was written last by a run of the same job, whatever its name.

    Args:
        trainer: a trainer before its run.

    Raises:
        BadInput: there is none.
    """
    here = Path.cwd()
    folders = [Path(trainer.default_root_dir)]
    folders += [Path(logger.save_dir) / (logger.name or "") for logger in trainer.loggers if logger.save_dir]
    folders += [
        Path(str(one.dirpath))
        for one in trainer.checkpoint_callbacks
        if isinstance(one, ModelCheckpoint) and one.dirpath
    ]
    # The working folder may hold anything: there, what a job without loggers has left.
    folders = list(dict.fromkeys(one / "checkpoints" if one.resolve() == here else one for one in folders))
    found = [path for folder in folders for path in folder.rglob("*.ckpt") if "wandb" not in path.parts]
    if not found:
        raise BadInput(
            f"expected a checkpoint for --ckpt_path last in {', '.join(map(str, folders))}, got none: name a "
            "file, or leave the option out to start a new run"
        )
    return max(found, key=lambda path: (path.stat().st_mtime_ns, path.name == LAST_NAME))
