"""The registry's table of what weights say: a line has family, name, title, meaning and when to worry."""

from functools import partial

from lightning_qk.record.statistic import ALWAYS, WITH_ROOM, Statistic

_spectrum, _singular, _moments, _theory, _updates = (
    partial(Statistic, "qk", family=family)
    for family in ("spectrum", "singular", "moments", "theory", "updates")
)
_tokens = partial(Statistic, "qk/tokens", family="tokens")

# In the order of the report.
# fmt: off
OF_WEIGHTS: tuple[Statistic, ...] = (
    _spectrum("sym_var", "variance of the symmetric part's eigenvalues",
      "How far the eigenvalues of the symmetric part of W_QK spread. It is never negative, and LocAteR "
      "makes it smaller. Bao et al. link a small spread around a mean other than zero to localized "
      "attention.",
      "it keeps growing long after the loss has settled, or one layer leaves the others far behind.",
      unit="unscaled logits²", drawn=ALWAYS, extremes=("max",), heatmap=True),
    _spectrum("eig_var", "eigenvalue variance",
      "How far the eigenvalues of W_QK spread. A small spread around a mean other than zero is what Bao et "
      "al. link to localized attention. It can be negative, since W_QK is not symmetric.",
      "it keeps growing long after the loss has settled.",
      unit="unscaled logits²", signed=True, drawn=WITH_ROOM, instead_of="sym_var", extremes=("min", "max"),
      per_layer=True),
    _spectrum("eig_mean", "eigenvalue mean",
      "The mean eigenvalue of W_QK. Its sign says where attention goes in the model of Bao et al., whose "
      "tokens are a random walk: positive to late keys, near the query, and negative to early ones.",
      unit="unscaled logits", signed=True, drawn=ALWAYS, extremes=("min", "max"), heatmap=True),
    _spectrum("spectral_radius", "largest |eigenvalue|",
      "The largest eigenvalue of W_QK in absolute value: how strongly its favourite direction is amplified.",
      "it jumps, or grows without end, with the largest logit following.",
      unit="unscaled logits", peak=True, log=True, drawn=ALWAYS, extremes=("max",)),
    _singular("singular_max", "largest singular value",
      "The largest singular value of W_QK: the bound on what a pair of tokens can add to a logit. For "
      "cross-attention it stands in for eigenvalues, which mean nothing there.",
      "it jumps, or grows without end, with the largest logit following.",
      unit="unscaled logits", peak=True, drawn=ALWAYS, extremes=("max",)),
    _spectrum("eigenvalues", "eigenvalues of W_QK",
      "Modulus and real part of the eigenvalues of W_QK of all heads, as histograms."),
    _spectrum("asymmetry", "asymmetry of W_QK",
      "0 where W_QK is symmetric (two tokens want each other alike), 1 where it is antisymmetric. A random "
      "head has 0.5.", share=True, drawn=ALWAYS, heatmap=True),
    _spectrum("concentration", "eigenvalue concentration",
      "How much of the spectrum is its mean: 1 where all eigenvalues are the same.",
      share=True, drawn=WITH_ROOM),
    _singular("sigma_1", "spectral norm of W_QK", "The largest singular value of W_QK.",
      "it jumps, or grows without end.", peak=True, drawn=WITH_ROOM, extremes=("max",), per_layer=True),
    _singular("effective_rank", "effective rank of W_QK",
      "How many directions W_QK uses, by the entropy of its singular values.",
      "it falls towards 1, or one layer has far less than its neighbours.",
      unit="directions", drawn=WITH_ROOM, extremes=("max",)),
    _singular("logit_bound", "bound on |logit| for tokens of norm √d",
      "No logit of tokens of norm √d, as a norm layer makes them, can be larger in absolute value.",
      "it grows without end, with the largest logit following.",
      peak=True, drawn=WITH_ROOM, extremes=("max",)),
    _updates("update_ratio", "update of W_QK against W_QK",
      "How much W_QK moved since the measurement before, against its own size.", "it jumps.",
      drawn=WITH_ROOM, extremes=("max",), per_layer=True),
    _updates("update_delta2_norm", "norm of Δ₂, the update of W_QK in first order",
      "The Frobenius norm of what W_QK changed by since the measurement before, in first order: "
      "ΔW_qᵀ W_k + W_qᵀ ΔW_k.",
      "it jumps, or grows while the learning rate does not.", log=True, extremes=("max",), per_layer=True),
    _updates("update_delta2_sigma_1", "spectral norm of Δ₂",
      "The largest singular value of the update of W_QK in first order.",
      "it jumps, or grows while the learning rate does not.", peak=True, log=True, extremes=("max",)),
    _updates("update_delta2_stable_rank", "stable rank of Δ₂",
      "How many directions the update of W_QK in first order has: its squared norm over its largest squared "
      "singular value, at least 1 and at most twice the width of the head. Small healthy models have "
      "values near 1.", unit="directions", drawn=WITH_ROOM, extremes=("min",), per_layer=True),
    _updates("update_delta2_effective_rank", "effective rank of Δ₂",
      "How many directions the update of W_QK in first order has, by the entropy of its squared singular "
      "values.", unit="directions", extremes=("min",)),
    _updates("update_delta3_norm", "norm of Δ₃, the update of W_QK in second order",
      "The Frobenius norm of ΔW_qᵀ ΔW_k, what the update of W_QK has beyond first order.",
      "it nears that of first order: steps are so large that the first order does not describe them.",
      log=True, extremes=("max",)),
    _updates("update_delta3_sigma_1", "spectral norm of Δ₃",
      "The largest singular value of ΔW_qᵀ ΔW_k.", "it jumps.", peak=True, log=True, extremes=("max",)),
    _updates("update_delta3_stable_rank", "stable rank of Δ₃",
      "How many directions ΔW_qᵀ ΔW_k has: its squared norm over its largest squared singular value.",
      unit="directions", extremes=("min",)),
    _updates("update_delta3_effective_rank", "effective rank of Δ₃",
      "How many directions ΔW_qᵀ ΔW_k has, by the entropy of its squared singular values.",
      unit="directions", extremes=("min",)),
    _singular("energy_top_1", "energy of the first direction",
      "How much of W_QK's squared norm its strongest direction has: 1 where it has no other.",
      "it nears 1 in a whole layer.", share=True, extremes=("max",)),
    _singular("energy_top_4", "energy of the first four directions",
      "How much of W_QK's squared norm its four strongest directions have.", "it nears 1 in a whole layer.",
      share=True, extremes=("max",)),
    _spectrum("logit_eig_mean", "eigenvalue mean, in logits",
      "The mean eigenvalue of W_QK times the softmax scale, with the norm in front of the layer where it is "
      "folded in: layers and models compare. In logits of tokens of variance 1. Bao et al.",
      unit="logits", signed=True, drawn=ALWAYS),
    _spectrum("logit_eig_var", "eigenvalue variance, in logits",
      "The variance of the eigenvalues of W_QK times the softmax scale. It can be negative, since W_QK is not "
      "symmetric. Bao et al.", unit="logits²", signed=True, drawn=ALWAYS),
    _spectrum("logit_sym_var", "variance of the symmetric part, in logits",
      "The variance of the eigenvalues of the symmetric part of W_QK times the softmax scale. Never negative.",
      unit="logits²", drawn=WITH_ROOM),
    _spectrum("positivity", "positivity of the eigenvalues",
      "Σλ / Σ|λ|: 1 where all eigenvalues are real and positive, so that tokens look at their like, -1 where "
      "all are negative, about 0 for random weights. After Elhage et al., there of another matrix.",
      signed=True, drawn=ALWAYS),
    _spectrum("symmetry", "symmetry of W_QK",
      "tr W_QK² / ‖W_QK‖²: 1 symmetric, -1 antisymmetric, about 0 for random weights. Saponati et al., whose "
      "score is (1 + symmetry) / 2.", signed=True, drawn=ALWAYS),
    _spectrum("symmetry_summed", "symmetry of a layer's heads summed",
      "The symmetry of the sum of W_QK over a layer's heads, as Saponati et al. give it for models: they find "
      "bidirectional training symmetric.", signed=True),
    _spectrum("directionality", "directionality of W_QK",
      "Whether a few coordinates of the keys (1) or of the queries (-1) count far more than the others: excess "
      "norm of columns against rows beyond two standard deviations. Saponati et al.",
      signed=True, drawn=WITH_ROOM),
    _spectrum("directionality_summed", "directionality of a layer's heads summed",
      "The directionality of the sum of W_QK over a layer's heads, as Saponati et al. give it for models: they "
      "find positive values after autoregressive training.", signed=True),
    _spectrum("circle_ratio", "largest |eigenvalue| over the circle law's radius",
      "How far the largest eigenvalue is beyond the disc that holds those of a random head of the same norm: "
      "about 1 for random weights. Derived from the circle law for products.",
      unit="radii", drawn=ALWAYS),
    _singular("stable_rank", "stable rank of W_QK",
      "The sum of the squared singular values over the largest: how many directions of the strongest's size. "
      "Rudelson and Vershynin.", unit="directions", drawn=ALWAYS),
    _singular("effective_rank_energy", "effective rank of W_QK by energy",
      "How many directions W_QK uses, by the entropy of its squared singular values; effective_rank takes them "
      "unsquared (Roy and Vetterli).", unit="directions", drawn=WITH_ROOM),
    _singular("participation_rank", "participation rank of W_QK",
      "‖W‖⁴ / tr (W Wᵀ)²: how many directions W_QK uses, from traces alone.",
      unit="directions", drawn=WITH_ROOM),
    _theory("localization", "localization of a random walk",
      "How much likelier late tokens of a Gaussian random walk pass signal through the piecewise-linear softmax "
      "of Bao et al. than early ones, by the weights. The paper's theory: tokens of real models are no such "
      "walk, and over their heads it says next to nothing.",
      unit="late minus early", signed=True, extremes=("min", "max")),
    _theory("propagation", "signal propagation of a random walk",
      "The probability that a token of a Gaussian random walk passes signal, averaged over its position, which "
      "is at most 0.5, in the theory of Bao et al. Tokens of real models are no such walk.",
      unit="probability", share=True),
    _moments("trace", "trace of W_QK", "The sum of the eigenvalues of W_QK.", signed=True),
    _moments("trace_sq", "trace of W_QK²", "The sum of the squared eigenvalues of W_QK.", signed=True),
    _moments("frobenius_sq", "squared Frobenius norm of W_QK",
      "The sum of the squares of all entries of W_QK: its size.",
      "it keeps growing while the loss stands still."),
    _tokens("sym_var", "variance of the symmetric part's eigenvalues, over tokens",
      "How far the eigenvalues of the symmetric part of s Σ^½ W_QK Σ^½ spread, Σ the covariance of the layer's "
      "own tokens and s the softmax scale. It is never negative.", "it keeps growing while the loss stands still.",
      unit="logits²", drawn=ALWAYS, extremes=("max",), heatmap=True),
    _tokens("eig_mean", "eigenvalue mean, over tokens",
      "The mean eigenvalue of s Σ^½ W_QK Σ^½: positive where tokens prefer their like, whatever the position.",
      unit="logits", signed=True, drawn=ALWAYS, extremes=("min", "max"), heatmap=True),
    _tokens("eig_var", "eigenvalue variance, over tokens",
      "How far the eigenvalues of s Σ^½ W_QK Σ^½ spread. It can be negative, since the form is not symmetric.",
      unit="logits²", signed=True, drawn=WITH_ROOM, instead_of="sym_var", extremes=("min", "max"),
      per_layer=True),
    _tokens("asymmetry", "asymmetry over tokens",
      "0 where two tokens want each other alike, 1 where one wants what the other does not: half of one minus "
      "the correlation of their two logits.", share=True, drawn=ALWAYS, heatmap=True),
    _tokens("trace", "preference for the own key",
      "By how many logits a token's query prefers its own key to another token's, rotation aside: the trace of "
      "s Σ^½ W_QK Σ^½.", unit="logits", signed=True, drawn=WITH_ROOM),
    _tokens("frobenius_sq", "variance of logits between tokens",
      "The variance of the logit of two different tokens, by what differs from token to token in both, rotation "
      "aside: ‖s Σ^½ W_QK Σ^½‖².", "it keeps growing while the loss stands still.",
      unit="logits²", log=True, drawn=WITH_ROOM, extremes=("max",)),
    _tokens("trace_sq", "covariance of mutual logits",
      "The covariance of the logit of one token for another with that of the other for the one.",
      unit="logits²", signed=True),
    _tokens("concentration", "eigenvalue concentration, over tokens",
      "How much of the spectrum of s Σ^½ W_QK Σ^½ is its mean: 1 where all eigenvalues are the same.",
      share=True),
)
