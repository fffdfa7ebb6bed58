"""Sample the tokens that enter attention layers, in the forwards of a running model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_qk.architecture.labels import matches
from lightning_qk.capture.hidden import HiddenCapture
from lightning_qk.functional.layer_inputs import covariance_root, sample_places
from lightning_qk.heads.sites import attention_sites, is_turned, takes_padding

if TYPE_CHECKING:
    from typing_extensions import Self

_MOST_PLACES = 8
"""Batches and masks whose places are kept: layers of one forward have few, of encoder and decoder, say."""


class _Places(NamedTuple):
    """Places of tokens in a batch and their weights, its mask, and the layers that had them."""

    mask: Tensor | None
    where: Tensor
    weight: Tensor
    had: set[str]


class LayerInputs:
    """Takes tokens of what enters each attention layer of a model, besides the first one of every sequence.

    A context manager; within it every forward is sampled, save those of ``generate`` and those that a checkpoint
    repeats; of a layer that a forward runs several times, every run is. All layers of a forward have theirs at the
    same places. Padding is left out where a two-dimensional
    ``attention_mask`` says what it is. Tokens are constants: they carry no gradient. Compiled models are sampled
    too.

    Args:
        model: any module that contains attention.
        modules: glob pattern or patterns on qualified names of attention layers; None for all.
        tokens: how many to take of each forward.
        keep: how many to keep of each layer, the newest ones; None: eight times ``tokens``.
        seed: of the places that they are drawn at.

    Attributes:
        names: of the layers.

    Example:
        >>> from transformers import AutoConfig, AutoModelForCausalLM
        >>> from lightning_qk import locater_penalty
        >>> config = AutoConfig.for_model("gpt2", n_layer=1, n_head=2, n_embd=8, vocab_size=9)
        >>> model, batch = AutoModelForCausalLM.from_config(config), torch.randint(9, (2, 16))
        >>> with LayerInputs(model, tokens=8) as inputs:
        ...     loss = model(input_ids=batch, labels=batch).loss
        >>> penalty = locater_penalty(model, moments=inputs.moments())
        >>> (loss + 0.1 * penalty).backward()
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        modules: str | Sequence[str] | None = None,
        tokens: int = 512,
        keep: int | None = None,
        seed: int = 0,
    ) -> None:
        if tokens < 2:
            raise ValueError(f"expected at least 2 tokens, got {tokens}: a covariance needs several")
        self.tokens = tokens
        self._keep = max(tokens, 8 * tokens if keep is None else keep)
        self._generator = torch.Generator().manual_seed(seed)
        sites = [site for site in attention_sites(model) if matches(site.name, modules)]
        self.names = [site.name for site in sites]
        self._capture = HiddenCapture(
            {},
            self._hear,
            inputs={site.module: site.name for site in sites},
            models={
                site.module: [
                    owner
                    for owner in (site.module, *site.ancestors)
                    if takes_padding(owner) or (owner is not site.module and hasattr(owner, "config"))
                ]
                for site in sites
            },
            turned={site.module: is_turned(site.module) for site in sites},
            model=model,
            generated=lambda name: None,
            every_run=True,
        )
        self._taken: dict[str, tuple[Tensor, Tensor]] = {}
        # Batch, mask → places in it: a forward's layers share them.
        self._places: dict[tuple[Any, ...], _Places] = {}

    def __enter__(self) -> "Self":
        self.install()
        self.enabled = True
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    @property
    def enabled(self) -> bool:
        """Whether forwards are sampled."""
        return self._capture.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        if value != self._capture.enabled:
            self._capture.enabled = value

    @property
    def problems(self) -> dict[str, str]:
        """Layer → why its tokens cannot be taken."""
        return self._capture.problems

    @property
    def seen(self) -> set[str]:
        """Layers with a forward that was sampled."""
        return self._capture.seen

    def install(self) -> None:
        """Hook the layers, switched off."""
        self._capture.install()

    def remove(self) -> None:
        """Take the hooks away; what was taken stays."""
        self._capture.remove()

    def clear(self) -> None:
        """Forget what was taken."""
        self._taken.clear()
        self._places.clear()

    def seed(self, seed: int) -> None:
        """Draw places from here on as from the start with this seed."""
        self._generator.manual_seed(seed)

    def taken(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Tokens ``(tokens, d)`` of a layer and how many each stands for; None where there are none."""
        return self._taken.get(name)

    def moments(self) -> dict[str, Tensor]:
        """Layer name → factor of the covariance of its tokens, for ``locater_penalty(…, moments=)``."""
        return {name: covariance_root(*self._taken[name]) for name in self.names if name in self._taken}

    def inputs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Layer name → tokens and how many each stands for, for ``locater_penalty(…, inputs=)``."""
        return {name: self._taken[name] for name in self.names if name in self._taken}

    def _hear(self, name: str, states: Tensor, mask: Tensor | None) -> None:
        index, weight = self._drawn(name, states, mask)
        tokens = states.detach().flatten(0, 1).index_select(0, index)
        before = self._taken.get(name)
        if before is not None and before[0].shape[1] == tokens.shape[1]:
            tokens, weight = torch.cat([before[0], tokens]), torch.cat([before[1], weight])
        if len(tokens) > self._keep:
            tokens, weight = tokens[-self._keep :], weight[-self._keep :]
        self._taken[name] = tokens, weight

    def _drawn(self, name: str, states: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Places of tokens and their weights; others where the layer has had these, in another forward."""
        key = states.shape[:2], states.device, id(mask)
        kept = self._places.get(key)
        if kept is None or name in kept.had:
            own = None if mask is None else mask.to(states.device)
            places = sample_places(
                states.shape[:2], own, self.tokens, device=states.device, generator=self._generator
            )
            if len(self._places) >= _MOST_PLACES:
                self._places.pop(next(iter(self._places)))
            # The mask is kept, so that no other gets its id.
            kept = self._places[key] = _Places(mask, *places, set())
        kept.had.add(name)
        return kept.where, kept.weight
