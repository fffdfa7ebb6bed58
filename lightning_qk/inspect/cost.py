"""What callbacks add to a job's steps: operations, launches and bytes, from formulas of layers, heads and widths.

The formulas are those of the code, derived, for the callbacks' defaults. ``tests/inspect/test_cost.py`` compares
them with what it does: products with torch's count of floating-point operations, launches with calls of operators,
traffic with the metrics' states. None of them is a time.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

from lightning_qk.functional.attention import EXTREMES, MEAN_STATISTICS
from lightning_qk.functional.hidden import HIDDEN_EXTREMES, HIDDEN_MEANS
from lightning_qk.heads.reader import LARGEST_BATCH
from lightning_qk.inspect.documents import BadInput, read_json
from lightning_qk.metrics.spectrum import EXTREME_STATISTICS, SPECTRUM_STATISTICS

ROWS, TOKENS, SEQUENCES = 64, 64, 8
"""Sampled query rows, tokens and sequences: defaults of the monitors."""
STEP_TOKENS = 512
"""Tokens of a step, over all processes, that LocAteR's limit form looks at: its default."""
_MOST_LAYERS = 2000
_MAY_WAIT = 2**24
"""Numbers that measurements of small layers keep on a device until they are made together."""


class Widths(NamedTuple):
    """A model.

    Attributes:
        layers: attention layers.
        heads: query heads of a layer.
        kv_heads: key heads.
        d_head: width of a head's queries and keys.
        d_model: width of what the projections read.
        parameters: all of them.
        active: those that a token meets.
    """

    layers: int
    heads: int
    kv_heads: int
    d_head: int
    d_model: int
    parameters: int
    active: int


class Job(NamedTuple):
    """How it is trained.

    Attributes:
        ranks: processes.
        batch: sequences of a process's step.
        length: tokens of a sequence.
        sharded: every process has a part of each weight (FSDP2).
        weight_bytes: bytes of a weight.
    """

    ranks: int = 1
    batch: int = 1
    length: int = 4096
    sharded: bool = False
    weight_bytes: int = 2


class Cost(NamedTuple):
    """What one callback adds to one step of one process.

    Attributes:
        flops: floating-point operations of its products on the device.
        launches: calls of torch's operators: at most so many kernels.
        network: bytes that the process sends, by rings.
        collectives: collective calls that move them.
        to_host: bytes copied from the device.
        on_host: floating-point operations of eigenproblems, in a thread.
    """

    flops: int = 0
    launches: int = 0
    network: int = 0
    collectives: int = 0
    to_host: int = 0
    on_host: int = 0


TOGETHER = 3
"""Collective calls of all monitors that measure a step: their sums, their maxima, and what one process lacks."""


def step_flops(model: Widths, job: Job) -> int:
    """Of a step without callbacks: six a weight and token, and the products of attention, half of them masked."""
    attention = 6 * model.layers * model.heads * model.d_head * job.batch * job.length**2
    return 6 * model.active * job.batch * job.length + attention


def locater(model: Widths, job: Job) -> Cost:
    """``LocAteR()``, the limit form over tokens of the step, at every step.

    Plain weights are seen through covariance and mean of the tokens, and the gradient goes back the same way.
    Sharded layers, and those with norms or biases of queries, make queries and keys of the tokens; the gradient
    goes through these. Both are products of d_head × d_model and d_model × tokens, and Gram matrices.
    """
    layers, heads, kv_heads, d, width = model[:5]
    each = max(2, math.ceil(STEP_TOKENS / job.ranks))
    tokens = each * job.ranks
    if job.sharded:
        flops = layers * tokens * d * ((heads + kv_heads) * (4 * width + 6 * d) + 4 * kv_heads)
        launches = 53 + 154 * layers
    else:
        # The mean is one row more; and what covariance and mean take.
        flops = 4 * layers * ((tokens + 1) * d * (heads + kv_heads) * (width + d) + tokens * width)
        launches = 53 + 4 * layers + 138 * _stacks(model)
    # Every process has the tokens of all: a ring passes each on once.
    sampled = 4 * layers * each * (width + 1) * (job.ranks - 1)
    network = _gathering(model, job) + _all_reduce(24, job) + sampled
    return Cost(flops, launches, network, (2 + 2 * layers * job.sharded) * (job.ranks > 1))


def locater_variance(model: Widths, job: Job) -> Cost:
    """``LocAteR(weight)``, the variance form: three products of the value and four of the gradient."""
    layers, heads, kv_heads, d, width = model[:5]
    flops = layers * d * d * width * (10 * heads + 4 * kv_heads)
    # Sharded layers are read each alone; two weights are gathered.
    launches = 75 * layers if job.sharded else 53 * _stacks(model)
    network = _gathering(model, job) + _all_reduce(24, job)
    return Cost(flops, launches, network, (1 + 2 * layers * job.sharded) * (job.ranks > 1))


def spectrum(model: Widths, job: Job) -> Cost:
    """QKSpectrumMonitor, at a measured step."""
    layers, heads, kv_heads, d, width = model[:5]
    every = layers * heads
    sums = 4 * len(SPECTRUM_STATISTICS) * every
    # Solved on every process: what one could not solve is that of the others.
    late = 16 * len(EXTREME_STATISTICS) * every
    return Cost(
        2 * layers * d * d * width * (2 * heads + kv_heads),
        150 + 7 * layers,
        _gathering(model, job) + _all_reduce(sums, job) + _all_reduce(late, job),
        (TOGETHER + 2 * layers * job.sharded) * (job.ranks > 1),
        2 * sums + 4 * every * d * d,
        10 * every * d**3,
    )


def attention(model: Widths, job: Job) -> Cost:
    """AttentionMonitor, at a measured step of sampled rows."""
    layers, heads, kv_heads, d = model[:4]
    rows, n, batch = min(ROWS, job.length), job.length, job.batch
    flops = 2 * batch * rows * n * (heads * (d + 2) + 1)
    runs = _runs(batch * n * (heads + kv_heads) * d, layers)
    sums, maxima = 4 * 3 * len(MEAN_STATISTICS) * layers * heads, 8 * len(EXTREMES) * layers * heads
    return Cost(
        layers * flops,
        390 * runs + 12 * layers,
        _all_reduce(sums + maxima, job),
        TOGETHER * (job.ranks > 1),
        8 * (2 * len(MEAN_STATISTICS) + len(EXTREMES) + 1) * layers * heads,
    )


def hidden(model: Widths, job: Job) -> Cost:
    """HiddenStateMonitor, at a measured step of sampled sequences and tokens."""
    blocks, width = model.layers + 1, model.d_model
    sequences, tokens = min(SEQUENCES, job.batch), min(TOKENS, job.length)
    few, many = sorted((tokens, width))
    flops = sequences * (2 * tokens * tokens * width + 2 * few * few * many + 2 * job.length * width)
    runs = _runs(sequences * job.length * width, blocks)
    states = (8 * len(HIDDEN_MEANS) + 8 * len(HIDDEN_EXTREMES)) * blocks
    statistics = len(HIDDEN_MEANS) + len(HIDDEN_EXTREMES)
    return Cost(
        blocks * flops,
        220 * runs + 8 * blocks,
        _all_reduce(states, job),
        TOGETHER * (job.ranks > 1),
        8 * (statistics + 1) * blocks,
    )


CALLBACKS = {
    "LocAteR": locater,
    "QKSpectrumMonitor": spectrum,
    "AttentionMonitor": attention,
    "HiddenStateMonitor": hidden,
}
"""LocAteR acts at every step, the others at measured ones."""
FORMS = {"limit": locater, "variance": locater_variance}
"""LocAteR by its form."""


def _stacks(model: Widths) -> int:
    """In how many batches the layers' weights are read."""
    return math.ceil(model.layers / max(1, LARGEST_BATCH // _weights(model)))


def _weights(model: Widths) -> int:
    return (model.heads + model.kv_heads) * model.d_head * model.d_model


def _runs(elements: int, layers: int) -> int:
    """How often the arithmetic of one layer runs for all of them: small ones are measured together."""
    return layers if 4 * elements > _MAY_WAIT else math.ceil(layers / math.ceil(_MAY_WAIT / elements))


def _all_reduce(size: int, job: Job) -> int:
    return math.ceil(2 * size * (job.ranks - 1) / job.ranks)


def _gathering(model: Widths, job: Job) -> int:
    whole = model.layers * _weights(model) * job.weight_bytes
    return math.ceil(whole * (job.ranks - 1) / job.ranks) if job.sharded else 0


def read_widths(place: str | Path) -> Widths:
    """The sizes of a model, from its ``config.json`` or the folder that has one; no weights are read.

    Raises:
        BadInput: there is none, or it lacks a size.
    """
    path = Path(place)
    path = path / "config.json" if path.is_dir() else path
    fields = read_json(path, "a model's config.json or a folder that has one")
    kind = fields.pop("model_type", None)
    if not isinstance(kind, str):
        raise BadInput(
            f"expected the config of a model, got {path} without a model_type: pass that of a model"
        )
    from transformers import AutoConfig

    try:
        return _widths(AutoConfig.for_model(kind, **fields))
    except Exception as error:
        raise BadInput(
            f"expected the config of a model that transformers can build, got {place} "
            f"({' '.join(str(error).split())[:200]}): update transformers, or correct it"
        ) from error


def _widths(config: Any) -> Widths:
    text = config.get_text_config()
    if not 0 < text.num_hidden_layers <= _MOST_LAYERS:  # each is built, without numbers
        raise ValueError(f"it has {text.num_hidden_layers} layers, where 1 to {_MOST_LAYERS} are read")
    heads = text.num_attention_heads
    d_head = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    if getattr(text, "kv_lora_rank", None):  # keys of every head, from a latent
        d_head, kv_heads = text.qk_nope_head_dim + text.qk_rope_head_dim, heads
    parameters, active = _parameters(config, text)
    return Widths(text.num_hidden_layers, heads, kv_heads, d_head, text.hidden_size, parameters, active)


def _parameters(config: Any, text: Any) -> tuple[int, int]:
    """All parameters, and those that a token meets; of a model without numbers."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config)
        except ValueError:  # of another kind
            model = AutoModel.from_config(config)
    kinds = [getattr(text, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts")]
    experts = next((count for count in kinds if count), 0)
    met = getattr(text, "num_experts_per_tok", 0) or 0
    total = active = 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        is_expert = experts and ".experts." in f".{name}."
        active += parameter.numel() * met // experts if is_expert else parameter.numel()
    return total, active
