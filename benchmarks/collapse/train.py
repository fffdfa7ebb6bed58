"""Train one run and keep its losses and what the monitors see, as plain JSON."""

import logging
import tempfile
import time
import warnings
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from runs import FAMILIES, Run
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_qk import (
    AttentionMonitor,
    QKSpectrumMonitor,
    TextDataModule,
    TransformerModule,
    head_projections,
)
from lightning_qk.callbacks.guard._watch import HiddenCosine


def _prepare(network: nn.Module, run: Run) -> None:
    """Scale weights at the start."""
    with torch.no_grad():
        if run.init_scale != 1:
            for name, parameter in network.named_parameters():
                if parameter.dim() == 2 and "layer" in name.replace(".h.", ".layer."):
                    parameter.mul_(run.init_scale)
        for layer in head_projections(network).values():  # views of the live weights
            layer.query.mul_(run.qk_scale * run.query_scale)
            layer.key.mul_(run.qk_scale)


def _blocks(network: nn.Module) -> list[nn.Module]:
    for name in ("h", "layers", "layer"):
        for module in network.modules():
            found = getattr(module, name, None)
            if isinstance(found, nn.ModuleList):
                return list(found)
    raise ValueError(f"expected a model of stacked layers, got {type(network).__name__}")


class Module(TransformerModule):
    """The ready-made module with what drives a run into failure."""

    def __init__(self, run: Run, model: dict[str, Any], task: str) -> None:
        super().__init__(
            model,
            task,
            lr=run.lr,
            betas=run.betas,
            schedule="constant",
            warmup_steps=run.warmup,
        )
        self.run = run
        self.random = torch.Generator().manual_seed(run.seed)
        self.steps_done = 0

    def configure_model(self) -> None:
        built = self.model is not None
        super().configure_model()
        if not built:
            self.distort()

    def distort(self) -> None:
        """What the run's model is from the start on."""
        run = self.run
        _prepare(self.network, run)
        if run.skip != 1:
            for block in _blocks(self.network):
                block.register_forward_hook(self._weaken)
        if run.rounding == "fp16":
            self.network.set_attn_implementation("half_products")

    def _weaken(self, layer: Any, given: tuple[Tensor, ...], output: Any) -> Any:
        less = (1 - self.run.skip) * given[0]
        return (output[0] - less, *output[1:]) if isinstance(output, tuple) else output - less

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        run, step = self.run, self.global_step
        batch = dict(batch)
        if run.garbage and run.garbage[0] <= step < run.garbage[1]:
            batch = self._replace(batch, 1.0)
        elif run.wrong_inputs:
            batch = self._replace(batch, run.wrong_inputs)
        return super().training_step(batch, batch_idx)

    def _replace(self, batch: dict[str, Tensor], share: float) -> dict[str, Tensor]:
        name = "input_ids" if "input_ids" in batch else "pixel_values"
        given = batch[name]
        where = torch.rand(given.shape, generator=self.random) < share
        if name == "input_ids":
            other = torch.randint(0, self.network.config.vocab_size, given.shape, generator=self.random)
            replaced = torch.where(where, other, given)
            labels = batch["labels"]
            if self.task == "causal_lm":
                labels = torch.where(labels >= 0, replaced, labels)
            return {**batch, name: replaced, "labels": labels}
        return {**batch, name: torch.where(where, torch.randn(given.shape, generator=self.random), given)}

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        factor = 1.0
        if self.run.ramp is not None:
            begin, end, peak = self.run.ramp
            factor += (peak - 1) * min(1.0, max(0.0, (self.global_step - begin) / (end - begin)))
        for group in optimizer.param_groups:
            group["lr"] *= factor
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        for group in optimizer.param_groups:
            group["lr"] /= factor
        if self.run.rounding == "bf16_weights":
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.copy_(parameter.bfloat16())


def half_products(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention whose products are rounded to half precision before they are scaled: infinite above 65 504."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    products = query @ key.transpose(-1, -2)
    rounded = products + (products.detach().half().float() - products.detach())
    logits = rounded * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    causal = getattr(module, "is_causal", True) and query.shape[2] > 1
    if attention_mask is not None:
        logits = logits + attention_mask[..., : key.shape[2]]
    elif causal:
        hidden = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(1)
        logits = logits.masked_fill(hidden, -torch.inf)
    return (logits.softmax(-1) @ value).transpose(1, 2).contiguous(), None


class Record(L.Callback):
    """Keeps losses, gradient norms and the cosines of tokens."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.loss: list[float] = []
        self.gradient: list[float] = []
        self.cosine: dict[str, list[Any]] = {"steps": [], "values": []}
        self._hidden: HiddenCosine | None = None

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        self._hidden = HiddenCosine(module)

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        assert self._hidden is not None
        if (trainer.global_step + 1) % self.every == 0:
            self._hidden.listen(batch)

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        norms = [p.grad.norm() for p in module.parameters() if p.grad is not None]
        self.gradient.append(float(torch.stack(norms).norm()))

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        assert self._hidden is not None
        self.loss.append(float(outputs["loss"]))
        self._hidden.stop()
        if trainer.global_step % self.every == 0:
            self.cosine["steps"].append(trainer.global_step)
            total, count = self._hidden.take(module.device).T
            self.cosine["values"].append((total / count).tolist())


def _data(run: Run, cache: str) -> dict[str, Any]:
    fields = dict(FAMILIES[run.family]["data"])
    if run.batch_size is not None:
        fields["batch_size"] = run.batch_size
    if run.family != "vit":
        text = TextDataModule(
            "stdlib", FAMILIES[run.family]["task"], "bytes", seed=run.seed, cache_dir=cache, **fields
        )
        return {"datamodule": text}
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    targets = torch.tensor(labels)
    fixed = torch.Generator().manual_seed(0)
    wrong = torch.rand(len(targets), generator=fixed) < fields["wrong_labels"]
    targets = torch.where(wrong, torch.randint(0, 10, targets.shape, generator=fixed), targets)
    examples = [
        {"pixel_values": image, "labels": target} for image, target in zip(images, targets, strict=True)
    ]
    order = torch.Generator().manual_seed(run.seed)
    loader = DataLoader(
        examples,
        batch_size=fields["batch_size"],
        shuffle=True,
        drop_last=True,
        generator=order,  # type: ignore[arg-type]
    )
    return {"train_dataloaders": loader}


def train(run: Run, cache: str, extra: Sequence[L.Callback] = (), monitors: bool = True) -> dict[str, Any]:
    """Train a run; its losses at all steps and the monitors' numbers at its cadence."""
    import transformers

    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.AttentionInterface.register("half_products", half_products)
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    AttentionMaskInterface.register("half_products", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    torch.set_num_threads(1)
    start = time.process_time()
    record = Record(run.every)
    every = run.every
    spectrum = QKSpectrumMonitor(every, singular=True, updates=True, figures_every=0, report=False)
    attention = AttentionMonitor(every, rows=16, every_n_eval_batches=0, figures_every=0, report=False)
    with tempfile.TemporaryDirectory() as folder:
        ends = [run.steps] if run.resume is None else [run.resume, run.steps]
        path = None
        for end in ends:
            L.seed_everything(run.seed, verbose=False)
            family = FAMILIES[run.family]
            module = Module(run, {**family["model"], family["depth"]: run.layers}, family["task"])
            callbacks = [*([attention, spectrum] if monitors else []), record, *extra]
            trainer = L.Trainer(
                max_steps=end,
                max_epochs=-1,
                callbacks=callbacks,
                gradient_clip_val=run.clip,
                log_every_n_steps=every,
                limit_val_batches=0,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                accelerator="cpu",
                devices=1,
                default_root_dir=folder,
            )
            trainer.fit(module, **_data(run, cache), ckpt_path=path, weights_only=False)
            path = f"{folder}/end.ckpt"
            trainer.save_checkpoint(path)
            if run.fresh_optimizer:
                kept = torch.load(path, weights_only=False)
                for state in kept["optimizer_states"]:
                    state["state"] = {}
                torch.save(kept, path)
    out: dict[str, Any] = {
        "name": run.name,
        "loss": record.loss,
        "gradient": record.gradient,
        "cosine": record.cosine,
        "seconds": time.process_time() - start,
    }
    if monitors:
        for group, history in (("attention", attention.history), ("spectrum", spectrum.history)):
            assert history is not None
            out[group] = {
                "steps": history.steps,
                "heads": list(history.heads),
                "layers": list(history.layers),
            }
            out[group]["values"] = {
                name: [[float(f"{x:.5g}") for x in row] for row in history.series(name).tolist()]
                for name in history.values
                if not name.endswith("_se")
            }
    return out
