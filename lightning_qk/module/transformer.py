"""The ready-made LightningModule: any Hugging Face model for one of four tasks."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_qk.module.network import (
    AUTO_CLASS,
    check_length,
    config_from_text,
    config_to_text,
    make_config,
    network_from_config,
    network_from_pretrained,
    shard_network,
    whole_state,
)
from lightning_qk.tasks import CLASSIFICATION_TASKS, check_task

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_SCHEDULES = {
    "constant": "get_constant_schedule_with_warmup",
    "linear": "get_linear_schedule_with_warmup",
    "cosine": "get_cosine_schedule_with_warmup",
}
_CONFIG_KEY = "transformer_config"


class TransformerModule(pl.LightningModule):
    """A Hugging Face model that trains, is evaluated and predicts.

    The network is built in :meth:`configure_model`, when the data module is set up: a model from a config
    takes its vocabulary size and special tokens from the tokenizer, and a classifier its classes from the
    labels. A checkpoint holds the resulting config, so that ``load_from_checkpoint`` needs neither the data
    nor the pretrained weights.

    Logged: ``train/loss`` and ``lr`` on steps; ``val/loss`` and ``test/loss``; ``…/perplexity`` for language
    models; ``…/accuracy`` and ``…/f1`` (the mean over classes) for classification, with two classes also
    ``…/f1_binary`` (that of the second class).

    Args:
        model: a folder or a name on the Hugging Face hub, for pretrained weights; or the fields of a config
            with ``model_type`` among them (``{"model_type": "gpt2", "n_layer": 2}``), for random ones.
        task: ``"causal_lm"``, ``"masked_lm"``, ``"sequence_classification"`` or ``"image_classification"``. Images
            come from any loader of dicts with ``pixel_values`` (batch, channels, height, width) and ``labels``
            (batch,); the config says how many classes there are, or ``label_names`` of the data module.
        lr: peak learning rate of AdamW.
        betas: of AdamW.
        weight_decay: of AdamW, on matrices only: biases and norms have none.
        schedule: ``"constant"``, ``"linear"`` (down to zero) or ``"cosine"`` (down to zero).
        warmup_steps: optimizer steps over which the learning rate rises from zero.
        warmup_ratio: the same as a share of all optimizer steps; give one of the two.
        attn_implementation: ``"eager"``, ``"sdpa"``, …; None is what transformers picks.
        gradient_checkpointing: compute activations twice to save memory.
        save_pretrained_to: folder for the model and its tokenizer when fitting ends.

    Raises:
        ValueError: an argument is out of range. :meth:`configure_model` raises it for a model that does not
            exist or does not fit the data.
    """

    def __init__(
        self,
        model: str | dict[str, Any],
        task: str = "causal_lm",
        *,
        lr: float = 5e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
        schedule: str = "linear",
        warmup_steps: int = 0,
        warmup_ratio: float = 0.0,
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        save_pretrained_to: str | None = None,
    ) -> None:
        super().__init__()
        check_task(task)
        if schedule not in _SCHEDULES:
            raise ValueError(
                f"expected a schedule out of {', '.join(_SCHEDULES)}, got {schedule!r}: correct it"
            )
        if not lr > 0:
            raise ValueError(f"expected a learning rate above 0, got {lr}: correct lr")
        if warmup_steps < 0 or not 0 <= warmup_ratio < 1:
            raise ValueError(
                f"expected warmup_steps of at least 0 and a warmup_ratio in [0, 1), got {warmup_steps} and "
                f"{warmup_ratio}: correct them"
            )
        if warmup_steps and warmup_ratio:
            raise ValueError(
                f"expected warmup_steps or warmup_ratio, got both ({warmup_steps} and {warmup_ratio}): drop "
                "one"
            )
        self.save_hyperparameters()
        self.pretrained = model if isinstance(model, str) else None
        self.fields = model if isinstance(model, dict) else {}
        self.task = task
        self.lr = lr
        self.betas = betas
        self.weight_decay = weight_decay
        self.schedule = schedule
        self.warmup_steps = warmup_steps
        self.warmup_ratio = warmup_ratio
        self.attn_implementation = attn_implementation
        self.gradient_checkpointing = gradient_checkpointing
        self.save_pretrained_to = save_pretrained_to
        self.model: PreTrainedModel | None = None
        self.metrics = nn.ModuleDict()

    @property
    def network(self) -> "PreTrainedModel":
        """The Hugging Face model.

        Raises:
            ValueError: it is not built yet.
        """
        if self.model is None:
            raise ValueError(
                "expected a network that is built, got a TransformerModule that has not met its data yet: "
                "fit or validate it with a Trainer, or use load_from_checkpoint"
            )
        return self.model

    @property
    def label_names(self) -> list[str]:
        """Names of the classes in the order of the logits."""
        names: Any = self.network.config.id2label
        return [names[index] for index in range(len(names))]

    def configure_model(self) -> None:
        """Build the network, once, and shard it where the strategy is Lightning's ModelParallelStrategy.

        Without a trainer nothing is known of the data, and nothing is built.
        """
        trainer = self._trainer
        if self.model is not None or trainer is None:
            return
        data = getattr(trainer, "datamodule", None)
        tokenizer = getattr(data, "tokenizer", None)
        labels = getattr(data, "label_names", None) if self.task in CLASSIFICATION_TASKS else None
        if self.pretrained:
            network = network_from_pretrained(
                self.pretrained, self.task, tokenizer, labels, self.attn_implementation
            )
        else:
            config = make_config(self.fields, tokenizer, labels)
            network = network_from_config(config, self.task, self.attn_implementation)
        self._attach(network)
        length = "max_length" if self.task == "sequence_classification" else "block_size"
        check_length(network, getattr(data, length, 0))
        mesh = getattr(self, "_device_mesh", None)
        if mesh is not None:
            shard_network(network, mesh)

    def _attach(self, network: "PreTrainedModel") -> None:
        network.train()  # from_pretrained returns it in evaluation mode
        if self.task == "causal_lm" and getattr(network, "loss_type", "") is None:
            network.loss_type = "ForCausalLM"  # what it falls back to, without its warning
        # A cache of keys and values is for generating; checkpoints and exports keep what the model came with.
        self._use_cache = getattr(network.config, "use_cache", None)
        if self._use_cache is not None:
            network.config.use_cache = False
        if self.gradient_checkpointing:
            # Newer versions of transformers have another name for it.
            if hasattr(network, "activation_checkpointing_enable"):
                network.activation_checkpointing_enable()
            else:
                network.gradient_checkpointing_enable()
        self.model = network
        for stage in ("val", "test"):
            self.metrics[stage] = self._make_metrics(network.config.num_labels or 0)

    def _make_metrics(self, num_labels: int) -> nn.ModuleDict:
        metrics = nn.ModuleDict({"loss": MeanLoss()})
        if self.task not in CLASSIFICATION_TASKS:
            metrics["perplexity"] = Perplexity()
            return metrics
        from torchmetrics.classification import BinaryF1Score, MulticlassAccuracy, MulticlassF1Score

        metrics["accuracy"] = MulticlassAccuracy(num_labels, average="micro")
        metrics["f1"] = MulticlassF1Score(num_labels, average="macro")
        if num_labels == 2:
            metrics["f1_binary"] = BinaryF1Score()
        return metrics

    def forward(self, **inputs: Tensor) -> Any:
        """Call the network with keyword arguments, as its own ``forward`` takes them."""
        return self.network(**inputs)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of a batch."""
        loss = self(**batch).loss
        size = len(batch["labels"])
        self.log("train/loss", loss, prog_bar=True, batch_size=size)
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"], batch_size=size)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Update and log the metrics under ``val/``."""
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Update and log the metrics under ``test/``."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: dict[str, Tensor], stage: str) -> None:
        output = self(**batch)
        labels = batch["labels"]
        # A causal model predicts the next token, so the first one is never a target.
        targets = labels[:, 1:] if self.task == "causal_lm" else labels
        count = (targets != -100).sum()
        metrics: Any = self.metrics[stage]
        for name, metric in metrics.items():
            if isinstance(metric, MeanLoss):
                metric.update(output.loss, count)
            else:
                metric.update(output.logits.argmax(dim=-1), labels)
            shown = name in ("perplexity", "accuracy")
            self.log(
                f"{stage}/{name}",
                metric,
                prog_bar=shown,
                on_step=False,
                on_epoch=True,
                batch_size=len(labels),
            )

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """Predictions for a batch.

        Returns:
            ``logits``: ``(batch, labels)`` or ``(batch, tokens, vocabulary)``; ``predictions``: the arg max;
            and for classification ``labels``: the names of the predicted classes.
        """
        logits = self(**{name: value for name, value in batch.items() if name != "labels"}).logits
        predictions = logits.argmax(dim=-1)
        result: dict[str, Any] = {"logits": logits, "predictions": predictions}
        if self.task in CLASSIFICATION_TASKS:
            names = self.label_names
            result["labels"] = [names[index] for index in predictions.tolist()]
        return result

    def configure_optimizers(self) -> Any:
        """AdamW and a schedule that goes on with every optimizer step.

        Raises:
            ValueError: a schedule that ends in a run that does not.
        """
        import transformers

        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=self.lr, betas=(self.betas[0], self.betas[1])
        )
        options: dict[str, int] = {"num_warmup_steps": self.warmup_steps}
        if self.schedule != "constant" or self.warmup_ratio:
            steps = self.trainer.estimated_stepping_batches
            if steps == float("inf"):
                raise ValueError(
                    f"expected max_steps or max_epochs for the schedule {self.schedule!r}, got a run without "
                    "an end: set one of them, or schedule: constant with warmup_steps"
                )
            if self.warmup_ratio:
                options["num_warmup_steps"] = round(self.warmup_ratio * steps)
            if self.schedule != "constant":
                options["num_training_steps"] = int(steps)
        scheduler = getattr(transformers, _SCHEDULES[self.schedule])(optimizer, **options)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @contextmanager
    def _original_config(self) -> "Iterator[PreTrainedConfig]":
        config = self.network.config
        if self._use_cache is not None:
            config.use_cache = self._use_cache
        try:
            yield config
        finally:
            if self._use_cache is not None:
                config.use_cache = False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the network's config in the checkpoint."""
        with self._original_config() as config:
            checkpoint[_CONFIG_KEY] = config_to_text(config)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the network from the config in the checkpoint, where it is not there yet."""
        if self.model is None:
            config = config_from_text(checkpoint[_CONFIG_KEY])
            self._attach(network_from_config(config, self.task, self.attn_implementation))

    def on_fit_end(self) -> None:
        """Write the model to ``save_pretrained_to``, where it is set."""
        if not self.save_pretrained_to:
            return
        # Every process takes part where the weights are sharded.
        folder = self.export(self.save_pretrained_to)
        if self.trainer.is_global_zero:
            rank_zero_info(f"lightning-qk: the model is in {folder}: load it with {AUTO_CLASS[self.task]}")

    def export(self, folder: str | Path) -> Path:
        """Write the model, and the data module's tokenizer where there is one, as a Hugging Face folder.

        Under a trainer with several processes all of them call it, and the first one writes.

        Args:
            folder: made if it does not exist.

        Returns:
            The folder, to load with ``AutoModel….from_pretrained`` and ``AutoTokenizer.from_pretrained``.
        """
        state = whole_state(self.network)
        if self._trainer is not None and not self._trainer.is_global_zero:
            return Path(folder)
        with self._original_config():
            self.network.save_pretrained(folder, state_dict=state)
        tokenizer = getattr(getattr(self._trainer, "datamodule", None), "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return Path(folder)


class MeanLoss(Metric):
    """Mean of per-batch mean losses, each weighted by the number of its terms.

    Unlike :class:`torchmetrics.MeanMetric` it lets NaN through: a broken model is not reported as fine.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, loss: Tensor, count: Tensor | int) -> None:
        """Add a batch.

        Args:
            loss: mean over the batch's terms, in nats.
            count: number of terms; a batch with none does not count, whatever its loss.
        """
        weight = torch.as_tensor(count, dtype=self.count.dtype, device=self.count.device)
        self.total += torch.where(weight > 0, loss.detach().to(self.total.dtype) * weight, 0.0)
        self.count += weight

    def compute(self) -> Tensor:
        """The mean over all terms of all batches and processes."""
        return self.total / self.count


class Perplexity(MeanLoss):
    """exp of the mean negative log-likelihood of a token."""

    higher_is_better = False

    def compute(self) -> Tensor:
        """The perplexity over all tokens of all batches and processes."""
        return super().compute().exp()
