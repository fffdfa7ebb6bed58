"""What attention heads do, predicted from their weights."""

from collections import Counter
from collections.abc import Iterable

from torch import Tensor

SATURATED, UNIFORM, LATE, EARLY, UNKNOWN = "saturated", "uniform", "localized", "localized (early)", "-"

# Ours. Averaged over positions, signal passes with probability ½ where nothing saturates, be attention uniform or
# localized, and with less as the softmax does: a fifth of that is called saturated.
SATURATED_BELOW = 0.1
# Ours: one half of the positions passes at least three times as much signal as the other.
LOCALIZED_FROM = 0.5


def head_regimes(propagation: Tensor, localization: Tensor) -> list[str]:
    """The regime of each head in the model of Bao et al., ICML 2024 (arXiv 2402.02098), by the softmax scale.

    For tokens that are a Gaussian random walk of identity covariance: ``"saturated"`` where next to no signal
    passes the piecewise linear softmax, the side of entropy collapse; ``"localized"`` where that of late tokens
    passes and that of early ones does not, ``"localized (early)"`` the other way round; ``"uniform"`` where all
    pass alike, the side of rank collapse. It describes the weights under a model of the tokens and measures
    nothing. Thresholds stand at the top of this module. Derived.

    Args:
        propagation: predicted propagation, averaged over positions, shape ``(heads,)``.
        localization: that of the later half of the positions minus that of the earlier half.

    Returns:
        One regime a head; a dash for a head without values.
    """
    return [_regime(*pair) for pair in zip(propagation.tolist(), localization.tolist(), strict=True)]


def _regime(propagation: float, localization: float) -> str:
    if propagation != propagation or localization != localization:
        return UNKNOWN
    if propagation < SATURATED_BELOW:
        return SATURATED
    # (late − early) / (late + early)
    contrast = localization / (2 * propagation)
    if abs(contrast) < LOCALIZED_FROM:
        return UNIFORM
    return LATE if contrast > 0 else EARLY


def layer_regime(regimes: Iterable[str]) -> str:
    """The regimes of a layer's heads in a few words: the commonest first, with counts where there are several."""
    counts = Counter(regimes).most_common()
    if len(counts) == 1:
        return counts[0][0]
    return ", ".join(f"{count} {name}" for name, count in counts)
