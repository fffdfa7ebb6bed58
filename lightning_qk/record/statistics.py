"""The registry of statistics: what each means, when to worry, how it is drawn and what of it is logged.

The report, the figures, the loggers and the docs read it. A new statistic is one entry here and the function that
computes it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from lightning_qk.record.families import OTHER, family_of

ALWAYS, WITH_ROOM = "always", "with room"
"""When the report draws a statistic."""

RUN_GROUPS = {
    "spectrum": "qk",
    "tokens": "qk/tokens",
    "attention": "attn",
    "sinks": "attn",
    "position": "attn",
}
"""History of a record → prefix of its log keys, where they differ."""


@dataclass(frozen=True)
class Statistic:
    """What is known of a statistic besides its values.

    Attributes:
        group: prefix of its log keys.
        name: the rest.
        title: what it is, in a few words.
        meaning: what its values mean, in sentences.
        worry: when to worry: the end of "when"; empty where no value is a fault by itself.
        unit: its unit, or an empty string. An unscaled logit is one of tokens of variance 1, before the softmax
            scale; with it logits are in nats.
        share: it lies between 0 and 1, and is drawn on that scale.
        signed: zero is its middle, and is drawn as the middle colour.
        peak: of several heads the largest counts, not the mean.
        log: dashboards draw it on a logarithmic axis.
        drawn: ``ALWAYS``, ``WITH_ROOM`` (where the page has room) or empty: not in the report.
        instead_of: a statistic in whose place it is drawn where that one was not recorded.
        extremes: which of ``min`` and ``max`` over all heads loggers get beside the mean.
        per_layer: it is logged for every layer unless others are asked for.
        heatmap: it is logged as a layer × head picture.
    """

    group: str
    name: str
    title: str
    meaning: str = ""
    worry: str = ""
    unit: str = ""
    share: bool = False
    signed: bool = False
    peak: bool = False
    log: bool = False
    drawn: str = ""
    instead_of: str = ""
    extremes: tuple[str, ...] = ()
    per_layer: bool = False
    heatmap: bool = False

    @property
    def label(self) -> str:
        """Title and unit, for an axis."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    @property
    def family(self) -> str:
        """The one of :data:`~lightning_qk.record.families.FAMILIES` that it belongs to."""
        return family_of(self.group, self.name)


_ = Statistic
# In the order of the report.
# fmt: off
PREDICTED = (
    "entropy_normalized",
    "entropy",
    "sink_first",
    "linear_share",
    "logit_std",
    "distance",
    "distance_spread",
    "max_prob",
    "diagonal",
    "participation",
    "sink_rate",
)
"""Statistics that are predicted: means, which do not depend on how many rows are seen as maxima do."""

SEMANTIC_SHARE = "semantic_share"
"""What the moments do not explain."""

_ALL: tuple[Statistic, ...] = (
    _("qk", "sym_var", "variance of the symmetric part's eigenvalues",
      "How far the eigenvalues of the symmetric part of W_QK spread. It is never negative, and LocAteR "
      "makes it smaller. Bao et al. link a small spread around a mean other than zero to localized "
      "attention.",
      "it keeps growing long after the loss has settled, or one layer leaves the others far behind.",
      unit="unscaled logits²", drawn=ALWAYS, extremes=("max",), heatmap=True),
    _("qk", "eig_var", "eigenvalue variance",
      "How far the eigenvalues of W_QK spread. A small spread around a mean other than zero is what Bao et "
      "al. link to localized attention. It can be negative, since W_QK is not symmetric.",
      "it keeps growing long after the loss has settled.",
      unit="unscaled logits²", signed=True, drawn=WITH_ROOM, instead_of="sym_var", extremes=("min", "max"),
      per_layer=True),
    _("qk", "eig_mean", "eigenvalue mean",
      "The mean eigenvalue of W_QK. Its sign says where attention goes in the model of Bao et al., whose "
      "tokens are a random walk: positive to late keys, near the query, and negative to early ones.",
      unit="unscaled logits", signed=True, drawn=ALWAYS, extremes=("min", "max"), heatmap=True),
    _("qk", "spectral_radius", "largest |eigenvalue|",
      "The largest eigenvalue of W_QK in absolute value: how strongly its favourite direction is amplified.",
      "it jumps, or grows without end, with the largest logit following.",
      unit="unscaled logits", peak=True, log=True, drawn=ALWAYS, extremes=("max",)),
    _("qk", "singular_max", "largest singular value",
      "The largest singular value of W_QK: the bound on what a pair of tokens can add to a logit. For "
      "cross-attention it stands in for eigenvalues, which mean nothing there.",
      "it jumps, or grows without end, with the largest logit following.",
      unit="unscaled logits", peak=True, drawn=ALWAYS, extremes=("max",)),
    _("qk", "eigenvalues", "eigenvalues of W_QK",
      "Modulus and real part of the eigenvalues of W_QK of all heads, as histograms."),
    _("qk", "asymmetry", "asymmetry of W_QK",
      "0 where W_QK is symmetric (two tokens want each other alike), 1 where it is antisymmetric. A random "
      "head has 0.5.", share=True, drawn=ALWAYS, heatmap=True),
    _("qk", "concentration", "eigenvalue concentration",
      "How much of the spectrum is its mean: 1 where all eigenvalues are the same.",
      share=True, drawn=WITH_ROOM),
    _("qk", "sigma_1", "spectral norm of W_QK", "The largest singular value of W_QK.",
      "it jumps, or grows without end.", peak=True, drawn=WITH_ROOM, extremes=("max",), per_layer=True),
    _("qk", "effective_rank", "effective rank of W_QK",
      "How many directions W_QK uses, by the entropy of its singular values.",
      "it falls towards 1, or one layer has far less than its neighbours.",
      unit="directions", drawn=WITH_ROOM, extremes=("max",)),
    _("qk", "logit_bound", "bound on |logit| for tokens of norm √d",
      "No logit of tokens of norm √d, as a norm layer makes them, can be larger in absolute value.",
      "it grows without end, with the largest logit following.",
      peak=True, drawn=WITH_ROOM, extremes=("max",)),
    _("qk", "update_ratio", "update of W_QK against W_QK",
      "How much W_QK moved since the measurement before, against its own size.", "it jumps.",
      drawn=WITH_ROOM, extremes=("max",), per_layer=True),
    _("qk", "update_delta2_norm", "norm of Δ₂, the update of W_QK in first order",
      "The Frobenius norm of what W_QK changed by since the measurement before, in first order: "
      "ΔW_qᵀ W_k + W_qᵀ ΔW_k.",
      "it jumps, or grows while the learning rate does not.", log=True, extremes=("max",), per_layer=True),
    _("qk", "update_delta2_sigma_1", "spectral norm of Δ₂",
      "The largest singular value of the update of W_QK in first order.",
      "it jumps, or grows while the learning rate does not.", peak=True, log=True, extremes=("max",)),
    _("qk", "update_delta2_stable_rank", "stable rank of Δ₂",
      "How many directions the update of W_QK in first order has: its squared norm over its largest squared "
      "singular value, at least 1 and at most twice the width of the head. Small healthy models have "
      "values near 1.", unit="directions", drawn=WITH_ROOM, extremes=("min",), per_layer=True),
    _("qk", "update_delta2_effective_rank", "effective rank of Δ₂",
      "How many directions the update of W_QK in first order has, by the entropy of its squared singular "
      "values.", unit="directions", extremes=("min",)),
    _("qk", "update_delta3_norm", "norm of Δ₃, the update of W_QK in second order",
      "The Frobenius norm of ΔW_qᵀ ΔW_k, what the update of W_QK has beyond first order.",
      "it nears that of first order: steps are so large that the first order does not describe them.",
      log=True, extremes=("max",)),
    _("qk", "update_delta3_sigma_1", "spectral norm of Δ₃",
      "The largest singular value of ΔW_qᵀ ΔW_k.", "it jumps.", peak=True, log=True, extremes=("max",)),
    _("qk", "update_delta3_stable_rank", "stable rank of Δ₃",
      "How many directions ΔW_qᵀ ΔW_k has: its squared norm over its largest squared singular value.",
      unit="directions", extremes=("min",)),
    _("qk", "update_delta3_effective_rank", "effective rank of Δ₃",
      "How many directions ΔW_qᵀ ΔW_k has, by the entropy of its squared singular values.",
      unit="directions", extremes=("min",)),
    _("qk", "energy_top_1", "energy of the first direction",
      "How much of W_QK's squared norm its strongest direction has: 1 where it has no other.",
      "it nears 1 in a whole layer.", share=True, extremes=("max",)),
    _("qk", "energy_top_4", "energy of the first four directions",
      "How much of W_QK's squared norm its four strongest directions have.", "it nears 1 in a whole layer.",
      share=True, extremes=("max",)),
    _("qk", "logit_eig_mean", "eigenvalue mean, in logits",
      "The mean eigenvalue of W_QK times the softmax scale, with the norm in front of the layer where it is "
      "folded in: layers and models compare. In logits of tokens of variance 1. Bao et al.",
      unit="logits", signed=True, drawn=ALWAYS),
    _("qk", "logit_eig_var", "eigenvalue variance, in logits",
      "The variance of the eigenvalues of W_QK times the softmax scale. It can be negative, since W_QK is not "
      "symmetric. Bao et al.", unit="logits²", signed=True, drawn=ALWAYS),
    _("qk", "logit_sym_var", "variance of the symmetric part, in logits",
      "The variance of the eigenvalues of the symmetric part of W_QK times the softmax scale. Never negative.",
      unit="logits²", drawn=WITH_ROOM),
    _("qk", "positivity", "positivity of the eigenvalues",
      "Σλ / Σ|λ|: 1 where all eigenvalues are real and positive, so that tokens look at their like, -1 where "
      "all are negative, about 0 for random weights. After Elhage et al., there of another matrix.",
      signed=True, drawn=ALWAYS),
    _("qk", "symmetry", "symmetry of W_QK",
      "tr W_QK² / ‖W_QK‖²: 1 symmetric, -1 antisymmetric, about 0 for random weights. Saponati et al., whose "
      "score is (1 + symmetry) / 2.", signed=True, drawn=ALWAYS),
    _("qk", "symmetry_summed", "symmetry of a layer's heads summed",
      "The symmetry of the sum of W_QK over a layer's heads, as Saponati et al. give it for models: they find "
      "bidirectional training symmetric.", signed=True),
    _("qk", "directionality", "directionality of W_QK",
      "Whether a few coordinates of the keys (1) or of the queries (-1) count far more than the others: excess "
      "norm of columns against rows beyond two standard deviations. Saponati et al.",
      signed=True, drawn=WITH_ROOM),
    _("qk", "directionality_summed", "directionality of a layer's heads summed",
      "The directionality of the sum of W_QK over a layer's heads, as Saponati et al. give it for models: they "
      "find positive values after autoregressive training.", signed=True),
    _("qk", "circle_ratio", "largest |eigenvalue| over the circle law's radius",
      "How far the largest eigenvalue is beyond the disc that holds those of a random head of the same norm: "
      "about 1 for random weights. Derived from the circle law for products.",
      unit="radii", drawn=ALWAYS),
    _("qk", "stable_rank", "stable rank of W_QK",
      "The sum of the squared singular values over the largest: how many directions of the strongest's size. "
      "Rudelson and Vershynin.", unit="directions", drawn=ALWAYS),
    _("qk", "effective_rank_energy", "effective rank of W_QK by energy",
      "How many directions W_QK uses, by the entropy of its squared singular values; effective_rank takes them "
      "unsquared (Roy and Vetterli).", unit="directions", drawn=WITH_ROOM),
    _("qk", "participation_rank", "participation rank of W_QK",
      "‖W‖⁴ / tr (W Wᵀ)²: how many directions W_QK uses, from traces alone.",
      unit="directions", drawn=WITH_ROOM),
    _("qk", "localization", "localization of a random walk",
      "How much likelier late tokens of a Gaussian random walk pass signal through the piecewise-linear softmax "
      "of Bao et al. than early ones, by the weights. The paper's theory: tokens of real models are no such "
      "walk, and over their heads it says next to nothing.",
      unit="late minus early", signed=True, extremes=("min", "max")),
    _("qk", "propagation", "signal propagation of a random walk",
      "The probability that a token of a Gaussian random walk passes signal, averaged over its position, which "
      "is at most 0.5, in the theory of Bao et al. Tokens of real models are no such walk.",
      unit="probability", share=True),
    _("qk", "trace", "trace of W_QK", "The sum of the eigenvalues of W_QK.", signed=True),
    _("qk", "trace_sq", "trace of W_QK²", "The sum of the squared eigenvalues of W_QK.", signed=True),
    _("qk", "frobenius_sq", "squared Frobenius norm of W_QK",
      "The sum of the squares of all entries of W_QK: its size.",
      "it keeps growing while the loss stands still."),
    _("qk/tokens", "sym_var", "variance of the symmetric part's eigenvalues, over tokens",
      "How far the eigenvalues of the symmetric part of s Σ^½ W_QK Σ^½ spread, Σ the covariance of the layer's "
      "own tokens and s the softmax scale. It is never negative.", "it keeps growing while the loss stands still.",
      unit="logits²", drawn=ALWAYS, extremes=("max",), heatmap=True),
    _("qk/tokens", "eig_mean", "eigenvalue mean, over tokens",
      "The mean eigenvalue of s Σ^½ W_QK Σ^½: positive where tokens prefer their like, whatever the position.",
      unit="logits", signed=True, drawn=ALWAYS, extremes=("min", "max"), heatmap=True),
    _("qk/tokens", "eig_var", "eigenvalue variance, over tokens",
      "How far the eigenvalues of s Σ^½ W_QK Σ^½ spread. It can be negative, since the form is not symmetric.",
      unit="logits²", signed=True, drawn=WITH_ROOM, instead_of="sym_var", extremes=("min", "max"),
      per_layer=True),
    _("qk/tokens", "asymmetry", "asymmetry over tokens",
      "0 where two tokens want each other alike, 1 where one wants what the other does not: half of one minus "
      "the correlation of their two logits.", share=True, drawn=ALWAYS, heatmap=True),
    _("qk/tokens", "trace", "preference for the own key",
      "By how many logits a token's query prefers its own key to another token's, rotation aside: the trace of "
      "s Σ^½ W_QK Σ^½.", unit="logits", signed=True, drawn=WITH_ROOM),
    _("qk/tokens", "frobenius_sq", "variance of logits between tokens",
      "The variance of the logit of two different tokens, by what differs from token to token in both, rotation "
      "aside: ‖s Σ^½ W_QK Σ^½‖².", "it keeps growing while the loss stands still.",
      unit="logits²", log=True, drawn=WITH_ROOM, extremes=("max",)),
    _("qk/tokens", "trace_sq", "covariance of mutual logits",
      "The covariance of the logit of one token for another with that of the other for the one.",
      unit="logits²", signed=True),
    _("qk/tokens", "concentration", "eigenvalue concentration, over tokens",
      "How much of the spectrum of s Σ^½ W_QK Σ^½ is its mean: 1 where all eigenvalues are the same.",
      share=True),
    _("attn", "health", "share of heads that are not flagged",
      "The share of heads with none of the verdicts that are faults: non-finite, saturated, growing, collapsed. 1 "
      "where all is well. Heads of which nothing was measured do not count.",
      "it is below 1 for several measurements.", share=True, extremes=("min",)),
    _("attn", "entropy_normalized", "normalized attention entropy",
      "How evenly a query spreads its attention: 1 is uniform, 0 a single key.",
      "a whole layer falls towards 0 (entropy collapse, Zhai et al.) or stays at 1 after the warm-up, where"
      " every token receives the same mixture (rank collapse, Dong et al.).",
      unit="entropy / log keys", share=True, drawn=ALWAYS, extremes=("min", "max"), heatmap=True),
    _("attn", "max_abs_logit", "largest |logit|",
      "The largest logit before the softmax, in absolute value.",
      "it passes 100, where Kimi K2 clips, or 10,000, above which every run of Wortsman et al. diverged.",
      unit="nats", peak=True, drawn=ALWAYS, extremes=("max",)),
    _("attn", "max_logit", "largest logit", "The largest logit before the softmax.",
      "it passes 100, where Kimi K2 clips, or 10,000, above which every run of Wortsman et al. diverged.",
      unit="nats", signed=True, peak=True, log=True, instead_of="max_abs_logit", extremes=("max",),
      per_layer=True),
    _("attn", "sink_first", "attention to the first key",
      "The share of attention that goes to the first key. Language models tend to grow such a sink. Gu et "
      "al. count a key as one above 0.3.",
      "nearly all heads of a layer do so, and little attention is left for the content.",
      unit="probability", share=True, drawn=ALWAYS, extremes=("max",), heatmap=True),
    _("attn", "linear_share", "measured linear share",
      "The share of query-key pairs in the range where the piecewise-linear softmax of Bao et al. is "
      "neither 0 nor 1, so that signal and gradient pass.", "it falls towards 0: attention saturates.",
      unit="share of pairs", share=True, drawn=ALWAYS, extremes=("min",)),
    _("attn", "distance", "attention distance", "How many positions away attention looks on average.",
      unit="positions", drawn=ALWAYS, heatmap=True),
    _("attn", "logit_std", "standard deviation of logits",
      "How far the logits of a query spread. Attention sharpens as it grows.",
      "it keeps growing: entropy collapses with it.", unit="nats", drawn=WITH_ROOM),
    _("attn", "max_prob", "largest attention probability",
      "The largest probability that a query gives to any key.",
      "it nears 1 in a whole layer: each query sees one key.", share=True, drawn=WITH_ROOM),
    _("attn", "participation", "participation",
      "How many keys a query attends to, as if evenly: one over the sum of the squared probabilities.",
      "it falls towards 1 in a whole layer.", unit="effective keys", drawn=WITH_ROOM),
    _("attn", "sink_rate", "share of keys that are sinks",
      "The share of keys that receive more than 0.3 of attention on average (Gu et al.).",
      share=True, drawn=WITH_ROOM, extremes=("max",)),
    _("attn", "sink_heads", "Sink₁: share of heads that are sinks",
      "The share of heads whose first key takes over 0.3 of attention on average (Gu et al., with 64 tokens).",
      share=True),
    _("attn", "diagonal", "attention to the own position",
      "The share of attention that a token gives to itself.",
      unit="probability", share=True, drawn=WITH_ROOM),
    _("attn", "entropy", "attention entropy",
      "How widely a query spreads its attention, in nats: 0 is a single key, and the logarithm of the "
      "number of keys is uniform.", "a whole layer falls towards 0 (entropy collapse, Zhai et al.).",
      unit="nats", drawn=WITH_ROOM, instead_of="entropy_normalized", extremes=("min", "max"), per_layer=True),
    _("attn", "distance_spread", "spread of attention distance",
      "How far the positions that a query attends to lie apart.", unit="positions"),
    _("attn", "sink_learnt", "attention to the learnt sink",
      "The share of attention that goes to a learnt sink, which is no key.",
      "nearly all heads of a layer do so, and little attention is left for the content.",
      unit="probability", share=True),
    _("attn", "query_norm", "norm of the queries",
      "How long the queries are. Logits grow through the norms (Wortsman et al.).", "it grows without end.",
      log=True, extremes=("max",)),
    _("attn", "key_norm", "norm of the keys",
      "How long the keys are. Logits grow through the norms (Wortsman et al.).", "it grows without end.",
      log=True, extremes=("max",)),
    _("attn", "sink_output", "output in the span of the sinks' values",
      "How much of a head's output lies in the span of the sinks' values.",
      share=True, drawn=ALWAYS, extremes=("max",), heatmap=True),
    _("attn", "sink_number", "sinks",
      "How many keys of a sequence receive more than 0.3 of attention on average.",
      unit="keys of a sequence", drawn=WITH_ROOM),
    _("attn", "sink_share", "rows that attend to the strongest sink",
      "The share of queries that attend to the strongest sink of their sequence.",
      share=True, drawn=WITH_ROOM),
    _("attn", "waiver_rate", "share of keys with a short value",
      "The share of keys whose value is shorter than half of the median: attending to them adds little.",
      share=True, drawn=WITH_ROOM),
    _("attn", "waiver_mass", "attention to keys with a short value",
      "The share of attention that goes to keys with a short value, which is attention waived.",
      "it nears 1 in most heads of a layer: the layer writes next to nothing.",
      unit="probability", share=True, drawn=WITH_ROOM, extremes=("max",), heatmap=True),
    _("attn", "waiver_position", "waivers explained by position",
      "How much the position alone says of which keys have a short value; about 0 by chance.",
      unit="share of variance"),
    _("attn", "positional_share", "logits explained by distance",
      "How much of the logits the distance between query and key alone explains.",
      unit="share of variance", share=True, drawn=ALWAYS, extremes=("min", "max"), heatmap=True),
    _("hidden", "rank_residual_relative", "spread of tokens around their mean",
      "How far the tokens of a sequence spread around their mean, against their size: 0 where all tokens "
      "are the same.", "it falls towards 0 in the later layers (rank collapse, Dong et al.).",
      unit="share of norm", share=True, drawn=ALWAYS, extremes=("min",), per_layer=True),
    _("hidden", "cosine_abs", "|cosine| between tokens",
      "How much two different tokens of a sequence point along one line: 1 where all do.",
      "it rises towards 1 layer by layer: tokens become alike.",
      share=True, drawn=ALWAYS, extremes=("max",)),
    _("hidden", "cosine", "cosine between tokens",
      "The mean cosine of two different tokens of a sequence: 1 where all point one way.",
      "it rises towards 1 layer by layer: tokens become alike.",
      signed=True, instead_of="cosine_abs", extremes=("max",)),
    _("hidden", "effective_rank", "effective rank of hidden states",
      "How many directions the sampled tokens of a sequence use, by the entropy of their singular values.",
      "it falls towards 1, or one layer has far less than its neighbours.",
      unit="directions", drawn=ALWAYS, extremes=("min",)),
    _("hidden", "activation_max", "largest |activation|",
      "The largest activation. Trained models grow some that are thousands of times the median, which act "
      "as fixed biases (Sun et al.).", "it nears 65,504, where half precision ends, or keeps growing.",
      peak=True, log=True, drawn=ALWAYS, extremes=("max",)),
    _("hidden", "rank_residual", "norm of what tokens differ by",
      "How far the tokens of a sequence spread around their mean, as a norm: 0 where all are the same.",
      "it falls towards 0 in the later layers.", extremes=("min",)),
    _("hidden", "singular_min", "smallest singular value of hidden states",
      "The weakest direction that the tokens of a sequence use."),
    _("hidden", "singular_max", "largest singular value of hidden states",
      "The strongest direction that the tokens of a sequence use.", "it leaves all others behind."),
    _("hidden", "token_norm", "norm of tokens", "How long the hidden states are.",
      "it grows without end from layer to layer.", extremes=("max",)),
    _("hidden", "activation_top_1", "largest |activation| of a sequence",
      "The largest activation of a sequence, mean over sequences.",
      "it nears 65,504, where half precision ends."),
    _("hidden", "activation_top_2", "second largest |activation| of a sequence",
      "The second largest activation of a sequence, mean over sequences."),
    _("hidden", "activation_top_3", "third largest |activation| of a sequence",
      "The third largest activation of a sequence, mean over sequences."),
    _("hidden", "activation_median", "median |activation|", "The usual size of an activation."),
    _("hidden", "massive_count", "massive activations",
      "How many activations of a sequence are above 100 and a thousand times the median (Sun et al.).",
      extremes=("max",)),
    _("hidden", "massive_share", "share of massive activations",
      "The share of activations above 100 and a thousand times the median (Sun et al.).", share=True),
    _("probe", "explanation", "attention as explanation",
      "Kendall's rank agreement of the attention that tokens receive with what masking each of them changes."),
    _("probe", "exchangeability", "change under permutation",
      "How much a head's output changes when the tokens of its context change places: 0 takes them as a set."),
    _("probe", "parallel_entropy_whole", "entropy over the whole context",
      "Attention entropy where the whole context is seen."),
    _("probe", "parallel_entropy_parts", "entropy over parallel contexts",
      "Attention entropy where the context is cut into parts that are encoded in parallel."),
    _("probe", "parallel_entropy_ratio", "entropy ratio of parallel contexts",
      "Entropy over parallel parts of the context, over that of the whole.",
      "it is far above 1: quality falls where contexts are encoded in parallel."),
    _("probe", "irrelevant_mass", "attention to irrelevant tokens",
      "The share of attention that goes to tokens which were named irrelevant.", "it rises.", share=True),
    _("probe", "heads", "heads of a class", "How many heads are of each class of HeadReport."),
    _("locater", "penalty", "LocAteR's penalty",
      "The spectral variance that LocAteR prices, before it is weighted.",
      "it does not fall while it has a weight."),
    _("locater", "weight", "LocAteR's weight", "What the penalty is multiplied by."),
    _("clip", "gamma", "QK-Clip's factor",
      "What query and key weights of a head were scaled by; 1 where nothing was clipped.",
      "it stays far below 1."),
    _("clip", "max_logit", "largest logit before its clip",
      "The largest logit of a step, over all rows, before QK-Clip scaled the weights.",
      "it passes 100 again and again.", log=True),
    _("clip", "clipped_heads", "clipped heads",
      "How many query heads were clipped since the last logged step.",
      "most heads are clipped all the time.", extremes=("max",)),
    _("update_cap", "factor", "factor on updates",
      "What the updates of query and key weights were scaled by; 1 where no cap was needed.",
      "it stays far below 1."),
    _("update_cap", "ratio", "size of updates before the cap",
      "The largest singular value of an update over that of its matrix, before the cap.",
      "it stays above the cap."),
    _("update_cap", "capped", "capped matrices",
      "How many query and key matrices had an update that was capped.",
      "most matrices are capped all the time.", extremes=("max",)),
    _("sigma_reparam", "gain", "gain of σReparam",
      "The learnt factor γ on query and key weights of spectral norm 1.", "it grows without end."),
    _("spectrum_scaling", "factor", "factor on heads",
      "What heads are scaled by in validation and test loops."),
    _("soft_cap", "cap", "soft cap", "The bound that logits are squashed to."),
    _("attention_mask", "l1", "norm of the mask", "The norm of the learnt mask, before it is weighted."),
    _("attention_mask", "open", "open gates", "The share of visible pairs whose gate is open.",
      "it nears 0.", share=True),
    _("attention_prior", "kl", "divergence from the prior",
      "KL divergence of attention from the prior, before it is weighted."),
    _("entropy_band", "penalty", "penalty of the entropy band",
      "What normalized entropy outside of the band costs, before it is weighted."),
    _("entropy_band", "entropy", "normalized entropy in the band",
      "Mean normalized entropy of the heads that are priced."),
    _("entropy_band", "outside", "share outside of the band",
      "The share of heads, or rows, whose normalized entropy is outside of the band.", "it stays near 1.",
      share=True),
    _("guard", "score", "collapse score", "The largest of the detectors' scores.",
      "it reaches 1, an alarm.", extremes=("max",)),
    _("guard", "fired", "alarms", "How many alarms the guard gave.", "there is any."),
    _("guard", "loss", "score of the loss", "How far the training loss has risen, over what is an alarm.",
      "it reaches 1."),
    _("guard", "logits", "score of the logits",
      "How far logits will soon have grown, over what is an alarm.", "it reaches 1."),
    _("guard", "entropy", "score of the entropy",
      "How far the entropy of a layer will soon have fallen, over what is an alarm.", "it reaches 1."),
    _("guard", "rank", "score of the rank",
      "How much alike the tokens of a layer are, over what is an alarm.", "it reaches 1."),
    _("guard", "spectrum", "score of the spectrum",
      "How far W_QK has grown while the loss stands still, over what is an alarm.", "it reaches 1."),
    _("guard", "updates", "score of the updates",
      "How far the update of W_QK in a layer has grown over a window, over what is an alarm.", "it reaches 1."),
    _("guard", "lr_factor", "factor on the learning rate",
      "What the guard has multiplied the learning rate by."),
)
# fmt: on
del _


def _predicted(one: Statistic) -> Statistic:
    """A statistic of attention as what a layer's token moments predict of it."""
    return replace(
        one,
        group="pred",
        title=f"predicted {one.title}",
        meaning="What independent Gaussian tokens with the layer's own moments of queries and keys would give. "
        f"{one.meaning}",
        worry="",
        drawn=ALWAYS if one.name == "entropy_normalized" else WITH_ROOM,
        instead_of="",
        extremes=(),
        per_layer=False,
        heatmap=False,
    )


_ALL += (
    Statistic(
        "pred",
        SEMANTIC_SHARE,
        "what token moments do not explain",
        "The share of attention that has to be moved, at least, to come from the attention that the moments of "
        "queries and keys predict to the measured one: what tokens say to each other beyond their statistics.",
        unit="share of attention",
        share=True,
        drawn=ALWAYS,
        extremes=("max",),
    ),
    *(_predicted(one) for one in _ALL if one.group == "attn" and one.name in PREDICTED),
)

STATISTICS = {f"{one.group}/{one.name}": one for one in _ALL}
"""Log key without its place and reduction → statistic."""


def describe(statistic: str, group: str = "") -> Statistic:
    """What is known of a statistic, also of one that is not in the registry and the standard error of one that is.

    Args:
        statistic: its name.
        group: the history or the prefix of the log keys it belongs to; without, the first of that name is taken.
    """
    prefix = RUN_GROUPS.get(group, group)
    found = [one for one in _ALL if one.name == statistic and prefix in ("", one.group)]
    if found:
        return found[0]
    if statistic.endswith("_se"):
        base = describe(statistic.removesuffix("_se"), group)
        return Statistic(prefix, statistic, f"standard error of {base.title}", unit=base.unit)
    offset, _, name = statistic.partition("/")
    if offset.startswith("offset_") and name:
        base = describe(name, group)
        return replace(
            base, name=statistic, title=f"{base.title}, keys {offset.removeprefix('offset_')} before"
        )
    return Statistic(prefix, statistic, statistic.replace("_", " "))


def of_key(key: str) -> Statistic | None:
    """The statistic that a log key is of, whatever layer, head, loop or reduction it names; None where unknown."""
    group, *parts = key.split("/")
    if key.startswith("qk/tokens/"):
        group, parts = "qk/tokens", parts[1:]
    names = (f"{group}/{part}" for part in (*parts[:1], *parts[::-1]))
    return next((STATISTICS[name] for name in names if name in STATISTICS), None)


def family_of_key(key: str) -> str:
    """The family that a log key belongs to, whatever layer, head, loop or reduction it names."""
    one = of_key(key)
    return OTHER if one is None else one.family


def drawn_statistics(group: str, recorded: Iterable[str], *, with_room: bool = True) -> list[str]:
    """Which of the recorded statistics of a history the report draws, in order.

    Args:
        group: the history.
        recorded: names of statistics that have a value.
        with_room: also those that are drawn where there is room.
    """
    recorded = list(recorded)
    has, prefix = set(recorded), RUN_GROUPS.get(group, group)
    own = [one for one in _ALL if one.group == prefix]
    if not own:
        return list(recorded)
    found = []
    for one in own:
        if one.drawn == ALWAYS:
            names = (one.name, *(other.name for other in own if other.instead_of == one.name))
            found += [name for name in names if name in has][:1]
    rest = [one.name for one in own if one.drawn == WITH_ROOM and one.name in has and one.name not in found]
    return found + rest * with_room


def logged_extremes(group: str, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Statistic → which of ``min`` and ``max`` loggers get, of those that have any."""
    return {name: extremes for name in names if (extremes := describe(name, group).extremes)}


def logged_by_layer(group: str, names: Iterable[str]) -> tuple[str, ...]:
    """Statistics that are logged for every layer unless others are asked for."""
    return tuple(name for name in names if describe(name, group).per_layer)


def logged_as_heatmap(group: str, names: Iterable[str]) -> tuple[str, ...]:
    """Statistics that are logged as layer × head pictures."""
    return tuple(name for name in names if describe(name, group).heatmap)
