"""Families of statistics: what a dashboard can be made of, and what it can do without."""

import difflib
from collections.abc import Sequence
from typing import NamedTuple

OTHER = "other"
"""Family of statistics that are in no registry, such as those of a monitor of the user's own."""


class Family(NamedTuple):
    """Some statistics that answer one question.

    Attributes:
        meaning: the question.
        members: their keys without place and reduction; ``group/*`` for all of a group.
    """

    meaning: str
    members: tuple[str, ...]


def _keys(group: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{group}/{name}" for name in names)


FAMILIES = {
    "health": Family("one number: the share of heads that are not flagged", ("attn/health",)),
    "entropy": Family(
        "how sharp attention is",
        _keys("attn", "entropy_normalized", "entropy", "max_prob", "participation", "linear_share"),
    ),
    "logits": Family(
        "how large logits, queries and keys are",
        _keys("attn", "max_abs_logit", "max_logit", "logit_std", "query_norm", "key_norm"),
    ),
    "sinks": Family(
        "keys that take much attention, and attention that is waived",
        (
            *_keys(
                "attn", "sink_first", "sink_rate", "sink_heads", "sink_learnt", "sink_output", "sink_number"
            ),
            *_keys("attn", "sink_share", "waiver_rate", "waiver_mass", "waiver_position"),
        ),
    ),
    "position": Family(
        "how far attention looks, and whether by distance alone",
        _keys("attn", "distance", "distance_spread", "diagonal", "positional_share"),
    ),
    "spectrum": Family(
        "eigenvalues of W_QK",
        (
            *_keys("qk", "sym_var", "eig_var", "eig_mean", "spectral_radius", "asymmetry", "concentration"),
            *_keys("qk", "eigenvalues", "circle_ratio", "positivity", "symmetry", "symmetry_summed"),
            *_keys("qk", "directionality", "directionality_summed"),
            *_keys("qk", "logit_eig_mean", "logit_eig_var", "logit_sym_var"),
        ),
    ),
    "singular": Family(
        "singular values and ranks of W_QK",
        (
            *_keys("qk", "singular_max", "sigma_1", "energy_top_1", "energy_top_4", "effective_rank"),
            *_keys("qk", "logit_bound", "stable_rank", "effective_rank_energy", "participation_rank"),
        ),
    ),
    "moments": Family("traces and size of W_QK", _keys("qk", "trace", "trace_sq", "frobenius_sq")),
    "theory": Family(
        "the theory of tokens that are a random walk", _keys("qk", "localization", "propagation")
    ),
    "updates": Family(
        "what W_QK changed by",
        (
            "qk/update_ratio",
            *(
                f"qk/update_{part}_{name}"
                for part in ("delta2", "delta3")
                for name in ("norm", "sigma_1", "stable_rank", "effective_rank")
            ),
        ),
    ),
    "tokens": Family("spectra over the layer's own tokens", ("qk/tokens/*",)),
    "predictions": Family("attention that token moments predict", ("pred/*",)),
    "rank": Family(
        "how far tokens are from being one",
        (
            *_keys("hidden", "rank_residual_relative", "rank_residual", "cosine_abs", "cosine"),
            *_keys("hidden", "effective_rank", "singular_min", "singular_max"),
        ),
    ),
    "activations": Family(
        "how large hidden states are",
        (
            *_keys("hidden", "activation_max", "activation_top_1", "activation_top_2", "activation_top_3"),
            *_keys("hidden", "activation_median", "massive_count", "massive_share", "token_norm"),
        ),
    ),
    "probes": Family("what AttentionProbes asks", ("probe/*",)),
    "guard": Family("scores of CollapseGuard", ("guard/*",)),
    "interventions": Family(
        "what callbacks did that change the training",
        tuple(
            f"{group}/*"
            for group in (
                *("locater", "clip", "update_cap", "sigma_reparam", "spectrum_scaling", "soft_cap"),
                *("attention_mask", "attention_prior", "entropy_band"),
            )
        ),
    ),
    OTHER: Family("statistics of monitors of your own", ()),
}
"""Name → family. Every statistic is in exactly one."""

_OF = {member: name for name, family in FAMILIES.items() for member in family.members}


def family_of(group: str, name: str) -> str:
    """Family of a statistic.

    Args:
        group: prefix of its log keys.
        name: the rest; of a statistic at an offset, such as ``offset_16/eig_var``, too.
    """
    base = name.rsplit("/", 1)[-1].removesuffix("_se")
    return _OF.get(f"{group}/{base}") or _OF.get(f"{group}/*", OTHER)


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
