"""Read the query and key weights of every attention layer of a model, per head."""

from collections.abc import Callable

from torch import Tensor, nn

from lightning_qk.heads.errors import UnreadLayer
from lightning_qk.heads.find import Site, attention_sites
from lightning_qk.heads.folding import feeding_norm, fold_input_norm
from lightning_qk.heads.layouts import find_layout, unsupported
from lightning_qk.heads.linear import Affine, read_affine
from lightning_qk.heads.projections import HeadProjections
from lightning_qk.heads.qk_norm import Rows, fold_qk_norms
from lightning_qk.heads.rotary import read_rotary
from lightning_qk.heads.sizes import Sizes, head_sizes, softmax_scaling


def head_projections(model: nn.Module, *, fold_norm: bool = False) -> dict[str, HeadProjections]:
    """Read the query and key weights of every attention layer, split into heads.

    Nothing is run: the weights are found by the names and shapes of the layers' own modules, wherever in the
    model they hang. A layer that cannot be read is left out; `unread` names it with the reason.

    Args:
        model: any module that contains Hugging Face transformers, such as a LightningModule.
        fold_norm: multiply the gain of the norm that feeds a layer into its weights (for LayerNorm, the
            removal of the mean too), and its offset into the biases. The weights then act on normalized
            hidden states. Only a norm that provably feeds the layer is folded
            (`HeadProjections.norm_folded` tells): that of pre-norm self-attention. Post-norm layers and
            cross-attention are given as they are.

    Returns:
        Qualified module name to projections, in module order, a shared module once. The tensors are
        differentiable functions of the live parameters: views, save where a norm is folded in.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: the model contains no attention, or none that can be read.
    """
    read, reasons = _read(model, fold_norm)
    if read:
        return read
    kind = type(model).__name__
    if not reasons:
        raise ValueError(
            f"expected a model that contains transformer attention, found none in {kind}: pass the module "
            "that holds the network, once it is built (see `configure_model`)"
        )
    listed = "; ".join(f"{name or kind} because {reason}" for name, reason in list(reasons.items())[:3])
    more = f" and {len(reasons) - 3} more" if len(reasons) > 3 else ""
    raise ValueError(
        f"expected at least one attention layer of a known layout, found {len(reasons)} in {kind} of which "
        f"none can be read ({listed}{more}): add an entry to lightning_qk.heads.layouts or pass another model"
    )


def unread(model: nn.Module) -> dict[str, str]:
    """Name the attention layers that `head_projections` leaves out.

    Args:
        model: any module.

    Returns:
        Qualified module name to the reason, as a clause that begins with what the layer is or has, in module
        order. Empty where every layer is read.
    """
    return _read(model, fold_norm=False)[1]


def find_attention(model: nn.Module) -> dict[str, nn.Module]:
    """Find the attention layers of a model, those that cannot be read included.

    Args:
        model: any module.

    Returns:
        Qualified module name to module, in module order.
    """
    return {site.name: site.module for site in attention_sites(model)}


def _read(model: nn.Module, fold_norm: bool) -> tuple[dict[str, HeadProjections], dict[str, str]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}: pass the model itself")
    read: dict[str, HeadProjections] = {}
    reasons: dict[str, str] = {}
    for site in attention_sites(model):
        try:
            read[site.name] = _read_layer(site, fold_norm)
        except UnreadLayer as reason:  # noqa: PERF203
            reasons[site.name] = str(reason)
    return read, reasons


def _read_layer(site: Site, fold_norm: bool) -> HeadProjections:
    module = site.module
    layout = find_layout(module)
    if layout is None:
        children = ", ".join(name for name, _ in module.named_children()) or "none"
        raise UnreadLayer(
            f"{type(module).__name__} has no known layout of q and k (its children: {children})"
        )
    reason = unsupported(module)
    if reason is not None:
        raise UnreadLayer(reason)

    from_query = read_affine(module.get_submodule(layout.query), layout.query)
    from_key = from_query
    if layout.key != layout.query:
        from_key = read_affine(module.get_submodule(layout.key), layout.key)
    rows = from_query.weight.shape[0], from_key.weight.shape[0]
    sizes = head_sizes(module, site.config, rows, layout.order.blocks)

    self_attention = not site.is_cross and from_query.weight.shape[1] == from_key.weight.shape[1]
    query, key = _split(from_query, layout.order.query, sizes), _split(from_key, layout.order.key, sizes)
    norm = None
    if fold_norm and self_attention:
        norm = feeding_norm(module, site.ancestors, from_query.weight)
    if norm is not None:
        query, key = fold_input_norm(norm, query), fold_input_norm(norm, key)
    query, key, qk_norm = fold_qk_norms(module, query, key)
    return HeadProjections(
        query=query.weight,
        key=key.weight,
        query_bias=query.bias,
        key_bias=key.bias,
        scaling=softmax_scaling(module, sizes.d_head),
        layout=layout.name,
        rotary=read_rotary(module, site.ancestors, site.config, sizes.d_head),
        qk_norm=qk_norm,
        self_attention=self_attention,
        norm_folded=norm is not None,
    )


def _split(affine: Affine, pick: Callable[[Tensor, Sizes], Tensor], sizes: Sizes) -> Rows:
    return Rows(pick(affine.weight, sizes), None if affine.bias is None else pick(affine.bias, sizes))
