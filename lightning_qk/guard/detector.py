"""All detectors together: one verdict a reading."""

import math
from dataclasses import dataclass, field
from typing import Any

from lightning_qk.guard.detectors import DETECTORS, LossWatch, Sensitivity, UpdateGrowth
from lightning_qk.guard.reading import Reading

__all__ = ["CollapseDetector", "Sensitivity", "Verdict"]

HEALTHY = 0.5
"""Scores below it count as healthy."""


@dataclass(frozen=True)
class Verdict:
    """The judgement of one reading.

    Attributes:
        step: the optimizer step.
        score: largest of the detectors' scores; 1 and more is alarming.
        fired: it was alarming for as many readings as patience asks for, and no alarm had been given for it yet.
        reason: why, in one sentence with place and numbers; empty without an alarm.
        scores: detector → score.
        layer: qualified name of the attention layer that it is about; empty for the whole run.
        head: index of the head; None for the whole layer.
    """

    step: int
    score: float
    fired: bool
    reason: str = ""
    scores: dict[str, float] = field(default_factory=dict)
    layer: str = ""
    head: int | None = None

    @property
    def is_healthy(self) -> bool:
        """Far from an alarm."""
        return self.score < HEALTHY


class CollapseDetector:
    """Watches readings of a run and says when it is about to fail, and why.

    An alarm is given once; the next only after the scores were healthy again, or after :meth:`restart`.

    Args:
        sensitivity: what counts as an alarm.
    """

    def __init__(self, sensitivity: Sensitivity | None = None) -> None:
        self.sensitivity = sensitivity or Sensitivity()
        self._loss = LossWatch(self.sensitivity)
        kinds = (*DETECTORS, UpdateGrowth) if self.sensitivity.watches_updates else DETECTORS
        self._detectors = [kind(self.sensitivity) for kind in kinds]
        self._alarming = 0
        self._is_silent = False

    def observe(self, reading: Reading) -> Verdict:
        """Judge the next reading of the run."""
        findings = {"loss": self._loss.observe(reading)}
        for detector in self._detectors:
            findings[detector.name] = detector.observe(reading, self._loss.stall)
        worst = max(findings, key=lambda name: findings[name].score)
        score = findings[worst].score
        self._alarming = self._alarming + 1 if score >= 1 else 0
        if score < HEALTHY:
            self._is_silent = False
        # A number that is not finite needs no patience.
        due = self._alarming >= self.sensitivity.patience or math.isinf(score)
        fired = due and not self._is_silent
        if fired:
            self._is_silent = True
        scores = {name: min(finding.score, 1e6) for name, finding in findings.items()}
        reason = findings[worst].reason if score >= 1 else ""
        place = findings[worst].place if score >= 1 else None
        layer, head = ("", None) if place is None else place
        return Verdict(reading.step, score, fired, reason, scores, layer, head)

    def restart(self) -> None:
        """Forgets all readings, as after a step back to a checkpoint."""
        self._loss.clear()
        for detector in self._detectors:
            detector.clear()
        self._alarming, self._is_silent = 0, False

    def state_dict(self) -> dict[str, Any]:
        """State of all detectors, bounded by the window."""
        return {
            "loss": self._loss.state_dict(),
            "detectors": {detector.name: detector.state_dict() for detector in self._detectors},
            "alarming": self._alarming,
            "is_silent": self._is_silent,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        self._loss.load_state_dict(state["loss"])
        for detector in self._detectors:
            if detector.name in state["detectors"]:
                detector.load_state_dict(state["detectors"][detector.name])
        self._alarming, self._is_silent = state["alarming"], state["is_silent"]
