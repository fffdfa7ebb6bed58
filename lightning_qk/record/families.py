"""Families of statistics: what a dashboard can be made of, and what it can do without."""

import difflib
from collections.abc import Sequence

OTHER = "other"
"""Family of statistics that are in no registry, such as those of a monitor of the user's own."""

FAMILIES = {
    "health": "one number: the share of heads that are not flagged",
    "entropy": "how sharp attention is",
    "logits": "how large logits, queries and keys are",
    "sinks": "keys that take much attention, and attention that is waived",
    "position": "how far attention looks, and whether by distance alone",
    "spectrum": "eigenvalues of W_QK",
    "singular": "singular values and ranks of W_QK",
    "moments": "traces and size of W_QK",
    "theory": "the theory of tokens that are a random walk",
    "updates": "what W_QK changed by",
    "tokens": "spectra over the layer's own tokens",
    "predictions": "attention that token moments predict",
    "rank": "how far tokens are from being one",
    "activations": "how large hidden states are",
    "probes": "what AttentionProbes asks",
    "guard": "scores of CollapseGuard",
    "interventions": "what callbacks did that change the training",
    OTHER: "statistics of monitors of your own",
}
"""Name → the question that its statistics answer. Every statistic is in exactly one family."""


def checked_families(argument: str, names: str | Sequence[str]) -> tuple[str, ...]:
    """Names of families, each once.

    Args:
        argument: where they come from, for the error.
        names: one name or several.

    Raises:
        ValueError: one is no family.
    """
    given = (names,) if isinstance(names, str) else tuple(names)
    for name in given:
        if name not in FAMILIES:
            near = difflib.get_close_matches(str(name), FAMILIES, 1)
            mend = f"did you mean {near[0]!r}?" if near else "correct it"
            raise ValueError(f"expected {argument} among {', '.join(FAMILIES)}, got {name!r}: {mend}")
    return tuple(dict.fromkeys(given))
