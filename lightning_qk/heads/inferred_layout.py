"""Infer where the weights of a layer lie without names: run the layer alone and follow numbers.

:mod:`~lightning_qk.heads.row_numbers` finds which rows reach q and k. What was found is then compared with what
the layer makes of random numbers, small and large, in more than one token, and with its other parameters varied:
that shows what is between projection and product.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qk.architecture.dry_run import quietly
from lightning_qk.heads.bare_weights import BareFollower
from lightning_qk.heads.facts import LayerFacts, softmax_scaling
from lightning_qk.heads.layout_check import LayoutCheck, Rejected, Way, cause, is_close, logit_factor
from lightning_qk.heads.layouts import borrows_keys, fitting_layouts
from lightning_qk.heads.norms import plan_norm_of
from lightning_qk.heads.projection import Layout, Side
from lightning_qk.heads.projections import InaccessibleWeights, NotTokenAttention, Sizes, UnreadLayer
from lightning_qk.heads.row_numbers import FoundSide, NoProduct, RowFollower, grouped, head_pairs
from lightning_qk.heads.running import Bench, Seen
from lightning_qk.heads.sites import AttentionLayer
from lightning_qk.heads.trials import Trial, input_arguments

BY_RUNNING = "found by running"
"""Name of layouts that were inferred by running a layer."""
_CHANNELS = "it attends over channels: its products are sums over tokens, and its softmax is over channels"


def infer(facts: LayerFacts, refusal: UnreadLayer | None = None) -> Layout:
    """The layout that a run of the layer alone shows.

    Args:
        facts: of the layer.
        refusal: why the entry of the table for it does not fit; what contradicts that entry counts only if the
            layer runs to its end so.

    Raises:
        UnreadLayer: no run explains it; ``refusal``, where there is one.
        NotTokenAttention: its products run over tokens.
    """
    module = facts.layer.module
    if borrows_keys(module):
        raise refusal or UnreadLayer("it uses the keys of an earlier layer, which no run of it alone tells")
    try:
        layout = find_rows(facts.layer, facts.finding.ways)
    except (InaccessibleWeights, NotTokenAttention):
        raise
    except UnreadLayer as reason:
        raise refusal or UnreadLayer(_why_run(module, reason)) from None
    if refusal is not None and not layout.is_complete:
        raise refusal
    return layout


def _why_run(module: nn.Module, reason: UnreadLayer) -> str:
    """Why a layer is not read that had to be run."""
    kind = type(module).__name__
    if next(fitting_layouts(module), None) is not None:
        return (
            f"{kind} is no class of a known library, so that the names of its children do not tell its layout, "
            f"and running it alone does not tell: {reason}"
        )
    children = ", ".join(name for name, _ in module.named_children()) or "none"
    return (
        f"{kind} has no known layout of q and k (its children: {children}), and running it alone does not tell: "
        f"{reason}"
    )


def find_rows(layer: AttentionLayer, ways: Sequence[Trial] = ()) -> Layout:
    """Find the rows of a layer's projections that reach q and k, by running it alone.

    Nothing of the model is changed, no hook is called and the global generators are left as they were. Of a class
    that is not transformers', torch's or timm's, what was found is compared with runs on random numbers: it counts
    only if it explains them.

    Args:
        layer: whose forward is run.
        ways: how it is called; none for arguments guessed from its signature.

    Raises:
        UnreadLayer: it cannot be run alone, reaches no softmax of a product, or its q and k are not rows of
            projections of its input.
        NotTokenAttention: its products run over tokens.
        InaccessibleWeights: the values of its weights are out of this process's reach.
    """
    module = layer.module
    kind = type(module).__name__
    own = module.__dict__.get("forward")
    if (
        own is not None
        and "_old_forward" not in module.__dict__
        and getattr(own, "__self__", None) is not module
    ):
        raise UnreadLayer(f"the forward of this {kind} was replaced by a function that runs the layer itself")
    is_strict = not layer.is_known
    is_run = False
    # The first of each kind tells most: the likeliest way to call it.
    reasons: list[str] = []
    failures: list[str] = []
    with quietly(module):
        for is_bare in (False, True) if is_strict else (False,):
            bench = Bench(module, layer.config, ways, is_bare=is_bare)
            if not bench.widths():
                continue
            bench.check_access()
            is_first, is_run = not is_run, True
            for trial in bench.trials():
                search = _Inference(bench, trial, is_strict=is_strict)
                try:
                    return search.read()
                except NoProduct as failure:
                    failures.append(str(failure))
                except NotTokenAttention:
                    raise
                except Rejected as reason:
                    reasons.insert(0 if is_first else len(reasons), cause(bench, trial) or str(reason))
                    break
                except UnreadLayer as reason:
                    reasons.append(cause(bench, trial) or str(reason))
    if not is_run:
        raise UnreadLayer(f"{kind} has no projections that are affine in their input")
    if reasons:
        raise UnreadLayer(reasons[0])
    raise UnreadLayer(
        f"{kind} reaches no softmax of a product when it is run alone{failures[0] if failures else ''}"
    )


_KNOWN: "weakref.WeakKeyDictionary[type, bool]" = weakref.WeakKeyDictionary()


def check_tokens(layer: AttentionLayer) -> None:
    """Refuse a layer whose products sum over an axis that grows with the number of tokens.

    Seen from a run of the layer alone, once for each class; one that cannot be run passes.

    Raises:
        NotTokenAttention: it attends over channels.
    """
    kind: Any = type(layer.module)
    if layer.is_over_tokens:
        return
    if kind not in _KNOWN:
        _KNOWN[kind] = _sums_over_tokens(layer.module, layer.config)
    if _KNOWN[kind]:
        raise NotTokenAttention(_CHANNELS)


def _sums_over_tokens(module: nn.Module, config: Any) -> bool:
    try:
        bench = Bench(module, config)
        bench.check_access()
    except UnreadLayer:
        return False
    with quietly(module):
        return bool(bench.emitters) and bench.sums_over_tokens()


class _Inference:
    """Infers a layout from one way to call a layer, and checks that it explains what the layer does."""

    def __init__(self, bench: Bench, trial: Trial, *, is_strict: bool) -> None:
        self.bench, self.trial, self.is_strict = bench, trial, is_strict
        self.rows: RowFollower = (RowFollower if bench.emitters else BareFollower)(bench, trial)

    @property
    def _first(self) -> Seen:
        return self.rows.runs[0]

    def read(self) -> Layout:
        """What this way to call the layer shows.

        Raises:
            NoProduct: it comes to no softmax of a product.
            UnreadLayer: its queries and keys are no rows of projections.
        """
        self.rows.number_rows()
        # The axis that its product sums over grows with the tokens.
        widths = {product.query.shape[-1] for product in self._first.products}
        if widths == {self.trial.tokens} and self.bench.runs_over_tokens(self.trial):
            raise NotTokenAttention(_CHANNELS)
        ways, scaling, is_swapped = self._explained()
        check = None if not self.is_strict else LayoutCheck(self.rows, ways, scaling)
        pairs = [pair[::-1] if is_swapped else pair for way in ways for pair in way.pairs]
        rows_of_query, rows_of_key = grouped(pairs)
        for way in ways:
            self.rows.add_biases(way.place)
        query = self.rows.side(rows_of_query, "queries")
        key = self.rows.side(rows_of_key, "keys")
        if scaling is not None:
            for own, numbers in zip((query, key), ways[0].sides[:: -1 if is_swapped else 1], strict=True):
                scaling *= numbers.factor / self.rows.factor_at(own.norm, numbers)
        if not self.is_strict and (query.norm is not None or key.norm is not None):
            scaling = None
        # Of several inputs of one width only a call tells whether they are the same.
        is_decided = (
            not self.is_strict
            or self.trial.is_recorded
            or query.projection.columns != key.projection.columns
            or len(input_arguments(self.bench.module)) <= 1
        )
        heads, d_head = query.rows.shape
        layout = Layout(
            BY_RUNNING,
            _side(query, "query"),
            _side(key, "key"),
            Sizes(heads, len(key.rows), d_head, key.shared),
            softmax_scaling(self.bench.module, d_head) if scaling is None else scaling,
            normalizes=any(own.norm is not None or own.projection.norms for own in (query, key)),
            crosses=is_decided and query.given != key.given,
            is_decided=is_decided,
            is_complete=not any(run.failed for run in self.rows.runs),
        )
        if check is None:
            return layout
        return replace(
            layout,
            clip=check.bound,
            obstacle=None if check.is_exclusive(rows_of_query, rows_of_key) else _NOT_EXCLUSIVE,
            is_turned=check.is_turned,
            is_capped=check.is_capped,
            is_added_to=check.is_added_to(),
        )

    def _explained(self) -> tuple[list[Way], float | None, bool]:
        """The products whose sides are rows of projections, the factor on them, and whether keys come first."""
        if any(product.query.is_complex() or product.key.is_complex() for product in self._first.products):
            raise Rejected("its queries and keys are complex numbers")
        if self.is_strict and any(product.is_normed for product in self._first.products):
            raise Rejected("a norm stands between its products and their softmax")
        reason: UnreadLayer | None = None
        found: list[tuple[Way, float | None, bool]] = []
        for place in range(len(self._first.products)):
            try:
                sides = self.rows.numbers_of(place, "query"), self.rows.numbers_of(place, "key")
                way = Way(place, sides, head_pairs(sides[0].rows, sides[1].rows))
                for numbers, what in zip(grouped(way.pairs), ("queries", "keys"), strict=True):
                    self.rows.check_rows(numbers, what)
                found.append((way, *(logit_factor(self.rows, way, 1, 0.1) or (None, False))))
            except Rejected:
                raise
            except UnreadLayer as error:
                # The first product says most: later ones are with positions, or in layers behind.
                reason = reason or error
                continue
            if not self.is_strict:
                break
        if not found:
            assert reason is not None  # there is at least one product
            raise reason
        first, scaling, is_swapped = found[0]
        ways = [first]
        known = set(first.pairs)
        for way, own_scaling, own_swapped in found[1:]:
            if known.issuperset(way.pairs):
                continue
            logits = [self._first.products[own.place].logits for own in (first, way)]
            if logits[0] is not None and logits[0] is logits[1]:
                raise Rejected("its logits are sums of several products of queries and keys")
            same = own_swapped == is_swapped and len(way.pairs[0][0]) == len(first.pairs[0][0])
            if not same or not is_close(own_scaling, scaling) or known.intersection(way.pairs):
                raise Rejected("it takes several softmaxes, of products that differ in their scale or width")
            ways.append(way)
            known.update(way.pairs)
        return ways, scaling, is_swapped


_NOT_EXCLUSIVE = (
    "which make more than queries and keys (values that are the keys, say), or of which a run of the layer alone "
    "does not tell: give queries and keys projections of their own"
)


def _side(found: FoundSide, side: str) -> Side:
    """What is read of one side; a norm whose gain cannot be read rejects the layout."""
    count, d_head = found.rows.shape
    try:
        norm = None if found.norm is None else plan_norm_of(found.norm, count, d_head, side)
    except InaccessibleWeights:
        raise
    except UnreadLayer as reason:
        raise Rejected(str(reason)) from None
    return Side(found.projection, _rows_at(found.rows), norm)


def _rows_at(places: Tensor) -> Callable[[Tensor, Sizes], Tensor]:
    """What takes the rows at places (heads, d_head) from a tensor (out, ...): a view where they are regular."""
    heads, d_head = places.shape
    start = int(places[0, 0])
    step = int(places[1, 0]) - start if heads > 1 else d_head
    regular = start + step * torch.arange(heads)[:, None] + torch.arange(d_head)
    is_view = step >= d_head and torch.equal(places, regular)

    def take(rows: Tensor, sizes: Sizes) -> Tensor:
        if is_view:
            return rows[start : start + (heads - 1) * step + d_head].unfold(0, d_head, step).movedim(-1, 1)
        return rows[places.to(rows.device)]

    return take
