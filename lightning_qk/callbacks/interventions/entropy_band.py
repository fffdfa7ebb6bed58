"""Callback: entropy of attention is held in a band while a model trains."""

from lightning.pytorch import LightningModule, Trainer

from lightning_qk._deprecated import old_spellings
from lightning_qk.callbacks._layers import Patterns, chosen_sites
from lightning_qk.callbacks.interventions._attention import PenaltyIntervention
from lightning_qk.interventions.penalties import Per, band_measure, check_band


class EntropyBand(PenaltyIntervention):
    """Penalizes attention whose normalized entropy leaves a band, with no change to the loss.

    The gradient of ``weight`` times :func:`~lightning_qk.interventions.penalties.entropy_band`, averaged over
    layers, joins that of the loss at the attention calls. It equals that of a term of the loss, with gradient
    accumulation, mixed precision, gradient checkpointing and DDP too. Logged losses do not contain it. Outputs
    are bit-identical. It takes two passes over the logits in the backward pass and one in the forward pass,
    in memory linear in the sequence length.

    After entropy regularization with a tolerance, arXiv 2501.03489; the hinge on a fixed band is our own form
    [R].

    Logged keys: ``entropy_band/penalty``, the mean over layers before it is weighted, ``entropy_band/entropy``,
    mean normalized entropy, and ``entropy_band/outside``, the share of heads (or rows) outside of the band.
    With a name, ``entropy_band/<name>/…``.

    Args:
        weight: coefficient of the penalty, which is at most 1.
        low: lower bound of normalized entropy, in [0, 1].
        high: upper bound, in [0, 1].
        per: ``"head"``: a head's mean over the batch's rows is held in the band; ``"row"``: every row is.
        modules: glob pattern or patterns on qualified names of attention layers; None for all.
        name: tells several of these callbacks in one trainer apart.

    Raises:
        TypeError: the trainer is one of the package ``pytorch_lightning``.
        ValueError: an argument is out of range, patterns match no layer, a layer does not call its function
            through transformers' interface or in a way that cannot be read, or DeepSpeed.
    """

    group = "entropy_band"
    logged = ("penalty", "entropy", "outside")

    @old_spellings(("low", "high", "weight"))
    def __init__(
        self,
        *,
        weight: float = 0.1,
        low: float = 0.1,
        high: float = 0.95,
        per: Per = "head",
        modules: Patterns = None,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, modules, name)
        check_band(low, high, per)
        self.low = low
        self.high = high
        self.per: Per = per

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers; raise here, before any work, where one cannot be steered."""
        sites = chosen_sites(pl_module, self.modules)
        self.penalize(sites, band_measure(self.low, self.high, self.per), pl_module)
