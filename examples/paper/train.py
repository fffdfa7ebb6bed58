"""Train one configuration of one setting and return its numbers; nothing here compares anything."""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from baselines import EntropyReward, PenalizedModule, QKWeightDecay, register_entropy_attention
from material import decoder, digits, encoder, sentences, words
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_qk import AttentionMonitor, EntropyBand, LocAteR, QKClip, QKSpectrumMonitor, TextDataModule

_ATTENTION = {
    "entropy": "entropy_normalized/mean",
    "sink": "sink_first/mean",
    "max_logit": "max_abs_logit/max",
}
"""What is kept of the attention on held-out text, and its key."""

SPECTRA = ("sym_var", "eig_mean", "frobenius_sq", "concentration")

_CURVE_BATCHES = 10


def train(config: Mapping[str, Any], data: Path | None, cache: Path) -> dict[str, Any]:
    """Train, evaluate and measure one configuration.

    Args:
        config: from :func:`settings.configuration`.
        data: folder with ``wikitext-2/`` and ``sst2/``; None: from the hub.
        cache: folder for prepared data.

    Returns:
        ``test``: loss and perplexity or accuracy on the test part, ``choose`` on the other held-out part (where
        it is among the configuration's ``parts``);
        ``entropy`` (normalized) and ``similarity`` (mean cosine of the tokens' last hidden states) on the test
        part, as ``sink`` (the first token's share) and ``max_logit``; with LocAteR its ``weight`` and last
        ``penalty``; ``processor_seconds`` of all of it. Unless ``watched`` is false: ``train_loss`` over the last
        tenth of the steps, without the penalty; ``spectrum``: means over heads after ``steps``; ``cpu_seconds``:
        the median step's; ``curve``: losses on a few batches of the part to choose by, after steps.
    """
    start = time.process_time()
    pl.seed_everything(config["seed"], verbose=False)
    module = _module(config, cache)
    loaders = _data(config, data, cache)
    steps = config["steps"]
    every = max(1, steps // 10)
    watched = config.get("watched", True)
    spectrum = QKSpectrumMonitor(every, figures_every=0, report=False)
    watch = _StepWatch(steps)
    attended = AttentionMonitor(every, rows=16, every_n_eval_batches=0, figures_every=0, report=False)
    has_curve = "choose" in config["parts"] and config.get("curve", True)
    trained_by = [*((spectrum, attended, watch) if watched else ()), *_callbacks(config)]
    trained = _trainer(
        callbacks=trained_by,
        max_steps=steps,
        log_every_n_steps=every,
        limit_val_batches=_CURVE_BATCHES if has_curve else 0,
        val_check_interval=max(1, steps // 8),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
    )
    trained.fit(module, **_given(loaders, "train"))
    batches = config.get("evaluate_batches")
    results: dict[str, Any] = {}
    for part in config["parts"]:
        attention, similarity = AttentionMonitor(report=False, every_n_eval_batches=4), TokenSimilarity(4)
        callbacks = [attention, similarity] if watched else [attention]
        trainer = _trainer(callbacks=callbacks, limit_val_batches=batches, limit_test_batches=batches)
        # Lightning's loops are called val and test: the part to choose by is the first.
        run = trainer.validate if part == "choose" else trainer.test
        (scores,) = run(module, verbose=False, **_given(loaders, part))
        results[part] = {name.partition("/")[2]: value for name, value in scores.items()}
        stage = "val" if part == "choose" else "test"
        for own, name in _ATTENTION.items():
            results[own] = float(trainer.callback_metrics.get(f"attn/{stage}/{name}", torch.tensor(math.nan)))
        if watched:
            results["similarity"] = similarity.mean()
    if watched:
        results["spectrum"] = _spectrum(spectrum, attended)
        results |= {"train_loss": watch.loss(), "curve": watch.curve, "cpu_seconds": watch.seconds()}
    for locater in trained_by:
        if isinstance(locater, LocAteR):
            results["weight"] = locater.current_weight(steps)
            results["penalty"] = float(trained.callback_metrics["locater/penalty"])
    results["processor_seconds"] = time.process_time() - start
    return results


def _spectrum(spectrum: QKSpectrumMonitor, trained: AttentionMonitor) -> dict[str, list[float]]:
    history, attended = spectrum.history, trained.history
    assert history is not None
    assert attended is not None
    return {
        # Loggers count steps from 0, and the monitor calls the start step −1.
        "steps": [step + 1 for step in history.steps],
        **{name: history.series(name).mean(-1).tolist() for name in SPECTRA},
        "abs_eig_mean": history.series("eig_mean").abs().mean(-1).tolist(),
        "entropy_steps": [step + 1 for step in attended.steps],
        "entropy": attended.series("entropy_normalized").nanmean(-1).tolist(),
    }


class TokenSimilarity(pl.Callback):
    """Mean cosine of the last hidden states of two tokens of one sequence, on every n-th evaluation batch.

    1 is full rank collapse. Padding does not count.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._values: list[Tensor] = []
        self._handle: Any = None

    def mean(self) -> float:
        """Over all sequences seen."""
        return torch.cat(self._values).mean().item()

    def on_test_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        """Listen to every n-th batch."""
        if batch_idx % self.every == 0:
            base = module.network.base_model
            base = getattr(base, "decoder", base)  # OPT's head calls it past what is around it
            self._handle = base.register_forward_hook(self._hear, with_kwargs=True)

    def on_test_batch_end(self, *_: Any) -> None:
        """Stop listening."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    on_validation_batch_start = on_test_batch_start
    on_validation_batch_end = on_test_batch_end

    def _hear(self, base: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        self._values.append(token_similarity(output.last_hidden_state, kwargs.get("attention_mask")))


def token_similarity(hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean cosine of two different tokens of each sequence that has two.

    Args:
        hidden: shape ``(batch, tokens, width)``.
        mask: ``(batch, tokens)``, 0 where a token does not count.

    Returns:
        Shape ``(sequences,)``. With unit vectors u: ``(‖Σ u‖² − T) / (T² − T)``.
    """
    unit = nn.functional.normalize(hidden.float(), dim=-1)
    counted = torch.ones(hidden.shape[:2]) if mask is None else mask.float()
    tokens = counted.sum(-1)
    total = (unit * counted[..., None]).sum(1).square().sum(-1)
    return ((total - tokens) / (tokens.square() - tokens))[tokens > 1]


class _StepWatch(pl.Callback):
    """Processor time of each step, the training loss of the last ones, and held-out losses on the way."""

    def __init__(self, steps: int) -> None:
        self.curve: dict[str, list[float]] = {"steps": [], "loss": []}
        self._from = steps - max(1, steps // 10)
        self._seconds: list[float] = []
        self._losses: list[float] = []
        self._start = 0.0

    def seconds(self) -> float:
        return torch.tensor(self._seconds).median().item()

    def loss(self) -> float:
        return sum(self._losses) / len(self._losses)

    def on_validation_epoch_end(self, trainer: Any, module: Any) -> None:
        self.curve["steps"].append(trainer.global_step)
        self.curve["loss"].append(float(module.metrics["val"]["loss"].compute()))

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self._start = time.process_time()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._seconds.append(time.process_time() - self._start)
        if trainer.global_step > self._from:
            self._losses.append(float(trainer.callback_metrics["train/loss"]))


def _module(config: Mapping[str, Any], cache: Path) -> PenalizedModule:
    method, coefficient = config["method"], config["coefficient"]
    # Everyone's attention is eager, so that dropout draws the same random numbers under every method.
    attention = register_entropy_attention() if method == "entropy" else "eager"
    model: str | dict[str, Any]
    if isinstance(config["model"], str):
        model = str(decoder(cache)) if config["model"].startswith("SmolLM2") else encoder()
    else:
        model = dict(config["model"])
        if method == "qk_norm":  # Qwen3 is Llama with a norm on queries and keys
            model |= {
                "model_type": "qwen3",
                "head_dim": model["hidden_size"] // model["num_attention_heads"],
            }
    module = PenalizedModule(model, config["task"], attn_implementation=attention, **config["optimizer"])
    if method == "weight_decay":
        module.penalty = QKWeightDecay(coefficient)
    elif method == "entropy":
        module.penalty = EntropyReward(coefficient)
    module.reparametrize = method == "sigma_reparam"
    module.torch_initialization = config.get("initialization") == "torch"
    module.qk_init = config.get("qk_init", 1.0)
    module.logs_steps = config.get("watched", True)
    module.lora_rank = config.get("lora")
    return module


def _callbacks(config: Mapping[str, Any]) -> list[pl.Callback]:
    method, coefficient = config["method"], config["coefficient"]
    if method == "qk_clip":
        return [QKClip(coefficient)]
    if method == "entropy_band":
        return [EntropyBand(weight=coefficient)]
    if method == "plain_share":
        return [LocAteR(coefficient)]
    if method in ("variance", "target"):
        return [LocAteR(coefficient, form=method)]
    if method == "limit":
        return [LocAteR(coefficient, form="limit")]
    if method in ("tokens", "share"):
        return [LocAteR(coefficient, sigma="tokens")]
    if method == "raised":
        n = config["model"]["hidden_size"]
        return [LocAteR(coefficient, form="target", target=n**0.5 / n, nu=float(n))]
    return []


def _trainer(**arguments: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )


def _given(loaders: "TextDataModule | dict[str, DataLoader]", part: str) -> dict[str, Any]:
    """Arguments of the trainer's methods."""
    if isinstance(loaders, TextDataModule):
        return {"datamodule": loaders}
    return {"train_dataloaders" if part == "train" else "dataloaders": loaders[part]}


def _data(config: Mapping[str, Any], data: Path | None, cache: Path) -> Any:
    fields = dict(config["data"])
    kind = fields.pop("kind")
    if kind == "digits":
        return digits(config["seed"], **fields)
    make = words if kind == "words" else sentences
    if str(config["model"]).startswith("SmolLM2"):
        fields["tokenizer"] = str(decoder(cache))
    return make(data, cache, seed=config["seed"], **fields)
