"""Check the statistics that capture gives against dense softmax in double precision."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_qk.architecture.dry_run import call, quietly
from lightning_qk.capture.captured import CapturedCall
from lightning_qk.functional.attention import attention_sums, means
from lightning_qk.heads.reader import find_attention
from lightning_qk.metrics.collector import AttentionCollector, LayerFacts
from lightning_qk.verification.trace import Event, Trace

TOLERANCE = 1e-4
OF_ROWS = ("entropy", "participation", "max_prob", "sink_first")
OF_POSITIONS = ("distance", "diagonal")


class CapturedCalls:
    """What ``AttentionMonitor`` would measure during a forward, of every row, layer by layer.

    Attributes:
        calls: name of a layer → the statistics of each of its calls.
        problems: name → why its calls cannot be used.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Mapping[str, nn.Module],
        trace: Trace,
        heads: Mapping[str, int] | None = None,
    ) -> None:
        self._trace = trace
        self.calls: dict[str, list[dict[str, Tensor]]] = {}
        self.shapes: dict[str, list[tuple[int, ...]]] = {}
        facts = {name: LayerFacts(count) for name, count in (heads or {}).items()}
        self._collector = AttentionCollector(model, self._measure, modules=sites, layers=facts)
        self.problems = self._collector.left_out

    def __enter__(self) -> "CapturedCalls":
        self._collector.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._collector.remove()

    def _measure(self, name: str, call: CapturedCall) -> None:
        with self._trace.paused():
            logits = call.logits()
            statistics = means(
                attention_sums(logits), per_sequence=False, standard_errors=False, has_sinks=False
            )
            self.calls.setdefault(name, []).append(statistics)
            self.shapes.setdefault(name, []).append(logits.shape)


class Agreement(NamedTuple):
    """How one layer's captured statistics compare with those of its softmaxes.

    Attributes:
        error: the largest difference, relative to the statistic or to 1 if that is larger; NaN where nothing was
            compared.
        reason: what does not agree, as a clause; empty where all does.
    """

    error: float
    reason: str = ""

    @property
    def ok(self) -> bool:
        """Whether the statistics are those of the softmaxes."""
        return not self.reason


def check_statistics(model: nn.Module, batch: Any, heads: Mapping[str, int]) -> dict[str, Agreement]:
    """Run a model once and compare what monitors would measure with dense softmax in double precision.

    The softmaxes are found by watching every operation of torch's, whatever calls them. The model runs without
    gradients, in its own mode, and is left as it was. Tensors of the whole forward are held until its end.

    Args:
        model: any module.
        batch: what it is called with, see :func:`~lightning_qk.verify`.
        heads: of the layers where it is known, by qualified name.

    Returns:
        Qualified layer name → what was found, of the layers that ran a softmax, and of modules outside of all
        layers that did.
    """
    sites = find_attention(model)
    trace = Trace(model)
    with CapturedCalls(model, sites, trace, heads) as captured, quietly(model), trace:
        call(model, batch)
    events: dict[str, list[Event]] = {}
    found: dict[str, Agreement] = {}
    for event in trace.events:
        name, known = layer_of(event, sites)
        if known:
            events.setdefault(name, []).append(event)
        else:
            found[name] = Agreement(math.nan, "its attention layer was not found")
    for name, own in events.items():
        found[name] = verify_statistics(captured, name, own)
    return found


def layer_of(event: Event, sites: Mapping[str, nn.Module]) -> tuple[str, bool]:
    """The layer that an attention belongs to, and True; or the module that ran it, and False."""
    for frame in reversed(event.frames):
        if frame.name in sites:
            return frame.name, True
    return (event.frames[-1].name if event.frames else ""), False


def verify_statistics(captured: CapturedCalls, name: str, events: list[Event]) -> Agreement:
    """Compare one layer's captured statistics with those of the softmaxes that really ran.

    Args:
        captured: of the forward.
        name: of the layer.
        events: the layer's softmaxes.
    """
    if name in captured.problems:
        return Agreement(math.nan, captured.problems[name])
    calls = captured.calls.get(name, [])
    if not calls:
        return Agreement(math.nan, "no attention call of it was captured")
    others = Agreement(math.nan, f"{len(calls)} calls were captured and {len(events)} softmaxes seen")
    if len(calls) > len(events):
        return others
    # Some layers compute their logits twice and throw one result away: what is left over has to be a repetition.
    rest = list(events)
    largest = 0.0
    for statistics, shape in zip(calls, captured.shapes[name], strict=True):
        first: Agreement | None = None
        for event in rest:
            compared = _compare(statistics, shape, event)
            if compared.ok:
                largest = max(largest, compared.error)
                rest.remove(event)
                break
            first = first or compared
        else:
            return first or others
    for event in rest:
        if not any(_compare(*call, event).ok for call in zip(calls, captured.shapes[name], strict=True)):
            return others
    return Agreement(largest)


def _compare(statistics: dict[str, Tensor], shape: tuple[int, ...], event: Event) -> Agreement:
    probabilities = dense(event)
    if probabilities is None:
        return Agreement(math.nan, "the probabilities of its softmax could not be followed")
    batch, heads, n, m = shape
    width = probabilities.shape[-1]
    if probabilities.numel() != batch * heads * n * width or width not in (m, m + 1):
        seen = "×".join(str(size) for size in probabilities.shape)
        return Agreement(math.nan, f"its softmax has shape {seen} where capture has {batch}×{heads}×{n}×{m}")
    if event.empty is not None:
        # Softmax makes such a row uniform; it is padding.
        empty = event.empty.reshape(*probabilities.shape[:-1], 1)
        probabilities = probabilities.masked_fill(empty, 0.0)
    probabilities = _by_head(probabilities, heads).reshape(batch, heads, n, width)
    want = dense_statistics(probabilities, m)
    names = OF_ROWS if n != m else (*OF_ROWS, *OF_POSITIONS)
    largest = 0.0
    for name in names:
        got, expected = statistics[name].double(), want[name]
        if not expected.isfinite().all():
            return Agreement(
                math.nan,
                "no row of the model's own softmax can be counted: its mask hides every key, or each other's",
            )
        error = ((got - expected).abs() / expected.abs().clamp_min(1)).amax()
        if name == "sink_first":
            # Whether a mask of -100 hides a key is a question of words.
            error = torch.minimum(error, (got - want["sink_first_near"]).abs().amax())
        if not error <= TOLERANCE:
            if width == m and any(hasattr(frame.module, "sinks") for frame in event.frames[-1:]):
                why = "its learnt sink is applied behind the softmax, where the check does not follow it"
            else:
                why = f"its {name} is off by {float(error):.2g}"
            return Agreement(float(error), why)
        largest = max(largest, float(error))
    return Agreement(largest)


def _by_head(rows: Tensor, heads: int) -> Tensor:
    """Windows and blocks are the batch: the axis of the heads moves next to the queries."""
    axes = [axis for axis in range(1, rows.dim() - 2) if rows.shape[axis] == heads]
    return rows.movedim(axes[0], -3) if rows.dim() > 4 and len(axes) == 1 else rows


def dense(event: Event) -> Tensor | None:
    """The probabilities of an attention, in double precision where it ran as one operator."""
    if not event.fused:
        return None if event.probabilities is None else event.probabilities.double()
    (product,) = event.products
    query, key = product.query.double(), product.key.double()
    if product.scale is None:
        return None
    if query.dim() == 4 and key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = query @ key.transpose(-1, -2) * product.scale
    if event.is_causal:
        n, m = logits.shape[-2:]
        logits = logits.masked_fill(~torch.ones(n, m, dtype=torch.bool).tril(), -math.inf)
    if event.mask is not None:
        if event.mask.dtype == torch.bool:
            logits = logits.masked_fill(~event.mask, -math.inf)
        else:
            logits = logits + event.mask.double()
    return logits.softmax(-1)


def dense_statistics(probabilities: Tensor, keys: int) -> dict[str, Tensor]:
    """Statistics of whole maps of probabilities.

    Args:
        probabilities: ``(batch, heads, n, m)``, or ``m + 1`` with a learnt sink in the last column.
        keys: m.

    Returns:
        Each ``(heads,)``: means over the rows that are no padding. A token is padding where no row sees it.
    """
    p = probabilities.nan_to_num(0.0)
    of_keys = p[..., :keys]
    n = p.shape[2]
    counted = of_keys.sum(-1).amax(1) > 0
    if n == keys:
        counted = counted & (of_keys.amax((1, 2)) > 0)
    weight = counted[:, None].double().expand(-1, p.shape[1], -1)
    positions = (torch.arange(n)[:, None] - torch.arange(keys)).abs().double()
    first = (of_keys > 0).double().argmax(-1, keepdim=True)
    # A mask of -100 leaves a denormal number or nothing.
    near = (of_keys > 1e-40).double().argmax(-1, keepdim=True)
    rows = {
        "entropy": -torch.special.xlogy(p, p).sum(-1),
        "participation": 1 / p.square().sum(-1).clamp_min(1e-300),
        "max_prob": of_keys.amax(-1),
        "sink_first": of_keys.gather(-1, first).squeeze(-1),
        "sink_first_near": of_keys.gather(-1, near).squeeze(-1),
        "distance": (of_keys * positions).sum(-1),
    }
    if n == keys:
        rows["diagonal"] = of_keys.diagonal(dim1=-2, dim2=-1)
    return {name: (value * weight).sum((0, 2)) / weight.sum((0, 2)) for name, value in rows.items()}
