"""Toy transformers and LightningModules for the tests of capture, metrics and callbacks."""

import functools
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
import transformers
from lightning.fabric.utilities import registry
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultMetric
from torch import Tensor, nn
from torch.utils.data import DataLoader

VOCABULARY = 50

# Two things that Lightning does for each trainer and each logged value, to no effect here, took a good part of the
# tests' time: looking for plug-ins of all installed packages, and moving what is kept of a value to where it is.
registry.entry_points = functools.cache(registry.entry_points)
_move = _ResultMetric.to


def _move_elsewhere(metric: _ResultMetric, *args: Any, **kwargs: Any) -> _ResultMetric:
    is_there = not kwargs and metric.is_tensor and args == (metric.value.device,)
    return metric if is_there else _move(metric, *args, **kwargs)


_ResultMetric.to = _move_elsewhere


def gpt2(**kwargs: Any) -> nn.Module:
    config = transformers.GPT2Config(
        n_layer=2, n_head=4, n_embd=32, vocab_size=VOCABULARY, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    return build(transformers.GPT2LMHeadModel, config, **kwargs)


def bert(**kwargs: Any) -> nn.Module:
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
    )
    return build(transformers.BertForMaskedLM, config, **kwargs)


def llama(**kwargs: Any) -> nn.Module:
    """Grouped queries, rotary positions."""
    return build(transformers.LlamaForCausalLM, transformers.LlamaConfig(**_GROUPED), **kwargs)


def mistral(**kwargs: Any) -> nn.Module:
    """A sliding window shorter than the sequences."""
    config = transformers.MistralConfig(**_GROUPED, sliding_window=5)
    return build(transformers.MistralForCausalLM, config, **kwargs)


def gpt_oss(**kwargs: Any) -> nn.Module:
    """A learnt sink a head, windows in every second layer."""
    config = transformers.GptOssConfig(
        **{**_GROUPED, "head_dim": 8},
        sliding_window=5,
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=["sliding_attention", "full_attention"],
    )
    return build(transformers.GptOssForCausalLM, config, **kwargs)


def gemma2(**kwargs: Any) -> nn.Module:
    """Soft-capped logits and a scale of its own."""
    config = transformers.Gemma2Config(
        **{**_GROUPED, "head_dim": 8}, attn_logit_softcapping=2.0, query_pre_attn_scalar=5, sliding_window=5
    )
    return build(transformers.Gemma2ForCausalLM, config, **kwargs)


def t5(**kwargs: Any) -> nn.Module:
    """Encoder, decoder and cross-attention, with a position bias."""
    config = transformers.T5Config(
        d_model=32,
        d_kv=8,
        num_heads=4,
        num_layers=2,
        d_ff=64,
        vocab_size=VOCABULARY,
        decoder_start_token_id=0,
    )
    return build(transformers.T5ForConditionalGeneration, config, **kwargs)


_GROUPED: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(kind: Any, config: Any, *, attn_implementation: str | None = None, **kwargs: Any) -> nn.Module:
    """A model whose weights are large enough for attention that is far from uniform.

    Skips the test where the installed transformers has no such attention for this model; None: sdpa, where the
    model has it.
    """
    flag = {"sdpa": "_supports_sdpa", "flex_attention": "_supports_flex_attn"}.get(attn_implementation or "")
    if flag is not None and not getattr(kind, flag):
        pytest.skip(f"{kind.__name__} of this transformers has no {attn_implementation}")
    model = kind._from_config(config, attn_implementation=attn_implementation, **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model


class Job(L.LightningModule):
    """An existing job that has never heard of this project; the model hangs somewhere inside."""

    def __init__(
        self,
        model: nn.Module | None = None,
        lr: float = 1e-3,
        loss: Callable[["Job"], Tensor] | None = None,
        optimizer: str = "sgd",
    ) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"network": gpt2() if model is None else model})
        self.lr = lr
        self.extra_loss = loss
        self.optimizer = optimizer
        self.losses: list[Tensor] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.inner["network"](input_ids=batch, labels=batch).loss
        self.losses.append(loss.detach().clone())
        if self.extra_loss is not None:
            loss = loss + self.extra_loss(self)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", self.inner["network"](input_ids=batch, labels=batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[self.optimizer]
        return kind(self.parameters(), lr=self.lr)


def tokens(count: int = 32, length: int = 16, batch_size: int = 4) -> DataLoader:
    generator = torch.Generator().manual_seed(5)
    data = torch.randint(3, VOCABULARY, (count, length), generator=generator)
    return DataLoader(data, batch_size=batch_size)


def trainer(callbacks: list[L.Callback], **kwargs: Any) -> L.Trainer:
    arguments: dict[str, Any] = {
        "max_steps": 4,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
        **kwargs,
    }
    return L.Trainer(callbacks=callbacks, **arguments)
