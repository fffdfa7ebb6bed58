"""The attention that a training run's token moments predict, beside what was measured."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_qk.architecture.labels import shorten
from lightning_qk.callbacks._trainer import describe_error
from lightning_qk.callbacks.monitors._keys import LogKeys
from lightning_qk.functional.token_moments import TokenMoments
from lightning_qk.heads.projections import HeadProjections
from lightning_qk.loggers.loggers import log_scalars
from lightning_qk.metrics.tokens import TokenStatistics
from lightning_qk.record.history import History
from lightning_qk.record.predictions import semantic_share
from lightning_qk.record.statistics import PREDICTED, SEMANTIC_SHARE, logged_extremes
from lightning_qk.tokens.predict import predict_attention

LENGTH = 2048
"""Tokens of a sequence that is drawn, at most."""


class Predictions(LogKeys):
    """Predicted statistics of every head over the steps.

    Attributes:
        history: of the steps that were predicted.
        step: the newest of them; None before the first.
        states: states of heads at that step; None where unknown.
    """

    group = "pred"
    statistics = (*PREDICTED, SEMANTIC_SHARE)
    extremes = logged_extremes("pred", statistics)

    def __init__(self) -> None:
        self.set_keys(None, False)
        self.history = History([], [])
        self.step: int | None = None
        self.states: Tensor | None = None
        self._values: dict[str, Tensor] = {}
        # A step whose measured statistics may come yet.
        self._open: int | None = None

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on with the history of a checkpoint."""
        self.history = History.from_state_dict(state)

    def own_share(
        self,
        trainer: Trainer,
        heads: Mapping[str, HeadProjections],
        pooled: TokenStatistics,
        facts: Mapping[str, Mapping[str, Any]],
        *,
        surrogates: int,
        seed: int,
        note: Callable[[str], None],
    ) -> dict[str, Tensor]:
        """The predicted attention of one step, of this process' share of the layers; raises nothing.

        Args:
            trainer: the trainer.
            heads: layer name → what is known of it.
            pooled: the moments, reduced over ranks.
            facts: layer name → what this process' calls say besides.
            surrogates: sequences to draw.
            seed: of a generator of their own.
            note: called once with what cannot be predicted.

        Returns:
            Statistic → values of all heads, NaN where another process predicts or nothing can be.
        """
        rows = {name: torch.full((len(PREDICTED), head.heads), torch.nan) for name, head in heads.items()}
        own = [name for index, name in enumerate(heads) if index % trainer.world_size == trainer.global_rank]
        reasons: dict[str, list[str]] = {}
        try:
            moments, lengths = pooled.moments(), pooled.lengths()
        except Exception as error:
            reasons[describe_error(error)], own = own, []
        for name in own:
            if not {name} <= moments.keys() & facts.keys():
                continue
            try:
                known = dict(facts[name])
                found = _predicted(heads[name], moments[name], lengths[name], known, surrogates, seed)
                rows[name] = torch.stack([found[key].float().cpu() for key in PREDICTED])
            except Exception as error:
                if _are_finite(moments[name]):  # else that is said
                    reasons.setdefault(describe_error(error), []).append(name)
        for reason, names in reasons.items():
            note(f"the attention of {shorten(names)} is not predicted: {reason}")
        return dict(zip(PREDICTED, torch.cat(list(rows.values()), 1), strict=True))

    def take(
        self,
        step: int,
        labels: Mapping[str, str],
        values: dict[str, Tensor],
        heads: Sequence[int],
        states: Tensor | None,
    ) -> None:
        """Take the predictions of all layers at a step, the same on every process.

        Args:
            step: of the moments.
            labels: layer name → label.
            values: statistic → values of all heads.
            heads: of each layer.
            states: of all heads, or None.
        """
        self._values, self.states = values, states
        shape = tuple(labels.values()), tuple(heads)
        if (self.history.layers, self.history.heads) != shape:
            self.history = History(*shape)
        self.step = step

    def overall(self, counted: Tensor | None) -> dict[str, float]:
        """Aggregates of the newest prediction."""
        self.counted = counted
        return self.over_the_model(self._values, states=self.states)

    def publish(self, trainer: Trainer, monitor: LogKeys) -> None:
        """Send the newest prediction to the history and the loggers."""
        if self.step is None:
            return
        self.history.append(self.step, self._values, self.states)
        self._open = self.step
        self._log(trainer, monitor, self._values, self.step)

    def _log(self, trainer: Trainer, monitor: LogKeys, values: dict[str, Tensor], step: int) -> None:
        self.per_head, self.counted = monitor.per_head, monitor.counted
        self.families, self.exclude = monitor.families, monitor.exclude
        self.per_layer = monitor.per_layer if isinstance(monitor.per_layer, bool) else False
        states = self.history.states_at(step)
        scalars = self.worth_logging(self.over_the_model(values, states=states))
        log_scalars(trainer, scalars | self.by_layer_and_head(self.history, values, states=states), step)

    def compare(self, trainer: Trainer, monitor: LogKeys) -> None:
        """Log the semantic share of the newest prediction, where attention was measured at the same step."""
        step, self._open = self._open, None
        if step is None or step not in self.history.steps:
            return
        histories = [
            one.history
            for one in trainer.callbacks  # type: ignore[attr-defined]
            if getattr(one, "record_field", "") == "attention"
        ]
        index = self.history.steps.index(step)
        predicted = {name: column[index] for name, column in self.history.values.items()}
        share = semantic_share(self.history, predicted, histories, step)
        if share is not None:
            self.history.complete(step, {SEMANTIC_SHARE: share})
            self._log(trainer, monitor, {SEMANTIC_SHARE: share}, step)


def nothing_predicted(heads: Mapping[str, HeadProjections]) -> dict[str, Tensor]:
    """What :meth:`Predictions.own_share` gives of a process that predicts nothing."""
    nothing = torch.full((sum(head.heads for head in heads.values()),), torch.nan)
    return {name: nothing.clone() for name in PREDICTED}


def _are_finite(moments: TokenMoments) -> bool:
    return all(bool(side.scatter.isfinite().all()) for side in (moments.query, moments.key))


def _predicted(
    head: HeadProjections,
    moments: TokenMoments,
    lengths: tuple[int, int],
    facts: dict[str, Any],
    surrogates: int,
    seed: int,
) -> dict[str, Tensor]:
    is_causal = facts.pop("is_causal")
    length = min(lengths[1], LENGTH)
    bias = facts["offset_bias"]
    if bias is not None:
        length = min(length, (bias.shape[1] + 1) // 2)
    return predict_attention(
        head,
        replace(moments, **facts),
        length=length,
        is_causal=is_causal,
        sequences=surrogates,
        seed=seed,
    )
