r"""Spectrum of the bilinear form of attention heads, from d_head × d_head products.

A head's logits are ``scaling * x_i^T W_QK x_j`` with ``W_QK = W_q^T W_k``, a ``d_model × d_model`` matrix of
rank ``d_head``. Everything here comes from ``B = W_k W_q^T`` and the Gram matrices ``W_q W_q^T`` and
``W_k W_k^T``, all ``d_head × d_head``: the large matrix is never formed. The non-zero eigenvalues of
``W_QK`` are those of ``B``.

Leading dimensions are free: ``(heads, d_head, d_model)`` for one layer, ``(layers, heads, d_head, d_model)``
for all layers of one shape in one batched product.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_qk.functional.checks import KindError, dense, floating, integer, one_device
from lightning_qk.functional.precision import at_least_float32, full_precision, scaled
from lightning_qk.functional.rotary import Rotary, rotate_between

Support = Literal["model", "head"]

MOMENTS = (
    "trace",
    "trace_sq",
    "frobenius_sq",
    "eig_mean",
    "eig_var",
    "sym_var",
    "asymmetry",
    "concentration",
)
"""Names of the entries that :func:`qk_moments` returns."""


def qk_moments(
    query: Tensor,
    key: Tensor,
    sigma: Tensor | None = None,
    *,
    support: Support = "model",
    offset: int | Tensor | None = None,
    rotary: Rotary | None = None,
) -> dict[str, Tensor]:
    r"""Moments of the eigenvalues of ``W_QK = W_q^T W_k``, per head, without forming it.

    After Bao et al., ICML 2024 (arXiv 2402.02098): eigenvalue mean and variance as stated there, symmetric
    variance, asymmetry and concentration derived. The softmax scale is not part of ``W_QK``.

    Args:
        query: query weights, shape ``(..., heads, d_head, d_model)``.
        key: key weights, shape ``(..., kv_heads, d_head, d_model)``; ``kv_heads`` divides ``heads``
            (grouped-query attention).
        sigma: covariance of the tokens, shape ``(d_model, d_model)`` or ``(..., d_model, d_model)`` with the
            leading dimensions of ``query`` before ``heads``; None means the identity. With it every
            quantity is that of ``Σ^½ W_QK Σ^½``.
        support: what the spectrum is averaged over. ``"model"``: all ``d_model`` eigenvalues, the zeros
            included, as in the paper's square matrix. ``"head"``: the ``d_head`` that can be non-zero.
        offset: relative position of the key, see :func:`qk_eigenvalues`: the moments are those of
            ``W_q^T R_Δ W_k``. Needs ``rotary``. None: the form without rotation.
        rotary: the layer's rotation, see :class:`~lightning_qk.functional.rotary.Rotary`.

    Returns:
        A dict of float tensors of shape ``(..., heads)``, or ``(offsets, ..., heads)`` for a tensor of
        offsets, with ``n`` the size of the support, ``λ`` the
        eigenvalues and ``S`` the symmetric part of ``W_QK``:

        - ``trace``: tr W_QK = Σ λ.
        - ``trace_sq``: tr W_QK² = Σ λ²; negative where complex pairs dominate.
        - ``frobenius_sq``: ‖W_QK‖²_F.
        - ``eig_mean``: trace / n.
        - ``eig_var``: Σ (λ − eig_mean)² / n, as a complex sum, which is real; negative where complex pairs
          dominate.
        - ``sym_var``: variance of the eigenvalues of S over the support, tr S² / n − eig_mean². Never
          negative: S is a difference of two positive matrices of rank d_head, so that it has at most d_head
          eigenvalues of one sign and (tr S)² ≤ d_head tr S².
        - ``asymmetry``: (‖W_QK‖² − tr W_QK²) / (2 ‖W_QK‖²) in [0, 1]; 0 symmetric, 1 antisymmetric. NaN for
          a head of zeros.
        - ``concentration``: trace² / (n tr S²) = eig_mean² / (eig_mean² + sym_var) in [0, 1]; 1 when all
          eigenvalues on the support are the same, at most d_head / d_model for ``support="model"``. NaN
          where S is zero.

        Computed in float32 at least, in float64 for float64 input, whatever autocast says.

    Raises:
        ValueError: shapes that do not fit, among them projections of different widths (cross-attention from
            another space, which has no eigenvalues: see :func:`qk_singular_values`), an unknown support, or an
            offset without a rotation.

    Example:
        >>> weight = torch.eye(2, 3)[None]  # one head, d_head = 2, d_model = 3
        >>> moments = qk_moments(weight, 2 * weight)
        >>> moments["trace"].item(), round(moments["eig_mean"].item(), 4)
        (4.0, 1.3333)
    """
    if floating(query, "query weights").dim() < 3:
        _prepare(query, key, square=True)
    n = support_size(query, support)
    with full_precision(query.device):
        query, key = _prepare(query, key, square=True)
        # Fourth powers of weights leave the range of the type long before the weights do.
        query, size = scaled(query, (-2, -1))
        key, size_of_key = scaled(key, (-2, -1))
        size_of_key = size_of_key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        products = Products(*_products(query, key, sigma))
        if offset is not None:
            products = products.at(_rotation(rotary, offset), torch.as_tensor(offset, device=query.device))
        powers = {"trace": 1, "eig_mean": 1, "asymmetry": 0, "concentration": 0}
        found = products.moments(n)
        # One factor after the other: their product alone may leave the range.
        for name in found:
            for _ in range(powers.get(name, 2)):
                found[name] = found[name] * size[..., 0, 0] * size_of_key[..., 0, 0]
        return found


class Products(NamedTuple):
    """The ``d_head × d_head`` products of a layer's weights that all its moments and eigenvalues depend on.

    Attributes:
        core: ``B = W_k Σ W_q^T``, shape ``(..., heads, d_head, d_head)``: what :func:`core_eigenvalues` takes.
        gram_query: ``W_q Σ W_q^T``, the same shape.
        gram_key: ``W_k Σ W_k^T``, the same shape.
    """

    core: Tensor
    gram_query: Tensor
    gram_key: Tensor

    def at(self, rotary: Rotary, offset: Tensor) -> "Products":
        """The products of ``R_Δ W_k`` instead of ``W_k``: a rotation of small matrices, no large product.

        Args:
            rotary: the layer's rotation.
            offset: relative positions of the key, shape ``(offsets,)``, which becomes the first dimension of the
                core and of the key's Gram matrix, or a scalar tensor.
        """
        half = rotate_between(self.gram_key, rotary, offset).mT
        # R (R G)^T = R G R^T, offset by offset.
        steps = offset.reshape(-1)
        halves = half.reshape(steps.numel(), *self.gram_key.shape)
        whole = [rotate_between(part, rotary, step) for part, step in zip(halves, steps, strict=True)]
        gram_key = torch.stack(whole).reshape(half.shape)
        return Products(rotate_between(self.core, rotary, offset), self.gram_query, gram_key)

    def moments(self, n: int) -> dict[str, Tensor]:
        """What :func:`qk_moments` returns, over a support of n eigenvalues."""
        small = self.core
        d_head = small.shape[-1]
        trace = small.diagonal(dim1=-2, dim2=-1).sum(-1)
        trace_sq = (small * small.mT).sum((-2, -1))
        frobenius_sq = (self.gram_query * self.gram_key).sum((-2, -1))
        mean = trace / n
        # Centred before squaring: Σ λ² / n − mean² would cancel where the spectrum concentrates, which is
        # what a regularizer aims at. The n − d_head eigenvalues that are zero add mean² each.
        centred = small - mean[..., None, None] * torch.eye(d_head, dtype=small.dtype, device=small.device)
        eig_var = ((centred * centred.mT).sum((-2, -1)) + (n - d_head) * mean.square()) / n
        symmetric_sq = (trace_sq + frobenius_sq) / 2
        return {
            "trace": trace,
            "trace_sq": trace_sq,
            "frobenius_sq": frobenius_sq,
            "eig_mean": mean,
            "eig_var": eig_var,
            "sym_var": symmetric_sq / n - mean.square(),
            "asymmetry": (frobenius_sq - trace_sq) / (2 * frobenius_sq),
            "concentration": trace.square() / (n * symmetric_sq),
        }


def qk_products(query: Tensor, key: Tensor, sigma: Tensor | None = None) -> Products:
    """The small products of weights as :func:`qk_moments` takes them, at the price of the moments alone."""
    with full_precision(query.device):
        query, key = _prepare(query, key, square=True)
        return Products(*_products(query, key, sigma))


def qk_eigenvalues(
    query: Tensor,
    key: Tensor,
    *,
    offset: int | Tensor | None = None,
    rotary: Rotary | None = None,
    sigma: Tensor | None = None,
) -> Tensor:
    r"""The ``d_head`` eigenvalues of ``W_QK = W_q^T W_k`` that can be non-zero, per head.

    Under rotary position encoding the form between a query at position i and a key at position j is
    ``W_q^T R_Δ W_k`` with Δ = j − i; its eigenvalues are those of ``R_Δ W_k W_q^T``, so that a spectrum per
    offset costs one more ``d_head × d_head`` eigenproblem and no large product. Derived.

    Args:
        query: query weights, shape ``(..., heads, d_head, d_model)``.
        key: key weights, shape ``(..., kv_heads, d_head, d_model)``.
        offset: relative position Δ of the key (negative: before the query), an int or an integer tensor of
            shape ``(offsets,)``. Needs ``rotary``. None: the form without rotation, which is that at offset 0
            too where ``rotary.scale`` is 1.
        rotary: the layer's rotation, see :class:`~lightning_qk.functional.rotary.Rotary`.
        sigma: covariance of the tokens, see :func:`qk_moments`.

    Returns:
        Complex eigenvalues in descending order of modulus, shape ``(..., heads, d_head)``, or
        ``(offsets, ..., heads, d_head)`` for a tensor of offsets. NaN for a head whose weights are not
        finite.

    Raises:
        ValueError: shapes that do not fit, or an offset without a rotation.

    Example:
        >>> weight = torch.eye(2, 3)[None]  # one head, d_head = 2, d_model = 3
        >>> qk_eigenvalues(weight, 2 * weight).real.tolist()
        [[2.0, 2.0]]
    """
    with full_precision(floating(query, "query weights").device):
        query, key = _prepare(query, key, square=True)
        small, _, _ = _products(query, key, sigma, grams=False)
        if offset is not None:
            small = rotate_between(
                small, _rotation(rotary, offset), torch.as_tensor(offset, device=small.device)
            )
        # On the CPU: LAPACK is quicker on matrices this small, and not every device has this eigenproblem.
        return core_eigenvalues(small.cpu()).to(small.device)


def _rotation(rotary: Rotary | None, offset: int | Tensor) -> Rotary:
    if rotary is None:
        raise ValueError(
            f"expected the layer's rotation with offset={offset!r}, got rotary=None: pass rotary=, or leave "
            "offset out for a layer without rotary position encoding"
        )
    if not isinstance(rotary, Rotary):
        raise KindError(
            f"expected rotary to be a Rotary, got {type(rotary).__name__}: pass that of HeadProjections"
        )
    floating(rotary.inv_freq, "rotary.inv_freq")
    if isinstance(offset, Tensor):
        if dense(offset, "offset").is_floating_point() or offset.is_complex() or offset.dtype == torch.bool:
            raise KindError(
                f"expected offset to be an integer tensor, got {offset.dtype}: convert it with .long()"
            )
        if offset.dim() > 1 or not offset.numel():
            raise ValueError(
                f"expected offset of shape (offsets,), one at least, got {tuple(offset.shape)}: flatten it"
            )
    else:
        integer(offset, "offset")
    return rotary


def core_eigenvalues(core: Tensor) -> Tensor:
    """Eigenvalues of cores ``W_k W_q^T``, shape ``(..., heads, d_head, d_head)``, as :func:`qk_eigenvalues`."""
    # LAPACK refuses the whole batch for one head that is not finite: that head alone becomes NaN.
    core, finite = _without_non_finite(core)
    values = torch.linalg.eigvals(core)
    values = values.gather(-1, values.abs().argsort(dim=-1, descending=True))
    return torch.where(finite, values, torch.full_like(values, complex("nan")))


def qk_singular_values(query: Tensor, key: Tensor) -> Tensor:
    """The ``d_head`` singular values of ``W_QK = W_q^T W_k`` that can be non-zero, per head.

    Defined also for cross-attention, where queries and keys live in different spaces. Taken from the
    triangular factors of ``W_q^T`` and ``W_k^T``. Derived.

    Args:
        query: query weights, shape ``(..., heads, d_head, d_query)``.
        key: key weights, shape ``(..., kv_heads, d_head, d_key)``; ``d_key`` may differ from ``d_query``.

    Returns:
        Singular values in descending order, shape ``(..., heads, min(d_head, d_query, d_key))``. NaN for a
        head whose weights are not finite.

    Raises:
        ValueError: shapes that do not fit.
    """
    with full_precision(floating(query, "query weights").device):
        return core_singular_values(qk_singular_core(query, key))


def qk_singular_core(query: Tensor, key: Tensor) -> Tensor:
    """The small matrix that has the singular values of ``W_QK``: what :func:`core_singular_values` takes.

    The product of the triangular factors of ``W_q^T`` and ``W_k^T``, shape
    ``(..., heads, min(d_head, d_query), min(d_head, d_key))``. NaN for a head whose weights are not finite.
    """
    with full_precision(query.device):
        query, key = _prepare(query, key, square=False)
        groups = query.shape[-3] // key.shape[-3]
        key = key.repeat_interleave(groups, dim=-3)
        finite = query.isfinite().all(-1).all(-1) & key.isfinite().all(-1).all(-1)
        query, key = (torch.where(finite[..., None, None], w, torch.zeros_like(w)) for w in (query, key))
        factor_query = torch.linalg.qr(query.mT, mode="r").R
        factor_key = torch.linalg.qr(key.mT, mode="r").R
        core = factor_query @ factor_key.mT
        return torch.where(finite[..., None, None], core, torch.full_like(core, torch.nan))


def core_singular_values(core: Tensor) -> Tensor:
    """Singular values of what :func:`qk_singular_core` returned, as :func:`qk_singular_values`."""
    core, finite = _without_non_finite(core)
    values = torch.linalg.svdvals(core)
    return torch.where(finite, values, torch.full_like(values, torch.nan))


def _without_non_finite(core: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros for heads that are not finite, and which are: ``(..., heads, 1)``."""
    finite = core.isfinite().all(-1).all(-1)[..., None]
    return torch.where(finite[..., None], core, torch.zeros_like(core)), finite


def _prepare(query: Tensor, key: Tensor, *, square: bool) -> tuple[Tensor, Tensor]:
    """Raise to float32 at least and check the shapes."""
    floating(query, "query weights")
    floating(key, "key weights")
    one_device(query=query, key=key)
    if query.dim() < 3 or key.dim() != query.dim() or key.shape[:-3] != query.shape[:-3]:
        raise ValueError(
            "expected query (..., heads, d_head, d_model) and key (..., kv_heads, d_head, d_model) with the "
            f"same leading dimensions, got {tuple(query.shape)} and {tuple(key.shape)}: split the weights "
            "into heads first, as head_projections does"
        )
    heads, d_head, width = query.shape[-3:]
    kv_heads, key_d_head, key_width = key.shape[-3:]
    if (
        not heads
        or not d_head
        or not width
        or not key_width
        or d_head != key_d_head
        or kv_heads == 0
        or heads % kv_heads
    ):
        raise ValueError(
            "expected one d_head and a number of heads that kv_heads divides, got query "
            f"{tuple(query.shape)} and key {tuple(key.shape)}: check how the weights were split into heads"
        )
    if square and width != key_width:
        raise ValueError(
            f"expected query and key weights of one width, got {width} and {key_width}: such cross-attention "
            "has no eigenvalues, use qk_singular_values"
        )
    dtype = torch.promote_types(at_least_float32(query).dtype, at_least_float32(key).dtype)
    return query.to(dtype), key.to(dtype)


def _products(
    query: Tensor, key: Tensor, sigma: Tensor | None, *, grams: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """``W_k Σ W_q^T``, ``W_q Σ W_q^T`` and ``W_k Σ W_k^T``, each ``(..., heads, d_head, d_head)``.

    Key weights are not repeated for grouped queries: the Gram matrices are, which are d_head × d_head.
    """
    groups = query.shape[-3] // key.shape[-3]
    weighted_query, weighted_key = query, key
    if sigma is not None:
        d_model = query.shape[-1]
        floating(sigma, "sigma")
        one_device(query=query, sigma=sigma)
        leading = sigma.shape[:-2] in ((), query.shape[:-3])
        if sigma.shape[-2:] != (d_model, d_model) or not leading:
            raise ValueError(
                f"expected sigma of shape (..., {d_model}, {d_model}), as wide as the tokens, got "
                f"{tuple(sigma.shape)}: pass the covariance of the layer's own inputs"
            )
        sigma = sigma.to(query.dtype)
        sigma = sigma if sigma.dim() == 2 else sigma.unsqueeze(-3)
        weighted_query, weighted_key = query @ sigma, key @ sigma
    # The queries that share a key are the rows of one matrix: one product a key head, and no copy of the keys.
    heads, d_head, d_model = query.shape[-3:]
    grouped = weighted_query.reshape(*query.shape[:-3], heads // groups, groups * d_head, d_model)
    small = (grouped @ key.mT).reshape(*query.shape[:-1], d_head).mT
    if not grams:
        return small, small, small
    gram_query = weighted_query @ query.mT
    gram_key = (weighted_key @ key.mT).repeat_interleave(groups, dim=-3)
    return small, gram_query, gram_key


def support_size(query: Tensor, support: Support) -> int:
    """Number of eigenvalues that the spectrum is averaged over: d_model or d_head."""
    if not isinstance(support, str) or support not in get_args(Support):
        raise ValueError(f"expected support to be 'model' or 'head', got {support!r}: pass one of the two")
    return query.shape[-1 if support == "model" else -2]


def circle_law_radius(frobenius_sq: Tensor, d_model: int) -> Tensor:
    r"""Radius of the disc that holds the eigenvalues of a random head of the same norm.

    Args:
        frobenius_sq: ``‖W_QK‖²_F``, any shape, as :func:`~lightning_qk.functional.qk_moments` gives it.
        d_model: width of what the projections read.

    Returns:
        The radius, of the same shape, in float32 at least. The largest eigenvalue of a random head of finite
        width lies a little in or out of it.

    Raises:
        ValueError: ``d_model`` below 1.

    Example:
        >>> circle_law_radius(torch.tensor(9.0), 4)
        tensor(1.5000)
    """
    floating(frobenius_sq, "frobenius_sq")
    d_model = integer(d_model, "d_model")
    if d_model < 1:
        raise ValueError(f"expected a d_model of at least 1, got {d_model}: pass the width of the tokens")
    return (at_least_float32(frobenius_sq) / d_model).sqrt()


def circle_law_share(modulus: Tensor, d_head: int, d_model: int) -> Tensor:
    r"""Share of a random head's ``d_head`` eigenvalues within some distance of zero.

    Args:
        modulus: distance over the radius of :func:`circle_law_radius`, any shape, not negative.
        d_head: width of the head.
        d_model: width of what the projections read.

    Returns:
        Shares in [0, 1], of the same shape, in float32 at least: the root of ``F (1 − c + c F) = modulus²`` with
        ``c = d_head / d_model``, and 1 from the radius on; NaN for a negative distance.

    Raises:
        ValueError: a head that is wider than the model, or a width below 1.

    Example:
        >>> circle_law_share(torch.tensor([0.5, 2.0]), 64, 64)  # a square product is dense at its centre
        tensor([0.5000, 1.0000])
    """
    floating(modulus, "modulus")
    d_head, d_model = integer(d_head, "d_head"), integer(d_model, "d_model")
    if not 1 <= d_head <= d_model:
        raise ValueError(
            f"expected a head no wider than the model, got d_head={d_head} and d_model={d_model}: pass the "
            "widths of the projections"
        )
    c = d_head / d_model
    modulus = at_least_float32(modulus)
    square = torch.where(modulus < 0, torch.nan, modulus.clamp(0, 1)).square()
    # The root in the form that does not cancel for narrow heads.
    return (
        2
        * square
        / ((1 - c) + ((1 - c) ** 2 + 4 * c * square).sqrt()).clamp_min(torch.finfo(square.dtype).tiny)
    )
