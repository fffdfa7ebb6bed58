"""What the report says of its numbers."""

PAPERS = (
    "Bao, Hataya, Karakida: Self-attention Networks Localize When QK-eigenspectrum Concentrates. ICML 2024",
    "Dong, Cordonnier, Loukas: Attention is Not All You Need: Pure Attention Loses Rank Doubly Exponentially "
    "with Depth. ICML 2021",
    "Zhai et al.: Stabilizing Transformer Training by Preventing Attention Entropy Collapse. ICML 2023",
    "Wortsman et al.: Small-scale Proxies for Large-scale Transformer Training Instabilities. ICLR 2024",
    "Kimi Team: Kimi K2: Open Agentic Intelligence. 2025",
    "Gu et al.: When Attention Sink Emerges in Language Models: An Empirical View. ICLR 2025",
    "Sun et al.: Massive Activations in Large Language Models. 2024",
)
"""Papers that the page names."""

MEANING = {
    "eig_mean": (
        "The mean eigenvalue of W_QK. Its sign says where attention goes in the model of Bao et al.: "
        "positive to late keys, near the query, and negative to early ones. At zero no side is preferred.",
        "it stays at zero in every layer while the variance shrinks: attention then heads for uniform.",
    ),
    "eig_var": (
        "How far the eigenvalues of W_QK spread. A small spread around a mean other than zero is what "
        "Bao et al. link to localized attention. It can be negative, since W_QK is not symmetric.",
        "it keeps growing long after the loss has settled.",
    ),
    "sym_var": (
        "How far the eigenvalues of the symmetric part of W_QK spread. It is never negative, and LocAteR "
        "makes it smaller. Bao et al. link a small spread around a mean other than zero to localized "
        "attention.",
        "it keeps growing long after the loss has settled, or one layer leaves the others far behind.",
    ),
    "asymmetry": (
        "0 where W_QK is symmetric (two tokens want each other alike), 1 where it is antisymmetric. "
        "A random head has 0.5.",
        "",
    ),
    "spectral_radius": (
        "The largest eigenvalue of W_QK in absolute value: how strongly its favourite direction is "
        "amplified.",
        "it jumps, or grows without end, with the largest logit following.",
    ),
    "singular_max": (
        "The largest singular value of W_QK: the bound on what a pair of tokens can add to a logit. For "
        "cross-attention it stands in for eigenvalues, which mean nothing there.",
        "it jumps, or grows without end, with the largest logit following.",
    ),
    "entropy_normalized": (
        "How evenly a query spreads its attention: 1 is uniform, 0 a single key.",
        "a whole layer falls towards 0 (entropy collapse, Zhai et al.) or stays at 1 after the warm-up, "
        "where every token receives the same mixture (rank collapse, Dong et al.).",
    ),
    "entropy": (
        "How widely a query spreads its attention, in nats: 0 is a single key, and the logarithm of the "
        "number of keys is uniform.",
        "a whole layer falls towards 0 (entropy collapse, Zhai et al.).",
    ),
    "max_abs_logit": (
        "The largest logit before the softmax, in absolute value.",
        "it passes 100, where Kimi K2 clips, or 10,000, above which every run of Wortsman et al. diverged.",
    ),
    "max_logit": (
        "The largest logit before the softmax.",
        "it passes 100, where Kimi K2 clips, or 10,000, above which every run of Wortsman et al. diverged.",
    ),
    "sink_first": (
        "The share of attention that goes to the first key. Language models tend to grow such a sink. "
        "Gu et al. count a key as one above 0.3.",
        "nearly all heads of a layer do so, and little attention is left for the content.",
    ),
    "linear_share": (
        "The share of query-key pairs in the range where the piecewise-linear softmax of Bao et al. is "
        "neither 0 nor 1, so that signal and gradient pass.",
        "it falls towards 0: attention saturates.",
    ),
    "localization": (
        "How much likelier late tokens pass signal through the piecewise-linear softmax of Bao et al. than "
        "early ones, predicted from the weights alone for tokens that are a Gaussian random walk: 1 is "
        "attention localized on late tokens, -1 on early ones.",
        "it stays at 0 in every layer: attention is uniform, or saturated where the largest logit is high.",
    ),
    "rank_residual_relative": (
        "How far the tokens of a sequence spread around their mean, against their size: 0 where all tokens are "
        "the same.",
        "it falls towards 0 in the later layers (rank collapse, Dong et al.).",
    ),
    "cosine_abs": (
        "How much two different tokens of a sequence point along one line: 1 where all do.",
        "it rises towards 1 layer by layer: tokens become alike.",
    ),
    "cosine": (
        "The mean cosine of two different tokens of a sequence: 1 where all point one way.",
        "it rises towards 1 layer by layer: tokens become alike.",
    ),
    "effective_rank": (
        "How many directions the sampled tokens of a sequence use, by the entropy of their singular values.",
        "it falls towards 1, or one layer has far less than its neighbours.",
    ),
    "activation_max": (
        "The largest activation. Trained models grow some that are thousands of times the median, which act as "
        "fixed biases (Sun et al.).",
        "it nears 65,504, where half precision ends, or keeps growing.",
    ),
    "propagation": (
        "The predicted probability that a token passes signal, averaged over its position, in the model of Bao et "
        "al. It is 0.5 while nothing saturates.",
        "it falls towards 0: the softmax saturates.",
    ),
    "concentration": (
        "How much of the spectrum is its mean: 1 where all eigenvalues are the same.",
        "",
    ),
    "sink_rate": (
        "The share of keys that receive more than 0.3 of attention on average (Gu et al.).",
        "",
    ),
    "distance": ("How many positions away attention looks on average.", ""),
    "logit_std": (
        "How far the logits of a query spread. Attention sharpens as it grows.",
        "it keeps growing: entropy collapses with it.",
    ),
    "positional_share": (
        "How much of the logits the distance between query and key alone explains.",
        "",
    ),
    "sigma_1": ("The largest singular value of W_QK.", "it jumps, or grows without end."),
    "update_ratio": (
        "How much W_QK moved since the measurement before, against its own size.",
        "it jumps.",
    ),
    "sink_output": ("How much of a head's output lies in the span of the sinks' values.", ""),
}
"""Statistic → what it means, and when to worry."""
