"""A compiled training with monitors has the graphs, and no more breaks, that it has without."""

import models
import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from lightning_qk import AttentionMonitor, HiddenStateMonitor, LocAteR, QKSpectrumMonitor


class Layer(nn.Module):
    """A user's own layer, which calls torch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x):
        query, key, value = (
            part(x).unflatten(-1, (4, 8)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return mixed.transpose(1, 2).flatten(2)


class Encoder(nn.Module):
    """Torch's own layer, in which the inputs are projected."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x):
        return self.heads(x, x, x, need_weights=False)[0]


class Block(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention, self.norm = attention, nn.LayerNorm(32)

    def forward(self, x):
        return x + self.attention(self.norm(x))


class Own(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.tokens = nn.Embedding(models.VOCABULARY, 32)
        self.layers = nn.ModuleList(Block(kind()) for _ in range(2))

    def forward(self, input_ids):
        x = self.tokens(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


KINDS = {
    "gpt2": models.gpt2,
    "llama": models.llama,
    "eager": lambda: models.llama(attn_implementation="eager"),
    "window": models.mistral,
    "own": lambda: Own(Layer),
    "encoder": lambda: Own(Encoder),
}


class Compiled(models.Job):
    """The network is compiled; what runs it is no part of the job."""

    def __init__(self, network: nn.Module, counter: CompileCounter, fullgraph: bool) -> None:
        super().__init__(network)
        self.run = [torch.compile(network, backend=counter, fullgraph=fullgraph)]

    def training_step(self, batch, batch_idx):
        output = self.run[0](input_ids=batch)
        return getattr(output, "logits", output).square().mean()


def graphs(kind: str, fullgraph: bool, callbacks) -> tuple[int, int]:
    """How many graphs were made in six steps, and how often one was broken off."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()
    network, counter = KINDS[kind](), CompileCounter()
    if hasattr(network, "config"):
        network.config.use_cache = False
    job = Compiled(network, counter, fullgraph)
    models.trainer(callbacks, logger=False, max_steps=6, limit_train_batches=6).fit(job, models.tokens())
    return counter.frame_count, sum(counters["graph_break"].values())


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests():
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("kind", "fullgraph"),
    [
        ("own", True),
        ("own", False),
        ("encoder", True),
        *(pytest.param(kind, True, marks=pytest.mark.slow) for kind in ("gpt2", "llama", "eager", "window")),
        *(pytest.param(kind, False, marks=pytest.mark.slow) for kind in ("gpt2", "llama", "encoder")),
    ],
)
def test_as_many_graphs_as_without_monitors(kind, fullgraph):
    monitors = [
        LocAteR(1e-3),
        QKSpectrumMonitor(every_n_steps=2, report=False),
        attention := AttentionMonitor(every_n_steps=2, report=False),
        hidden := HiddenStateMonitor(every_n_steps=2, report=False),
    ]
    plain = graphs(kind, fullgraph, [])
    assert graphs(kind, fullgraph, monitors) == plain == (1, 0)
    # Measured, and not in every step.
    assert attention.history.steps == hidden.history.steps == [1, 3, 5]
    assert attention.history.series("entropy").isfinite().all()
    assert attention.notes == []
