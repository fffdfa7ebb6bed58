"""LocAteR's options, and what one of its steps adds."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_qk.functional.spectrum import Support, support_size
from lightning_qk.regularizers.locater import LocaterPenalty
from lightning_qk.regularizers.settings import Form, Settings, check_form, check_limit

Schedule = Literal["constant", "linear"]
Sigma = Literal["identity", "tokens"]


def filled(
    weight: float | str | None, form: Form | None, sigma: Sigma | None
) -> tuple[float | str, Form, Sigma]:
    """Weight, form and sigma, where None stands for what goes with the others."""
    if form is None:
        form = "limit" if weight is None else "variance"
    if weight is None:
        if form != "limit":
            raise ValueError(
                f"expected a weight with form={form!r}, got none: pass a number, or a share such as '1%'"
            )
        weight = 1.0
    return weight, form, sigma or ("tokens" if form == "limit" else "identity")


def label_among(own: Any, others: Sequence[Any]) -> str | None:
    """What tells a callback from others of its kind in the trainer; None where it is alone.

    Raises:
        ValueError: two have one name.
    """
    # Another callback's, which will switch it on, is not among them.
    mine = others if any(one is own for one in others) else [*others, own]
    labels = [str(place) if one.name is None else one.name for place, one in enumerate(mine, start=1)]
    if len(set(labels)) < len(labels):
        raise ValueError(
            f"expected LocAteR callbacks of different names in one trainer, got {', '.join(labels)}: pass "
            "each its own name="
        )
    return (
        None if len(mine) == 1 else next(text for text, one in zip(labels, mine, strict=True) if one is own)
    )


def check_options(
    sigma: str,
    form: Form,
    support: Support,
    target: float | None,
    nu: float,
    tokens: int,
    schedule: str,
    warmup_steps: int,
    cross_attention: bool,
    limit: float,
    share: float | None,
) -> None:
    """Raise ValueError for an option that is out of range, or does not go with another."""
    check_limit(limit)
    if form == "limit" and sigma != "tokens":
        raise ValueError(
            f"expected sigma='tokens' with form='limit', whose limit is in units of logits, got {sigma!r}: leave "
            "sigma out"
        )
    if form == "limit" and share is not None:
        raise ValueError(
            f"expected a number for weight with form='limit', which has no gradient in most steps, got "
            f"'{100 * share:g}%': leave weight out (1)"
        )
    if not math.isfinite(nu) or nu < 0:
        raise ValueError(f"expected a finite nu of at least 0, got {nu}: pass 0 to switch it off")
    if target is not None and not math.isfinite(target):
        raise ValueError(f"expected a finite target, got {target}")
    check_form(form, 0.0 if form == "target" else target)
    support_size(torch.empty(1, 1), support)
    if sigma not in get_args(Sigma):
        raise ValueError(f"expected sigma to be 'identity' or 'tokens', got {sigma!r}: pass one of the two")
    if tokens < 2:
        raise ValueError(f"expected tokens of at least 2, got {tokens}: a covariance needs several")
    if sigma == "tokens" and cross_attention:
        raise ValueError(
            "expected cross_attention=False with sigma='tokens', got True: queries and keys of different "
            "tokens have no covariance; leave it out"
        )
    if schedule not in get_args(Schedule):
        raise ValueError(f"expected schedule to be 'constant' or 'linear', got {schedule!r}")
    if warmup_steps < 0 or (schedule == "linear") != (warmup_steps > 0):
        raise ValueError(
            f"expected warmup_steps above 0 with schedule='linear' and 0 with 'constant', got {warmup_steps} "
            f"with {schedule!r}: set both"
        )


class HeldMeans:
    """The mean eigenvalue that the target form holds each head at: a given one, or that at the start of training.

    Attributes:
        start: qualified name of a layer → means of its heads when it was first seen, on the host.
    """

    def __init__(self, form: Form, target: float | None) -> None:
        self._target = target
        self._is_asked = form == "target" and target is None
        self.start: dict[str, Tensor] = {}
        self._aims: dict[str, Tensor] = {}

    def take(self, penalty: LocaterPenalty, support: Support, moments: Mapping[str, Tensor] | None) -> None:
        """Take the means of layers that have none yet: all at the start, else those that joined."""
        if not self._is_asked:
            return
        new = [name for name in penalty.names if name not in self.start]
        if moments is not None:
            new = [name for name in new if bool(moments[name].any())]
        if new:
            found = penalty.means(support, moments)
            self.start = {**self.start, **{name: found[name].cpu() for name in new}}

    def aims(self, penalty: LocaterPenalty, device: torch.device) -> float | Mapping[str, Tensor] | None:
        """The mean of every head, ``(heads,)`` a layer; of layers of which no token was seen yet, zeros."""
        if not self._is_asked:
            return self._target
        for name in penalty.names:
            start = self.start.get(name)
            if start is not None and name not in self._aims:
                # Once, since copying to the device waits for it.
                self._aims[name] = start.to(device)
        unseen = [name for name in penalty.names if name not in self._aims]
        layers = penalty.reader.layers
        return self._aims | {name: torch.zeros(layers[name].heads, device=device) for name in unseen}

    def release(self) -> None:
        """Drop what is on the device."""
        self._aims = {}


class Step(NamedTuple):
    """What one step adds.

    Attributes:
        settings: which penalty.
        weight: its coefficient.
        factor: the same, with the scale that gradients carry.
        parameters: those that the step changes.
    """

    settings: Settings
    weight: float
    factor: float | Tensor
    parameters: Sequence[Tensor]


NOTHING = Step(Settings("variance", "model", None, 1.0), 1.0, 1.0, ())
"""The step of a process on which it failed: computed to the end, and not used."""
