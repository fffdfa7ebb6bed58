"""The loop that measures attention calls: finds layers, captures their calls, measures each and pools them."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lightning_qk.capture.call import UnsupportedCallError
from lightning_qk.capture.capture import AttentionCapture
from lightning_qk.capture.captured import CapturedCall
from lightning_qk.capture.hidden import HiddenCapture
from lightning_qk.capture.hooks.generate import CachedCalls
from lightning_qk.functional.attention import POSITION_STATISTICS
from lightning_qk.heads.reader import find_attention, kept_reader
from lightning_qk.heads.sites import local_heads
from lightning_qk.metrics.later import Later, Waiting
from lightning_qk.metrics.means import HeadMeans

_MAXIMUM = "maximum"
"""The part of sums that is pooled by its maximum; the others are added."""


class Maxima(NamedTuple):
    """Sums of statistics that are maxima.

    Attributes:
        maximum: shape ``(statistics, batch, heads)``.
    """

    maximum: Tensor


Sums = Any
"""Additive form of the statistics of a call, a named tuple of tensors ``(statistics, batch, heads)``:
:class:`~lightning_qk.functional.attention.AttentionSums`, :class:`~lightning_qk.functional.attention.MeanSums` or
:class:`Maxima`."""

Measure = Callable[[str, CapturedCall], Sums | Later | Mapping[str, Sums | Later] | None]
"""Measures a call: layer name, call → its sums, several sums by name, or None where there is nothing to pool. With
``retry``, which allows that a measurement is lost, it may wait (:class:`~lightning_qk.metrics.later.Later`)."""


class LayerFacts(NamedTuple):
    """Facts of a layer that are known before its first call.

    Attributes:
        heads: number of query heads, over all processes; None where unknown.
        self_attention: whether queries and keys are the same tokens; None where unknown.
    """

    heads: int | None = None
    self_attention: bool | None = None


class _Facts(Protocol):
    @property
    def heads(self) -> int | None: ...

    @property
    def self_attention(self) -> bool | None: ...


class SumAccumulator:
    """Running sums of each layer's calls. Memory does not grow with the number of calls.

    Small measurements may wait, see :class:`~lightning_qk.metrics.later.Later`, until somebody asks for sums.

    Attributes:
        lost: layer → why a call of it is missing, so that its sums count for nothing.
        left_out_calls: layers that had calls which are not measured.
    """

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, Sums]] = {}
        self._waiting = Waiting()
        self.lost: dict[str, str] = {}
        self.left_out_calls: set[str] = set()

    def add(
        self,
        name: str,
        sums: Sums | Later,
        *,
        heads: int | None = None,
        where: slice | None = None,
        kind: str = "",
    ) -> None:
        """Add one call.

        Args:
            name: the layer.
            sums: of the call's heads, or their measurement.
            heads: how many heads the layer has on all processes; needed with ``where``.
            where: which of them the call had, where other processes compute the rest; None for all.
            kind: which of several sums of a layer.
        """
        if isinstance(sums, Later):
            if self._waiting.add((name, kind, heads, where), sums):
                self.make()
            return
        before = self._sums.setdefault(kind, {}).get(name)
        pooled: dict[str, Tensor] = {}
        for part, value in sums._asdict().items():
            is_maximum = part == _MAXIMUM
            new = value
            if value.shape[1] != 1:
                new = value.amax(1, keepdim=True) if is_maximum else value.sum(1, keepdim=True)
            if where is not None:
                whole = new.new_full((*new.shape[:-1], heads), -torch.inf if is_maximum else 0.0)
                whole[..., where] = new
                new = whole
            if before is not None:
                old = getattr(before, part)
                new = torch.maximum(old, new) if is_maximum else old + new
            pooled[part] = new
        self._sums[kind][name] = type(sums)(**pooled)

    def make(self) -> None:
        """Make what waits. A layer of which that fails is lost."""
        for (name, kind, heads, where), found in self._waiting.make():
            if isinstance(found, Exception):
                self.lost.setdefault(name, _why_lost(found))
            else:
                self.add(name, found, heads=heads, where=where, kind=kind)

    @property
    def names(self) -> frozenset[str]:
        """The layers with a pooled call."""
        waiting = {name for name, *_ in self._waiting.names}
        return frozenset(waiting.union(*self._sums.values()))

    def sums(self, kind: str = "") -> dict[str, Sums]:
        """Layer → its sums over all calls and sequences, each part of shape ``(statistics, 1, heads)``."""
        self.make()
        return dict(self._sums.get(kind, {}))

    def leave_out(self, names: Iterable[str]) -> None:
        """Forget layers."""
        unwanted = set(names)
        self._waiting.leave_out(lambda one: one[0] in unwanted)
        for sums in self._sums.values():
            for name in unwanted:
                sums.pop(name, None)

    def reset(self) -> None:
        """Forget everything."""
        self._sums.clear()
        self._waiting.reset()
        self.lost = {}
        self.left_out_calls = set()

    def into(self, metric: HeadMeans, kind: str = "") -> None:
        """Add the sums to a metric, which reduces them over ranks."""
        metric.update({name: [sums] for name, sums in self.sums(kind).items()})


def _why_lost(error: Exception) -> str:
    return f"measuring it failed ({type(error).__name__}: {error})"


class AttentionCollector:
    """Captures attention calls of a model, measures each and pools the results in :attr:`pool`.

    Either runs the model itself (:meth:`run`), or captures while others run it: :meth:`install`, then
    :attr:`enabled`, or ``with collector:`` for both; :meth:`remove` at the end.

    Args:
        model: what contains the layers.
        measure: gets the name of a layer and a call that knows the layer's :class:`LayerFacts`; see
            :data:`Measure`. None where every :meth:`run` is given its own.
        modules: layer name → module; None: all attention layers of the model.
        layers: layer name → its facts, such as ``ProjectionReader.layers``; None: by the model's weights.
        cross_attention: whether calls of cross-attention are measured.
        cached_calls: whether calls within transformers' ``generate``, and those of self-attention with keys of
            earlier tokens from a cache, are measured.
        retry: an unexpected error of ``measure`` (such as memory that ran out) loses the layer in the current
            pool alone; else the layer is left out from then on.
        eager: no graphs of torch.compile run while enabled (``torch.compiler.set_stance``), so that they are kept.
        operands: also keep the queries and keys of softmaxes that layers compute themselves.
        entered: gets the name of each of some layers, and the hidden states that enter it, before its call; layer
            names → modules are given with it.

    Attributes:
        modules: layer name → module, in the model's order.
        heads: layer name → number of query heads over all processes, where known.
        heads_of_calls: the same as calls of this process showed it, of layers that are not in ``heads``.
        self_attention: layer name → whether queries and keys are the same tokens.
        pool: where calls are added up now; may be replaced.
        cached: layers with calls that were left out because of ``cached_calls``.

    Raises:
        ValueError: the model contains no attention layer.
    """

    def __init__(
        self,
        model: nn.Module,
        measure: Measure | None = None,
        *,
        modules: Mapping[str, nn.Module] | None = None,
        layers: Mapping[str, _Facts] | None = None,
        cross_attention: bool = True,
        cached_calls: bool = True,
        retry: bool = False,
        eager: bool = False,
        operands: bool = False,
        entered: tuple[Callable[[str, Tensor], None], Mapping[str, nn.Module]] | None = None,
    ) -> None:
        self.model = model
        self.modules = dict(find_attention(model) if modules is None else modules)
        if layers is None:
            try:
                layers = kept_reader(model).layers
            except ValueError:
                if not self.modules:
                    raise
                layers = {}  # no layout is known, but calls can still be captured
        self.heads: dict[str, int] = {}
        self.heads_of_calls: dict[str, int] = {}
        self.self_attention: dict[str, bool | None] = {}
        self.pool = SumAccumulator()
        self.cached: set[str] = set()
        self._measure = measure
        self._cross_attention = cross_attention
        self._cached_calls = cached_calls
        self._retry = retry
        self._shapes: dict[str, tuple[int, int]] = {}
        self._calls_with_cache = CachedCalls()
        self.know(layers)
        self._capture = AttentionCapture(
            {module: name for name, module in self.modules.items()},
            self._take,
            model=model,
            eager=eager,
            operands=operands,
            generated=None if cached_calls else self._leave_call_out,
        )
        self._inputs: HiddenCapture | None = None
        if entered is not None:
            listener, inputs = entered
            self._inputs = HiddenCapture(
                {},
                lambda name, states, _: listener(name, states),
                inputs={module: name for name, module in inputs.items()},
                model=model,
            )
        self._is_installed = False

    def know(self, layers: Mapping[str, _Facts]) -> list[str]:
        """Take facts of layers; returns the names of those whose facts have changed."""
        changed = []
        for name, layer in layers.items():
            before = self.heads.get(name), self.self_attention.get(name)
            if layer.heads is not None:
                self.heads[name] = layer.heads
            self.self_attention[name] = layer.self_attention
            if name in self.modules and before != (self.heads.get(name), layer.self_attention):
                changed.append(name)
        return changed

    # Capture

    @property
    def left_out(self) -> dict[str, str]:
        """Layer → why it is not measured any more. Layers can be added."""
        return self._capture.problems

    @property
    def seen(self) -> set[str]:
        """Layers with at least one measured call."""
        return self._capture.seen

    @property
    def enabled(self) -> bool:
        """Whether calls are captured now."""
        return self._capture.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        if self._inputs is not None:
            self._inputs.enabled = value
        self._capture.enabled = value

    def install(self) -> None:
        """Get ready to capture; nothing is captured before :attr:`enabled` is set."""
        if self._inputs is not None:
            self._inputs.install()
        self._capture.install()
        self._is_installed = True

    def remove(self) -> None:
        """Leave the model as it was before :meth:`install`."""
        self._capture.remove()
        if self._inputs is not None:
            self._inputs.remove()
        self._is_installed = False

    def __enter__(self) -> "AttentionCollector":
        self.install()
        self.enabled = True
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def run(self, batch: Mapping[str, Any], measure: Measure | None = None) -> Any:
        """Run the model once while capturing; layers of which no call is seen are left out from then on.

        Args:
            batch: keyword arguments of the model.
            measure: in place of the collector's own.

        Returns:
            What the model returned.
        """
        own, self._measure = self._measure, measure or self._measure
        was_installed = self._is_installed
        self.seen.clear()
        try:
            self.install()
            self.enabled = True
            output = self.model(**batch)
        finally:
            self.enabled = False
            if not was_installed:
                self.remove()
            self._measure = own
        for name in self.silent():
            self.left_out[name] = "no attention call of it was seen"
        return output

    def silent(self) -> list[str]:
        """Layers of which no call was captured, and no reason is known."""
        seen = self.seen | self.left_out.keys() | self.cached
        return [name for name in self.modules if name not in seen]

    # Calls

    def _take(self, name: str, call: CapturedCall) -> None:
        is_self = self.self_attention.get(name)
        if not self._cached_calls and is_self and self._calls_with_cache.has(name, call):
            self._leave_call_out(name)
        elif self._cross_attention or is_self is not False:
            self._measure_call(name, call)

    def _leave_call_out(self, name: str) -> None:
        self.cached.add(name)
        self.pool.left_out_calls.add(name)

    def _measure_call(self, name: str, call: CapturedCall) -> None:
        pool, measure = self.pool, self._measure
        if name in pool.lost or measure is None:
            return
        try:
            found = measure(
                name,
                call.known(
                    self_attention=self.self_attention.get(name), heads=self.local_heads(name, call.module)
                ),
            )
            if found is None:
                return
            kinds: Mapping[str, Sums | Later] = found if isinstance(found, Mapping) else {"": found}
            first = next(iter(kinds.values()))
            count = first.heads if isinstance(first, Later) else next(iter(first)).shape[-1]
            heads, where = self._check_shape(name, call, count)
            for kind, sums in kinds.items():
                pool.add(name, sums, heads=heads, where=where, kind=kind)
        except UnsupportedCallError:
            raise
        except Exception as error:
            if not self._retry:
                raise
            pool.lost[name] = _why_lost(error)

    def local_heads(self, name: str, module: nn.Module) -> int | None:
        """Query heads of a layer that this process computes under tensor parallelism; None where unknown."""
        heads = self.heads.get(name)
        where = None if heads is None else local_heads(module, heads)
        return heads if where is None else where.stop - where.start

    def _check_shape(self, name: str, call: CapturedCall, count: int) -> tuple[int, slice | None]:
        """How many heads the layer has, and which of them this call had (None: all)."""
        shape = count, call.d_head
        before = self._shapes.setdefault(name, shape)
        if shape != before:
            raise UnsupportedCallError(
                f"its attention was called with {before[0]} heads of width {before[1]} and then with {shape[0]} "
                f"of width {shape[1]}, which cannot be pooled: give each of the two a module of its own"
            )
        # Processes agree on what only calls show before it is used.
        heads = self.heads.get(name) or self.heads_of_calls.setdefault(name, count)
        if count == heads:
            return heads, None
        where = local_heads(call.module, heads)
        if where is None or where.stop - where.start != count:
            raise UnsupportedCallError(
                f"its weights have {heads} heads and its attention was called with {count}: check how the "
                "layer splits its heads"
            )
        return heads, where

    # Results

    def blank_positions(self, metric: HeadMeans, values: Mapping[str, Tensor]) -> None:
        """Set statistics of positions to NaN where queries and keys are not the same tokens, in place.

        Args:
            metric: of the layers.
            values: statistic → flat values, as ``metric.compute()`` gives them.
        """
        for statistic, flat in values.items():
            if statistic.removesuffix("_se") in POSITION_STATISTICS:
                for name, part in metric.split(flat).items():
                    if self.self_attention.get(name) is False:
                        part.fill_(torch.nan)
