"""The job that is hurt, in the process that trains: see ``harness``."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import models
import torch
from fault_harness import FAULTS, Plan
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_qk

OURS = ("qk/", "attn/", "hidden/", "pred/", "guard/")


def warm_up() -> None:
    """Import what a child will need; nothing that starts a thread."""
    torch.set_num_threads(1)
    import lightning_qk.callbacks.guard.guard
    import lightning_qk.callbacks.monitors.attention
    import lightning_qk.callbacks.monitors.spectrum
    import lightning_qk.record.health
    import lightning_qk.record.parquet
    import lightning_qk.report.figures
    import lightning_qk.report.report

    for name in lightning_qk.__all__:
        getattr(lightning_qk, name)
    for name in ("gpt2", "llama", "bert"):
        getattr(models, name)()


class HurtJob(models.Job):
    """Draws its batches and its dropout from the step: a resumed run sees what an uninterrupted one does."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(getattr(models, plan.model)(), lr=1e-3, optimizer="adamw")
        self.plan = plan
        self.micro = 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        place = self.trainer.global_step * self.plan.accumulate + self.micro % self.plan.accumulate
        self.micro += 1
        torch.manual_seed(1000 * self.plan.seed + 2 * place + self.trainer.global_rank)
        tokens = torch.randint(3, models.VOCABULARY, (2, 16))
        return super().training_step(tokens, batch_idx)


def make_job(plan: Plan) -> HurtJob:
    torch.manual_seed(plan.seed)
    return HurtJob(plan)


class Injury(L.Callback):
    """The first of the trainer's callbacks, in every run: what goes wrong does so whoever watches."""

    def __init__(self, plan: Plan, folder: Path, rank: int) -> None:
        self.plan, self.folder, self.rank = plan, folder, rank
        self.run_folder = folder / "run"
        if rank == 0 and not plan.resume:
            shutil.rmtree(self.run_folder, ignore_errors=True)
        self.run_folder.mkdir(parents=True, exist_ok=True)
        self.job: Any = None
        self.trainer: Any = None
        self.logger_fails: str | None = None
        self.validation_batches = 3
        self.gradient: float | None = None
        self.sharpens = False
        self.later: list[Callable[[], Any]] = []
        self.at_end: list[Callable[[], Any]] = []
        self.done = plan.resume and plan.fault != "steered_sharpen"

    # What faults use

    def blocks(self) -> nn.ModuleList:
        return next(
            module for module in self.job.modules() if isinstance(module, nn.ModuleList) and len(module) == 2
        )

    def attention(self, block: nn.Module) -> tuple[str, nn.Module]:
        """Name and module of the block's attention: the outermost whose class is called so."""
        return next(
            (name, module) for name, module in block.named_modules() if "Attention" in type(module).__name__
        )

    def poison_weight(self, value: float) -> None:
        _, attention = self.attention(self.blocks()[self.plan.layer])
        weight = next(p for p in attention.parameters() if p.dim() == 2)
        with torch.no_grad():
            weight[1, 1] = value

    def poison_activation(self, value: float) -> None:
        def poison(module: nn.Module, args: Any, output: Any) -> Any:
            states = (output[0] if isinstance(output, tuple) else output).clone()
            states[0, 1, 1] = value
            return (states, *output[1:]) if isinstance(output, tuple) else states

        handle = self.blocks()[self.plan.layer].register_forward_hook(poison)
        self.later.append(handle.remove)

    def fail_once(self, name: str, error: Callable[[], BaseException]) -> None:
        """torch.linalg's function raises when it is next called."""
        true = getattr(torch.linalg, name)

        def failing(*args: Any, **kwargs: Any) -> Any:
            setattr(torch.linalg, name, true)
            raise error()

        setattr(torch.linalg, name, failing)

    def fail_in_package(self, error: Callable[[], BaseException], after: int) -> None:
        """One of torch's functions raises in a call from the package: the first after so many of such calls."""
        home = str(Path(lightning_qk.__file__).parent)
        left = [after]
        for owner, name in ((torch, "stack"), (torch, "cat"), (torch, "einsum"), (torch, "zeros")):
            setattr(owner, name, self._counting(getattr(owner, name), home, left, error))

    @staticmethod
    def _counting(true: Callable, home: str, left: list[int], error: Callable[[], BaseException]) -> Callable:
        def counting(*args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1).f_code.co_filename
            # What is said among ranks is little, and nothing can be agreed on where that fails.
            if caller.startswith(home) and not caller.endswith("_ranks.py"):
                left[0] -= 1
                if left[0] == -1:
                    raise error()
            return true(*args, **kwargs)

        return counting

    # Hooks

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        while self.later:
            self.later.pop()()
        at = FAULTS[self.plan.fault].at
        if not self.done and at is not None and trainer.global_step >= self.plan.step:
            self.done = True
            at(self)
        if self.sharpens and trainer.global_step < self.plan.step + 8:
            with torch.no_grad():
                list(lightning_qk.head_projections(pl_module).values())[1].query.mul_(1.5)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.gradient is not None:
            next(p for p in pl_module.parameters() if p.grad is not None).grad[0] = self.gradient
            self.gradient = None

    # The run

    def fit(self, checkpoint: Path | None) -> None:
        plan = self.plan
        batches = DataLoader(torch.zeros(plan.steps * plan.accumulate, 1), batch_size=1)
        val = DataLoader(torch.randint(3, models.VOCABULARY, (2 * self.validation_batches, 16)), batch_size=2)
        try:
            self.trainer.fit(
                self.job,
                batches,
                val if plan.validate else None,
                ckpt_path=checkpoint,
                weights_only=False if checkpoint else None,
            )
        finally:
            while self.at_end:
                self.at_end.pop()()

    def outcome(self, end: str, plan: Plan, callbacks: list) -> dict[str, Any]:
        histories, scalars, notes = {}, {}, []
        for name, callback in zip(plan.callbacks, callbacks, strict=True):
            history = getattr(callback, "history", None)
            if history is not None and len(history):
                histories[name] = (list(history.steps), {key: history.series(key) for key in history.values})
            notes += getattr(callback, "notes", [])
            account = getattr(callback, "account", None)
            if account is not None and account.curves.steps:
                curves = {key: account.curves.series(key) for key in account.curves.values}
                scalars[name] = (list(account.curves.steps), curves, list(account.events))
        hooks = [
            repr(hook)
            for module in self.job.modules()
            for table in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
            for hook in table.values()
            if "lightning_qk" in str(getattr(getattr(hook, "func", hook), "__module__", ""))
        ]
        return {
            "end": end,
            "losses": [loss.item() for loss in self.job.losses],
            "weights": {key: value.detach().clone() for key, value in self.job.state_dict().items()},
            "histories": histories,
            "scalars": scalars,
            "notes": notes,
            "hooks": hooks,
            "steps": self.trainer.global_step,
            "rng": torch.get_rng_state(),
        }


class HurtLogger(TensorBoardLogger):
    """One of whose methods raises, for what the callbacks send: the job's own numbers pass."""

    def __init__(self, injury: Injury) -> None:
        super().__init__(injury.run_folder, name="", version="")
        self.injury = injury

    def _fail(self, method: str) -> None:
        trainer = self.injury.trainer
        if self.injury.logger_fails == method and trainer.global_step >= self.injury.plan.step:
            raise ConnectionError(f"{method}: the logger's server is gone")

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if any(key.startswith(OURS) for key in metrics):
            self._fail("log_metrics")
        super().log_metrics(metrics, step)

    def log_hyperparams(self, params: Any = None, *args: Any, **kwargs: Any) -> None:
        if self.injury.logger_fails == "log_hyperparams" and "lightning_qk" in str(params):
            raise ConnectionError("log_hyperparams: the logger's server is gone")
        super().log_hyperparams(params, *args, **kwargs)

    @property
    def experiment(self) -> Any:
        true, fail = super().experiment, self._fail

        class Experiment:
            def __getattr__(self, name: str) -> Any:
                if name in ("add_image", "add_histogram"):
                    fail(name)
                return getattr(true, name)

        return Experiment()


class Quiet(L.pytorch.loggers.logger.DummyLogger):
    """Where nothing can be written."""


def make_trainer(plan: Plan, injury: Injury, callbacks: list) -> L.Trainer:
    arguments: dict[str, Any] = {}
    if plan.validate:
        arguments |= {"val_check_interval": plan.validate, "num_sanity_val_steps": 0}
    if plan.processes > 1:
        arguments |= {
            "strategy": "ddp_find_unused_parameters_true",
            "devices": plan.processes,
            "use_distributed_sampler": False,
        }
    extra: list[L.Callback] = []
    if plan.save_every:
        extra.append(
            ModelCheckpoint(
                injury.folder / "checkpoints",
                filename="{step}",
                every_n_train_steps=plan.save_every,
                save_top_k=-1,
                save_on_train_epoch_end=False,
            )
        )
        arguments["enable_checkpointing"] = True
    needs_logger = injury.logger_fails is not None
    return models.trainer(
        [injury, *callbacks, *extra],
        max_steps=plan.steps,
        max_epochs=-1,
        log_every_n_steps=plan.every,
        accumulate_grad_batches=plan.accumulate,
        logger=HurtLogger(injury) if needs_logger else Quiet(),
        default_root_dir=injury.run_folder,
        **arguments,
    )
