"""LocAteR: localized attention regularization, a penalty on the scale of QK-eigenspectra."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qk.functional.checks import number
from lightning_qk.functional.spectrum import Support
from lightning_qk.heads.layer import LayerReader
from lightning_qk.heads.projections import HeadProjections
from lightning_qk.heads.reader import ProjectionReader, kept_reader, read_together
from lightning_qk.regularizers._shares import Shares, pulled, summed, wants
from lightning_qk.regularizers.closed_form import head_penalties, penalty_and_gradients
from lightning_qk.regularizers.latents import LatentStacker
from lightning_qk.regularizers.logits import limit_gradients, limit_penalties, parameters_of, takes_vectors
from lightning_qk.regularizers.settings import (
    LIMIT,
    Form,
    Settings,
    Target,
    batch_of,
    batches,
    select_layers,
)
from lightning_qk.regularizers.stacks import Stacker


def locater_penalty(
    model_or_projections: nn.Module | Mapping[str, HeadProjections],
    *,
    form: Form = "variance",
    support: Support = "model",
    target: Target | None = None,
    nu: float = 1.0,
    modules: str | Sequence[str] | None = None,
    cross_attention: bool = False,
    moments: Mapping[str, Tensor] | None = None,
    limit: float = LIMIT,
    inputs: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    r"""The penalty that concentrates the QK-eigenspectrum of every head.

    LocAteR of Bao et al., ICML 2024 (arXiv 2402.02098), shrinks the spectrum's scale and keeps its mean. With
    S the symmetric part of ``W_QK`` and n the size of the support, the sum over heads of

    - ``form="variance"``: ``tr S²/n − (tr S/n)²``, which puts no pressure on a shift of all n eigenvalues;
    - ``form="target"``: ``tr S²/n + ν (tr S/n − c)²``, which pulls the mean to c;
    - ``form="limit"``: ``max(0, ln(σ/τ))²``, which is nothing where σ is below the limit τ. With ``inputs`` only,
      since ``σ² = s² E[qᵀ Cov(k) q]`` is the variance of the head's logits between independent tokens: with
      biases, with norms of queries and keys, and before positions turn them.

    Eigenvalues that are all the same and eigenvalues that are all zero have no variance both: against a weak
    enough loss the variance form shrinks the mean with the scale, and the target form holds it.

    All forms are ours (derived): the paper's coefficient and the way it holds the mean are not stated in
    the text read. The plain ``tr W_QK²`` would be unbounded below for a non-symmetric ``W_QK``.

    With ``moments`` it is that of the token-aware spectrum: of ``s Σ^½ W_QK Σ^½``, s the softmax scale and Σ the
    covariance of the tokens that enter the layer, in units of logits. The tokens are held constant: the gradient
    is by W_q and W_k through the projections alone, and biases have none, since a covariance does not know them.

    Add ``weight * locater_penalty(model)`` to a loss, or use the callback
    :class:`~lightning_qk.LocAteR`, whose gradient is the same.

    With adapters (PEFT) the penalty is on the weights that act, and its gradient reaches the adapters'
    trainable parameters; a frozen weight beneath them, quantized or not, gets none. Frozen or averaged copies
    within the model count in the value: leave them out by ``modules=`` (the callback does so by itself).

    The model's layers are searched at the first call and after its modules change; from then on a call
    takes the live weights and does not wait for the device. Sharded weights (FSDP2, tensor parallel) are
    gathered one layer at a time, in a collective call, and the gradient is put on the local shard; it has no
    second derivative then.

    Args:
        model_or_projections: a module that contains transformers, or what
            :func:`~lightning_qk.head_projections` returned for it, which does not know norms.
        form: ``"variance"``, ``"target"`` or ``"limit"``.
        support: ``"model"``: n = d_model, as in the paper. ``"head"``: n = d_head.
        target: the mean c for ``form="target"``: a number, or a tensor ``(heads,)`` for each layer by name.
        nu: ν, how strongly ``form="target"`` holds the mean, against 1 on the scale.
        modules: glob pattern or patterns on qualified names of attention layers, such as
            ``"*.layers.[0-3].*"``; None for all.
        cross_attention: also penalize cross-attention whose queries and keys have the same width. Its
            spectrum relates two spaces, so that it is left out unless asked for. Not with ``moments``.
        moments: layer name → factor ``(tokens, d_model)`` of the covariance of what enters the layer,
            Σ = factor^T factor, such as :meth:`lightning_qk.tokens.LayerInputs.moments` gives; None: Σ = 1
            and no scale. All penalized layers have to be among them. Not with ``form="limit"``.
        limit: τ for ``form="limit"``, in units of logits.
        inputs: for ``form="limit"``, layer name → tokens ``(tokens, d_model)`` that enter the layer and how many
            each stands for, ``(tokens,)``, as ``LayerInputs.inputs`` gives.

    Returns:
        A scalar, differentiable in the model's weights, float32 at least. Never negative.

    Raises:
        ValueError: unknown form or support, a target missing, of another shape or given to the wrong form, a
            target or ν that is not finite, a limit without inputs, patterns that match no layer, no layers, a
            model without readable attention, moments or inputs missing or of another width, or a model that
            FSDP's first version flattens (use the callback).
        TypeError: neither a module nor a mapping.

    Example:
        >>> from transformers import AutoConfig, AutoModel
        >>> model = AutoModel.from_config(AutoConfig.for_model("gpt2", n_layer=1, n_head=2, n_embd=8))
        >>> loss = 0.1 * locater_penalty(model)  # + the loss of the task
        >>> loss.backward()
        >>> model.h[0].attn.c_attn.weight.grad is not None
        True
    """
    settings = Settings(form, support, target, nu, moments, limit, inputs)
    settings.check()
    projections = model_or_projections
    if isinstance(projections, nn.Module):
        projections = kept_reader(projections)
    names = select_layers(
        projections,
        modules=modules,
        cross_attention=cross_attention,
        by_tokens=moments is not None or inputs is not None,
        limited=form == "limit",
    )
    alone: list[LayerReader] = []
    if isinstance(projections, ProjectionReader):
        alone = [projections.layers[name] for name in names if projections.is_sharded(name)]
        if torch.is_grad_enabled() and any(layer.is_flat for layer in alone):
            raise ValueError(
                "expected weights that are whole or DTensors in a loss, got parameters that FSDP flattens: "
                "use the callback LocAteR, or FSDP2 (ModelParallelStrategy, see configs/fsdp2.yaml)"
            )
    sharded = {layer.name for layer in alone}
    whole = [name for name in names if name not in sharded]
    layers: Mapping[str, Any] = (
        projections.layers if isinstance(projections, ProjectionReader) else projections
    )
    by_vectors = {name: layers[name] for name in whole if form == "limit" and takes_vectors(layers[name])}
    totals = list(limit_penalties(by_vectors, settings))
    totals += [
        head_penalties(batch.query, batch.key, settings.of(batch)).sum()
        for batch in batches({name: projections[name] for name in whole if name not in by_vectors}, settings)
    ]
    if alone:
        of_layer = parameters_of if form == "limit" else LayerReader.parameters
        parameters = list(dict.fromkeys(p for layer in alone for p in of_layer(layer)))
        totals.append(_OneByOne.apply(alone, settings, *parameters))
    return summed(totals)


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


class LocaterPenalty:
    """The penalty on the live weights of one model, as the callback applies it: planned once.

    Nothing in :meth:`value` and :meth:`add_gradient` waits for the device. Sharded weights are gathered one
    layer at a time, in collective calls.

    Args:
        reader: of the model.
        modules: see :func:`locater_penalty`.
        cross_attention: see :func:`locater_penalty`.
        by_tokens: only layers that have a token-aware spectrum.
        limited: only layers whose logits between tokens are known.

    Raises:
        ValueError: patterns match no layer.
    """

    def __init__(
        self,
        reader: ProjectionReader,
        *,
        modules: str | Sequence[str] | None = None,
        cross_attention: bool = False,
        by_tokens: bool = False,
        limited: bool = False,
    ) -> None:
        self.reader = reader
        self._modules = modules
        self._cross_attention = cross_attention
        self._by_tokens = by_tokens
        self._limited = limited
        self._stacker, self._latents = Stacker(), LatentStacker()
        self.names = self._select()

    def refresh(self) -> bool:
        """Find the layers again after modules of the model were replaced; whether they were.

        Raises:
            ValueError: nothing is left that can be read, or that the patterns match.
        """
        if not self.reader.refresh():
            return False
        self.names = self._select()
        return True

    def keep_only(self, names: Collection[str]) -> None:
        """Restrict the penalty to some of the chosen layers, until modules are replaced."""
        self.names = [name for name in self._select() if name in names]

    def means(self, support: Support, moments: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Layer → mean of each head's eigenvalues, shape ``(heads,)``, on the weights' device."""
        means = {}
        settings = Settings("variance", support, None, 1.0, moments)
        with torch.no_grad(), self.reader.to_the_end(self.names):
            for name in self.names:
                for batch in batches({name: self.reader[name]}, settings):
                    trace = (_match(batch.query, batch.key) * batch.query).sum((-2, -1))
                    means[name] = (trace / batch.n)[0]
                    del batch  # before the next layer is gathered
        return means

    @torch.no_grad()
    def value(self, settings: Settings) -> Tensor:
        """The penalty, detached. Layers are gathered to the end whatever fails."""
        with self.reader.to_the_end(self.names):
            return summed([total for part in self._parts() for total in self._values(settings, part)])

    def add_gradient(
        self,
        settings: Settings,
        weight: float | Tensor,
        parameters: Collection[Tensor],
        agree: Callable[[Exception | None], None] = _raise,
        weigh: Callable[[Tensor], float | Tensor] | None = None,
    ) -> tuple[Tensor, bool]:
        """Add the gradient of ``weight`` times the penalty to ``.grad`` of those parameters that it depends on.

        All gradients are there before any is added, so that where one cannot be computed none is; flat parameters
        (FSDP's first version) alone get theirs layer by layer.

        Args:
            settings: which penalty.
            weight: a number, or a scalar tensor on the weights' device.
            parameters: what may be changed; frozen ones among them are left alone.
            agree: called before anything is added, with the error that there was, to raise where there was one:
                on any of several processes. Layers are gathered to the end whatever has failed.
            weigh: gets the squared norms of the gradients that are there and of what is to be added to them, over
                the same weights, ``(2,)``, on this process; returns a further factor. Not with flat parameters.

        Returns:
            The penalty before it is weighted, detached; and whether any parameter depends on it.

        Raises:
            ValueError: a weight that is no finite number.
        """
        if not isinstance(weight, Tensor):
            weight = number(weight, "weight")
        wanted = {id(parameter) for parameter in parameters if parameter.requires_grad}
        totals: list[Tensor] = []
        shares = Shares()
        reached = False
        if settings.form == "limit":
            # What the loss does not train in this step is not made to move by a gradient of zero.
            trained = {id(one) for one in parameters if one.grad is not None} & wanted
            reached, wanted = bool(wanted) and not trained, trained
        error: Exception | None = None
        for part in self._parts():
            layers = {name: self.reader.layers[name] for name in part}
            # Only a layer that is alone in its part can be flat.
            (first, *_) = layers.values()
            with first.gathered(grads=first.is_flat):
                own = Shares() if first.is_flat else shares
                try:
                    # Norms of what is there are taken of the weights of query and key alone.
                    if settings.form == "limit":
                        layers = _limit(layers, settings, weight, wanted, own, totals)
                    if weigh is None:
                        layers = self._stack(layers, settings, weight, wanted, own, totals)
                    totals += _gradients(layers, settings, weight, wanted, own)
                except Exception as failed:
                    error = error or failed.with_traceback(None)  # whose frames hold what was gathered
                if first.is_flat:
                    agree(error)
                    own.add()
                    reached = reached or bool(own)
        try:
            total = summed(totals)
        except Exception as failed:
            error, total = error or failed, torch.empty(())
        agree(error)
        if weigh is not None:
            shares.scale(weigh(shares.squares().to(total.device)))
        shares.add()
        return total, reached or bool(shares)

    def _stack(
        self,
        layers: Mapping[str, LayerReader],
        settings: Settings,
        weight: float | Tensor,
        wanted: Collection[int],
        shares: Shares,
        totals: list[Tensor],
    ) -> dict[str, LayerReader]:
        """Add the layers that can be read together to shares and totals; gives the others."""
        plain, others = self._stacker.stacks(layers, layers)
        latent, others = self._latents.stacks(layers, others)
        stacks: list[Any] = [*plain, *latent]
        for stack in stacks:
            weights = stack.read()
            batch = batch_of(
                weights.query, weights.key, {name: layers[name] for name in stack.names}, settings
            )
            sides = stack.reaches(wanted)
            total, *gradients = penalty_and_gradients(
                batch.query, batch.key, settings.of(batch), weight, sides
            )
            totals.append(total)
            shares.put_whole(stack.shares(batch.back(gradients), weights, wanted))
        return {name: layers[name] for name in others}

    def _values(self, settings: Settings, part: list[str]) -> list[Tensor]:
        totals: list[Tensor] = []
        others = []
        for name in part:
            if settings.form != "limit" or not takes_vectors(self.reader.layers[name]):
                others.append(name)
                continue
            with self.reader.taken(name) as layer:
                totals += limit_penalties({name: layer}, settings)
        return totals + [
            head_penalties(batch.query, batch.key, settings.of(batch)).sum()
            for batch in batches({name: self.reader[name] for name in others}, settings)
        ]

    def _select(self) -> list[str]:
        return select_layers(
            self.reader,
            modules=self._modules,
            cross_attention=self._cross_attention,
            by_tokens=self._by_tokens,
            limited=self._limited,
        )

    def _parts(self) -> Iterator[list[str]]:
        return read_together(self.reader, self.names)


def _match(query: Tensor, key: Tensor) -> Tensor:
    """The key of every query head."""
    return key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)


def _limit(
    layers: Mapping[str, LayerReader],
    settings: Settings,
    weight: float | Tensor,
    wanted: Collection[int],
    shares: Shares,
    totals: list[Tensor],
) -> dict[str, LayerReader]:
    """Add the layers whose logits take queries and keys themselves to shares and totals; gives the others."""
    own = {name: layer for name, layer in layers.items() if takes_vectors(layer)}
    found, given = limit_gradients(own, settings, weight, wanted)
    totals += found
    shares.put_pulled(given)
    return {name: layer for name, layer in layers.items() if name not in own}


def _gradients(
    layers: Mapping[str, LayerReader],
    settings: Settings,
    weight: float | Tensor,
    wanted: Collection[int],
    shares: Shares,
) -> list[Tensor]:
    """Penalties of layers, gradients put into ``shares``; a function, so that gathered weights are freed."""
    if not layers:
        return []
    with torch.enable_grad():
        heads = {name: layer.read() for name, layer in layers.items()}
    totals = []
    with torch.no_grad():
        for batch in batches(heads, settings):
            sides = (
                _any_wanted(layers, batch.names, "query", wanted),
                _any_wanted(layers, batch.names, "key", wanted),
            )
            total, *gradients = penalty_and_gradients(
                batch.query, batch.key, settings.of(batch), weight, sides
            )
            totals.append(total)
            if any(sides):
                shares.put(layers, heads, batch.names, batch.back(gradients), wanted)
    return totals


def _any_wanted(
    layers: Mapping[str, LayerReader], names: Sequence[str], side: str, wanted: Collection[int]
) -> bool:
    return any(wants(layers[name], side, wanted) for name in names)


class _OneByOne(torch.autograd.Function):
    """The penalty of sharded layers, whose gradient is computed with its value: no layer is gathered twice."""

    @staticmethod
    def forward(ctx: Any, layers: list[LayerReader], settings: Settings, *parameters: Tensor) -> Tensor:
        wanted = {id(p) for p, needed in zip(parameters, ctx.needs_input_grad[2:], strict=True) if needed}
        gradients: dict[int, Tensor] = {}
        totals = [_shares(layer, settings, wanted, gradients) for layer in layers]
        ctx.gradients = [gradients.get(id(parameter)) for parameter in parameters]
        return summed(totals)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        factor = grad_outputs[0]
        return None, None, *(None if g is None else g * factor.to(g.dtype) for g in ctx.gradients)


def _shares(
    layer: LayerReader, settings: Settings, wanted: Collection[int], gradients: dict[int, Tensor]
) -> Tensor:
    """The penalty of one layer; its gradients are added to those of the parameters, by id."""
    if settings.form == "limit":
        (total,), given = limit_gradients({layer.name: layer}, settings, 1.0, wanted)
        _add_up(given, gradients)
        return total
    with torch.enable_grad():
        head = layer.copy() if layer.is_flat else layer.read()
    with torch.no_grad():
        (batch,) = batches({layer.name: head}, settings)
        sides = wants(layer, "query", wanted), wants(layer, "key", wanted)
        total, *found = penalty_and_gradients(batch.query, batch.key, settings.of(batch), 1.0, sides)
        for side, gradient in zip(("query", "key"), batch.back(found), strict=True):
            if gradient is None:
                continue
            _add_up(pulled(layer, getattr(head, side), side, gradient[0], wanted), gradients)
    return total


def _add_up(shares: Iterable[tuple[nn.Parameter, Tensor]], gradients: dict[int, Tensor]) -> None:
    for parameter, share in shares:
        before = gradients.get(id(parameter))
        gradients[id(parameter)] = share if before is None else before + share
