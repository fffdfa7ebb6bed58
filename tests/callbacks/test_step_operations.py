"""What the monitors add to a step is counted: calls of torch's operators, and values that the host waits for."""

from collections import Counter
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lightning_qk import (
    AttentionMonitor,
    HiddenStateMonitor,
    LocAteR,
    PositionMonitor,
    QKSpectrumMonitor,
    SinkMonitor,
    TokenMonitor,
)
from lightning_qk.functional import precision

MOST, MOST_A_LAYER = 2500, 45
# What makes the host wait for an accelerator, wherever the tensors are in this test.
WAITING = (
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::unique_dim",
    "aten::_unique2",
    "aten::equal",
    "aten::repeat_interleave",
)
MOST_OF_LIMIT, MOST_OF_TOKENS_A_LAYER = 250, 5
MOST_OF_LOCATER, MORE_WITH_NORMS, MORE_WITH_LATENTS = 60, 20, 50


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func._schema.name] += 1
        if func._schema.name == "aten::index" and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        ):
            self.calls["aten::nonzero"] += 1  # which it calls
        return func(*args, **(kwargs or {}))


class _Job(LightningModule):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return self.network(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-3)


def _llama(layers: int) -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=32,
            vocab_size=32,
            max_position_embeddings=64,
        )
    )


def _gpt2(layers: int) -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=32, n_layer=layers, n_head=4, vocab_size=32, n_positions=64, bos_token_id=0, eos_token_id=0
        )
    )


_SMALL = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 32, "max_position_embeddings": 64}


def _mla(layers: int) -> nn.Module:
    """Queries and keys are compressed, with norms within."""
    config = DeepseekV3Config(
        **_SMALL,
        num_hidden_layers=layers,
        first_k_dense_replace=layers,  # no experts
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    return DeepseekV3ForCausalLM(config)


def _with_norms(layers: int) -> nn.Module:
    """Norms of queries and keys."""
    config = Qwen3Config(
        **_SMALL, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, head_dim=8
    )
    return Qwen3ForCausalLM(config)


def _steps(
    network: nn.Module, callbacks: list[Callback], monkeypatch: pytest.MonkeyPatch, logged: int = 1
) -> list[Counter[str]]:
    """What each step after the first, in which layers are checked, calls."""
    found: list[Counter[str]] = []
    trainer = Trainer(
        max_steps=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=logged,
        callbacks=callbacks,
    )
    loop = trainer.fit_loop.epoch_loop
    advance = loop.advance

    def counted(*args: Any, **kwargs: Any) -> None:
        if not trainer.global_step:
            advance(*args, **kwargs)
            return
        with _Count() as count:
            advance(*args, **kwargs)
        found.append(count.calls)

    monkeypatch.setattr(loop, "advance", counted)
    trainer.fit(_Job(network), torch.utils.data.DataLoader(torch.randint(0, 32, (6, 64)), batch_size=2))
    return found


def waits(calls: Counter[str]) -> int:
    return sum(calls[name] for name in WAITING)


@pytest.fixture
def as_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values are not looked at where that costs nothing on the CPU alone."""
    monkeypatch.setattr(precision, "_READABLE", ())


def _monitors(every: int) -> list[Callback]:
    kinds = (QKSpectrumMonitor, AttentionMonitor, HiddenStateMonitor)
    return [kind(every, report=False) for kind in kinds]


@pytest.mark.parametrize(
    "make", [_llama, _gpt2, *(pytest.param(make, marks=pytest.mark.slow) for make in (_mla, _with_norms))]
)
def test_a_measured_step(make: Any, monkeypatch: pytest.MonkeyPatch, as_on_an_accelerator: None) -> None:
    added = {}
    for layers in (12, 24):
        plain = _steps(make(layers), [], monkeypatch)[0]
        measured = _steps(make(layers), _monitors(1), monkeypatch)[-1]
        added[layers] = measured.total() - plain.total()
        assert waits(measured) == waits(plain)
    assert 0 < added[24] <= MOST
    assert added[24] - added[12] <= 12 * MOST_A_LAYER


@pytest.mark.parametrize(("kind", "most"), [(SinkMonitor, 1), (TokenMonitor, 1), (PositionMonitor, 10)])
def test_waits_of_other_monitors(
    kind: Any, most: int, monkeypatch: pytest.MonkeyPatch, as_on_an_accelerator: None
) -> None:
    """In each layer."""
    monitor = kind(1, report=False, **({"predict_every": 0} if kind is TokenMonitor else {}))
    assert waits(_steps(_llama(3), [monitor], monkeypatch)[-1]) <= 3 * most


def test_a_step_that_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = _steps(_llama(3), [], monkeypatch)
    watched = _steps(_llama(3), _monitors(100), monkeypatch)
    assert watched[0] == plain[0]


@pytest.mark.parametrize(
    ("make", "more"), [(_llama, 0), (_gpt2, 0), (_with_norms, MORE_WITH_NORMS), (_mla, MORE_WITH_LATENTS)]
)
def test_a_step_of_locater(make: Any, more: int, monkeypatch: pytest.MonkeyPatch) -> None:
    added = []
    for layers in (2, 5):
        plain = _steps(make(layers), [], monkeypatch, logged=100)[-1]
        (*_, penalized) = _steps(make(layers), [LocAteR(0.1)], monkeypatch, logged=100)
        added.append(penalized.total() - plain.total())
        assert penalized["aten::_local_scalar_dense"] == plain["aten::_local_scalar_dense"]
    assert 0 < added[0] == added[1] <= MOST_OF_LOCATER + more


@pytest.mark.parametrize(
    ("make", "more", "more_a_layer"),
    [
        (_llama, 0, 0),
        (_gpt2, 0, 5),
        (_with_norms, 100, 9),
        pytest.param(_mla, 200, 13, marks=pytest.mark.slow),
    ],
)
def test_a_step_of_the_limit_form(
    make: Any, more: int, more_a_layer: int, monkeypatch: pytest.MonkeyPatch, as_on_an_accelerator: None
) -> None:
    """Tokens are taken in each layer's forward, and looked at together; biases and norms are read in each."""
    added = {}
    for layers in (2, 5):
        plain = _steps(make(layers), [], monkeypatch, logged=100)[-1]
        (*_, penalized) = _steps(make(layers), [LocAteR()], monkeypatch, logged=100)
        added[layers] = penalized.total() - plain.total()
        assert waits(penalized) == waits(plain)
    assert added[5] - added[2] <= 3 * (MOST_OF_TOKENS_A_LAYER + more_a_layer)
    assert added[5] <= MOST_OF_LIMIT + more
