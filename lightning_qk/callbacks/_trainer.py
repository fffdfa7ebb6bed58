"""Questions to a Lightning Trainer: is this step logged, under which number, and where do files go."""

import math
import sys
from collections.abc import Iterator

import torch
import transformers
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_qk._packages import either
from lightning_qk._version import __version__
from lightning_qk.callbacks._output import beside_bars, inform
from lightning_qk.heads.reader import ProjectionReader

# For isinstance, of either package.
DeepSpeedStrategy = either("DeepSpeedStrategy")
FSDPStrategy = either("FSDPStrategy")
ModelParallelStrategy = either("ModelParallelStrategy")


def refuse_deepspeed(trainer: Trainer, name: str) -> None:
    """Refuse a strategy that writes its own copies of the weights over what is changed in them.

    Raises:
        ValueError: the strategy is DeepSpeed's.
    """
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        raise ValueError(
            f"expected a strategy whose optimizer steps the parameters themselves for {name}, got DeepSpeed, "
            "which steps copies of its own: use DDP or FSDP2 (ModelParallelStrategy, see configs/fsdp2.yaml)"
        )


def say(sentence: str) -> None:
    """Warn on rank zero. Where warnings are errors (``python -W error``), log: a notice ends no training."""
    try:
        with beside_bars():
            rank_zero_warn(sentence)
    except Exception:
        inform(sentence)


def describe_error(error: BaseException) -> str:
    """Kind and message of an exception, in one line."""
    kind = type(error).__name__
    try:
        message = " ".join(str(error).split())
    except Exception:
        return kind
    return f"{kind}: {message}" if message else kind


def logging_step(trainer: Trainer) -> int:
    """The step under which Lightning itself logs the values of this batch.

    The same number keeps the monitors' rows together with the loss in every logger. It counts batches that
    stepped, so that several optimizers do not count twice as ``trainer.global_step`` would.
    """
    loop = getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", None)
    return int(trainer.global_step if loop is None else loop)


def is_logged_step(trainer: Trainer, every_n_steps: int | None) -> bool:
    """Whether the step that the current batch belongs to is to be logged."""
    every = trainer.log_every_n_steps if every_n_steps is None else every_n_steps  # type: ignore[attr-defined]
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return True
    return every > 0 and (logging_step(trainer) + 1) % every == 0


def is_last_chance(trainer: Trainer, batch_idx: int, steps_a_batch: int) -> bool:
    """Whether the run, or its epoch, is known to end with the step that the current batch belongs to.

    Args:
        trainer: the trainer, in ``on_train_batch_start``.
        batch_idx: index of the batch in its epoch.
        steps_a_batch: by how much a batch that steps raises ``trainer.global_step``: one for each optimizer.
    """
    if 0 <= trainer.max_steps <= trainer.global_step + steps_a_batch:
        return True
    if trainer.is_last_batch:
        return True
    batches, together = trainer.num_training_batches, max(trainer.accumulate_grad_batches, 1)
    # The last batches of an epoch step together, however few they are.
    return math.isfinite(batches) and batch_idx // together >= (int(batches) - 1) // together


def ends_with_epoch(trainer: Trainer) -> bool:
    """Whether the run is known to end with the current epoch, in ``on_train_epoch_end``.

    A callback further back in the list that stops the run then is not foreseen.
    """
    epochs = trainer.max_epochs
    return bool(
        trainer.should_stop
        or 0 <= trainer.max_steps <= trainer.global_step
        or (epochs is not None and 0 <= epochs <= trainer.current_epoch + 1)
    )


def projection_reader(
    trainer: Trainer, pl_module: LightningModule, *, fold_norm: bool = False
) -> ProjectionReader:
    """Reads the projections of a module in training, whatever the strategy wraps around it; from ``on_fit_start``.

    Raises:
        ValueError: the module holds no attention whose weights can be read.
    """
    return ProjectionReader(pl_module, fold_norm=fold_norm, root=trainer.strategy.model)


def stepped_parameters(trainer: Trainer) -> Iterator[Tensor]:
    """The parameters that the trainer's optimizers have."""
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            yield from group["params"]


def loss_scale(trainer: Trainer, optimizer: Optimizer) -> Tensor | None:
    """The factor that gradients still carry when ``on_before_optimizer_step`` runs, or None.

    Under fp16 with a scaler Lightning has unscaled them by then, unless the optimizer does so in its own step,
    as fused ones do.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return None
    # Not get_scale(), which waits for the device.
    return scaler._scale


def model_info(trainer: Trainer, pl_module: LightningModule) -> dict[str, str]:
    """Facts about a run that its report prints."""
    kinds = sorted({type(model).__name__ for model in _whole_models(pl_module)})
    parameters = sum(parameter.numel() for parameter in pl_module.parameters())
    return {
        "Model": ", ".join(kinds) or type(pl_module).__name__,
        "LightningModule": type(pl_module).__name__,
        "Parameters": f"{parameters:,}",
        "Optimizer steps": f"{trainer.global_step:,}",
        "Precision": str(trainer.precision),
        "Processes": str(trainer.world_size),
        "Device": str(pl_module.device),
        "Versions": f"lightning-qk {__version__}, torch {torch.__version__}, {_lightning_version(trainer)}, "
        f"transformers {transformers.__version__}",
    }


def _lightning_version(trainer: Trainer) -> str:
    """Name and version of the package that the trainer is of, which may be subclassed."""
    homes = (base.__module__.partition(".")[0] for base in type(trainer).__mro__)
    name = next((home for home in homes if home in ("lightning", "pytorch_lightning")), "lightning")
    return f"{name} {getattr(sys.modules.get(name), '__version__', 'unknown')}"


def _whole_models(module: torch.nn.Module) -> list[torch.nn.Module]:
    """The outermost transformers models: a model's own backbone is one too."""
    if isinstance(module, transformers.PreTrainedModel):
        return [module]
    return [model for child in module.children() for model in _whole_models(child)]
