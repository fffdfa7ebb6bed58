"""Callback: attention is pulled toward a prior while a model trains."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, get_args

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_qk._deprecated import old_spellings
from lightning_qk.architecture.labels import shorten
from lightning_qk.callbacks._layers import Patterns, chosen_sites
from lightning_qk.callbacks.interventions._attention import PenaltyIntervention
from lightning_qk.functional.entropy import PriorFunction
from lightning_qk.heads.facts import head_count
from lightning_qk.interventions.penalties import Kind, is_positional, named_prior, prior_measure


class AttentionPrior(PenaltyIntervention):
    """Pulls attention toward a prior, ``weight · KL(prior ‖ attention)``, with no change to the loss.

    The divergence is the mean over rows, heads and layers, streamed: memory is linear in the sequence length.
    Its gradient joins that of the loss at the attention calls and equals that of a term of the loss, with
    gradient accumulation, mixed precision, gradient checkpointing and DDP too. Outputs are bit-identical, and
    logged losses do not contain it. The prior is divided by its sum over the keys that a row sees; rows
    without prior mass there, and padding, are left out.

    Source: grounding priors, arXiv 2205.12616 [S]; the form is our own.

    Logged key: ``attention_prior/kl``, before it is weighted, in nats. With a name, ``attention_prior/<name>/kl``.

    Args:
        weight: coefficient of the divergence.
        prior: ``"diagonal"``, the token itself; ``"window"``, the same mass on keys fewer than ``window``
            positions away; ``"uniform"``, the same mass on every visible key; a function ``prior(batch, head,
            position, key)`` of index tensors; or any other text: the key under which each batch, a dictionary,
            brings a tensor that broadcasts to (batch, heads, n, m), or one of (batch, n, m). The tensor is
            taken out of the batch before the module's step sees it; a batch without it gets no pull, and one that
            cannot bring it, being no dictionary, none either, which is said once.
        window: of ``prior="window"``.
        heads: indices of the query heads that are pulled, in every layer; None for all.
        modules: glob pattern or patterns on qualified names of attention layers; None for all. Cross-attention
            has no diagonal and no window: it is left out there, which the log says.
        name: tells several of these callbacks in one trainer apart.

    Raises:
        TypeError: the trainer is one of the package ``pytorch_lightning``.
        ValueError: an argument is out of range, patterns match no layer, a layer does not call its function
            through transformers' interface or in a way that cannot be read, or DeepSpeed.
    """

    group = "attention_prior"

    logged = ("kl",)

    live: ClassVar[tuple[str, ...]] = ("_function", "_target")

    @old_spellings(("prior", "weight"))
    def __init__(
        self,
        *,
        weight: float = 0.1,
        prior: str | PriorFunction = "diagonal",
        window: int = 8,
        heads: Sequence[int] | None = None,
        modules: Patterns = None,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, modules, name)
        if not isinstance(prior, str) and not callable(prior):
            kinds = ", ".join(repr(kind) for kind in get_args(Kind))
            raise ValueError(
                f"expected prior to be {kinds}, a function or a batch's key, got {type(prior).__name__}: put a "
                "tensor of each example into the batch"
            )
        if window < 1:
            raise ValueError(f"expected a window of at least 1 position, got {window}")
        if heads is not None and (not heads or min(heads) < 0):
            raise ValueError(f"expected indices of heads, or None for all, got {list(heads)}")
        self.prior = prior
        self.window = window
        self.heads = None if heads is None else list(heads)

    def begin(self) -> None:
        """Forget the fit before."""
        super().begin()
        self._function: PriorFunction | None = None
        self._target: Tensor | PriorFunction | None = None

    @property
    def _key(self) -> str | None:
        """The key under which each batch brings its prior; None where it brings none."""
        is_key = isinstance(self.prior, str) and named_prior(self.prior, self.window) is None
        return self.prior if is_key and isinstance(self.prior, str) else None

    def _moved(self, batch: Any, key: str) -> Tensor | None:
        """The prior out of a batch; None of one that cannot bring any."""
        try:
            return _move_prior(batch, key)
        except Exception as error:
            self.say(f"a batch gets no pull: {error}; training goes on", key="a batch gets no pull")
            return None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers; raise here, before any work, where one cannot be penalized."""
        sites = chosen_sites(pl_module, self.modules)
        self._function = named_prior(self.prior, self.window) if isinstance(self.prior, str) else self.prior
        for site in sites:
            count = head_count(site.module)
            if self.heads is not None and count is not None and max(self.heads) >= count:
                raise ValueError(
                    f"expected indices of heads below {count}, got {self.heads} for {site.name}: leave the layer "
                    "out with modules="
                )
        if is_positional(self.prior):
            cross = [site.name for site in sites if site.is_cross]
            sites = [site for site in sites if not site.is_cross]
            if not sites:
                raise ValueError(
                    f"expected self-attention for prior={self.prior!r}, got cross-attention alone "
                    f"({shorten(cross)}): choose other modules, or another prior"
                )
            if cross:
                rank_zero_warn(
                    f"AttentionPrior: {shorten(cross)} left out: cross-attention has no {self.prior} prior"
                )
        self.penalize(sites, prior_measure(lambda: self._target, self.heads), pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Take the batch's prior."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        key = self._key
        self._target = self._function if key is None else self._moved(batch, key)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, and drop the batch's prior."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._target = None

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take the prior out of batches that the module evaluates, too."""
        if (key := self._key) is not None:
            self._moved(batch, key)

    on_test_batch_start = on_validation_batch_start
    on_predict_batch_start = on_validation_batch_start


def _move_prior(batch: Any, key: str) -> Tensor | None:
    """Take a tensor out of a batch.

    Raises:
        ValueError: the batch is no dictionary.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"expected a batch that is a dictionary with the prior under {key!r}, got {type(batch).__name__}"
        )
    if key not in batch:
        return None
    if not hasattr(batch, "pop"):
        raise ValueError(f"expected a batch that {key!r} can be taken out of, got {type(batch).__name__}")
    prior = batch.pop(key)
    return prior[:, None] if prior.dim() == 3 else prior
