"""What LocAteR is compared with: decay of W_q and W_k alone, σReparam on them, and a reward for entropy."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from lightning_qk import TransformerModule, head_projections
from lightning_qk.heads.reader import find_attention, kept_reader

ENTROPY_ATTENTION = "paper_entropy"
"""Name of the attention function that keeps its rows' entropy for a penalty."""


class PenalizedModule(TransformerModule):
    """A :class:`TransformerModule` with a term of one's own in the training loss.

    Attributes:
        penalty: called after each training forward; gives the term, already weighted. None: no term.
        reparametrize: apply σReparam to the query and key weights of the network.
        torch_initialization: draw weights anew as PyTorch's modules do by themselves: embeddings of unit variance,
            linear maps uniform within ±1/√width.
        qk_init: query and key weights are that many times as large at the start.
        lora_rank: of adapters (PEFT) on queries, keys, values and outputs, which alone train; None: all trains.
        logs_steps: log each step's loss, which takes a fifth of a small network's time.
    """

    penalty: Callable[[nn.Module], Tensor] | None = None
    reparametrize: bool = False
    torch_initialization: bool = False
    qk_init: float = 1.0
    lora_rank: int | None = None
    logs_steps: bool = True

    def configure_model(self) -> None:
        """As ever; then weights drawn anew and σReparam, where they are asked for."""
        built = self.model is not None
        super().configure_model()
        if built or self.model is None:
            return
        if self.torch_initialization:
            for part in self.model.modules():
                if isinstance(part, nn.Linear | nn.Embedding):
                    part.reset_parameters()
        if self.qk_init != 1:
            with torch.no_grad():
                for layer in head_projections(self.model).values():  # views of the live weights
                    layer.query.mul_(self.qk_init)
                    layer.key.mul_(self.qk_init)
        if self.lora_rank is not None:
            from peft import LoraConfig, get_peft_model

            targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
            lora = LoraConfig(r=self.lora_rank, lora_alpha=2 * self.lora_rank, target_modules=targets)
            self.model = get_peft_model(self.model, lora)
        if self.reparametrize:
            add_sigma_reparam(self.model)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss with the term."""
        loss = super().training_step(batch, batch_idx) if self.logs_steps else self(**batch).loss
        return loss if self.penalty is None else loss + self.penalty(self.network)


class QKWeightDecay:
    """``coefficient · Σ (‖W_q‖² + ‖W_k‖²)`` over all heads: decay of nothing but queries and keys."""

    def __init__(self, coefficient: float) -> None:
        self.coefficient = coefficient

    def __call__(self, model: nn.Module) -> Tensor:
        """The weighted term."""
        reader = kept_reader(model)
        terms = [reader[name].query.square().sum() + reader[name].key.square().sum() for name in reader]
        return self.coefficient * torch.stack(terms).sum()


class EntropyReward:
    """``−coefficient ·`` mean normalized entropy of the attention rows of the newest forward.

    Needs ``attn_implementation=ENTROPY_ATTENTION``, see :func:`register_entropy_attention`. Rows count as in
    the project's ``entropy_normalized``: those that see one key alone are left out, padded queries are not
    known here and count.
    """

    def __init__(self, coefficient: float) -> None:
        self.coefficient = coefficient

    def __call__(self, model: nn.Module) -> Tensor:
        """The weighted term."""
        entropies = [module.row_entropy for module in find_attention(model).values()]
        return -self.coefficient * torch.stack(entropies).mean()


def register_entropy_attention() -> str:
    """Make the attention function known to transformers; returns its name."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    AttentionInterface.register(ENTROPY_ATTENTION, entropy_attention)
    AttentionMaskInterface.register(ENTROPY_ATTENTION, eager_mask)
    return ENTROPY_ATTENTION


def entropy_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[Tensor, Tensor]:
    """Attention as transformers' eager functions compute it, with the same random numbers for dropout.

    ``module.row_entropy`` is left with the differentiable mean normalized entropy, before dropout.
    """
    logits = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        logits = logits + attention_mask
    weights = logits.softmax(-1)
    module.row_entropy = normalized_entropy(logits, weights)
    dropped = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (dropped @ value).transpose(1, 2).contiguous(), dropped


def normalized_entropy(logits: Tensor, weights: Tensor) -> Tensor:
    """Mean of ``H / log n`` over rows that see n > 1 keys: ``H = LSE − Σ p ω``."""
    visible = logits > torch.finfo(logits.dtype).min / 2
    count = visible.sum(-1)
    expected = (weights * logits.masked_fill(~visible, 0.0)).sum(-1)
    entropy = logits.logsumexp(-1) - expected
    counted = count > 1
    share = entropy / count.clamp_min(2).log()
    return share.masked_fill(~counted, 0.0).sum() / counted.sum()


class SigmaReparam(nn.Module):
    """``W = γ W̃ / σ₁(W̃)`` for parts of a weight, after Zhai et al. 2023 (arXiv 2303.06296).

    σ₁ is ``uᵀ W̃ v`` with u, v from one power iteration before each training forward; the gradient goes through
    σ₁ with u and v held. γ is trained and starts at σ₁, so that training starts from the same function.

    Args:
        weight: as it is stored; where a network multiplies by its transpose, so be it: σ₁ is the same.
        dim: of the weight along which parts lie one after the other.
        sizes: of the first parts; what is left of the weight stays as it is.
    """

    u: Tensor
    v: Tensor

    def __init__(self, weight: Tensor, dim: int, sizes: list[int]) -> None:
        super().__init__()
        self.dim = dim
        self.sizes = sizes
        singular = [torch.linalg.svd(part.detach(), full_matrices=False) for part in self._parts(weight)]
        self.gain = nn.Parameter(torch.stack([s[0] for _, s, _ in singular]))
        self.register_buffer("u", torch.stack([u[:, 0] for u, _, _ in singular]))
        self.register_buffer("v", torch.stack([vh[0] for _, _, vh in singular]))

    def _parts(self, weight: Tensor) -> Iterator[Tensor]:
        start = 0
        for size in self.sizes:
            yield weight.narrow(self.dim, start, size)
            start += size

    @torch.no_grad()
    def iterate(self, weight: Tensor) -> None:
        """One power iteration."""
        for index, part in enumerate(self._parts(weight)):
            self.u[index] = nn.functional.normalize(part @ self.v[index], dim=0)
            self.v[index] = nn.functional.normalize(part.mT @ self.u[index], dim=0)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that acts."""
        # Copies: the buffers change before the next forward, and a graph may outlive this one.
        u, v = self.u.clone(), self.v.clone()
        parts = [
            part * (self.gain[index] / (u[index] @ part @ v[index]))
            for index, part in enumerate(self._parts(weight))
        ]
        rest = weight.narrow(self.dim, sum(self.sizes), weight.shape[self.dim] - sum(self.sizes))
        return torch.cat([*parts, rest], self.dim)


def add_sigma_reparam(network: nn.Module) -> list[RemovableHandle]:
    """Put :class:`SigmaReparam` on the query and key projections of every attention layer.

    Known are projections of their own and GPT-2's fused one; queries and keys have one γ each.

    Raises:
        ValueError: a layer has other projections.
    """
    handles = []
    for name, layer in find_attention(network).items():
        children = dict(layer.named_children())
        found = [children[own] for own in ("q_proj", "k_proj", "query", "key") if own in children]
        parts = [(child, 0, [child.weight.shape[0]]) for child in found]
        if "c_attn" in children:
            fused = children["c_attn"]
            width = fused.weight.shape[1] // 3
            parts = [(fused, 1, [width, width])]
        if sum(len(sizes) for _, _, sizes in parts) != 2:
            raise ValueError(
                f"expected q_proj and k_proj, query and key, or c_attn in {name}, got {list(children)}"
            )
        for child, dim, sizes in parts:
            parametrize.register_parametrization(child, "weight", SigmaReparam(child.weight, dim, sizes))
            handles.append(child.register_forward_pre_hook(_iterate))
    return handles


def _iterate(module: nn.Module, inputs: object) -> None:
    if module.training:
        held = module.parametrizations["weight"]
        held[0].iterate(held.original)
