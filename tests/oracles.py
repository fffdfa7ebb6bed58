"""Independent computations that tests compare with: dense, in float64, written from the definitions."""

import math

import torch
from torch import Tensor


def dense_forms(query: Tensor, key: Tensor, sigma: Tensor | None = None) -> Tensor:
    """``Σ^½ W_q^T W_k Σ^½`` of every head, (heads, d_model, d_model), in float64."""
    query, key = query.double(), key.double()
    key = key.repeat_interleave(query.shape[0] // key.shape[0], dim=0)
    forms = query.mT @ key
    if sigma is not None:
        values, vectors = torch.linalg.eigh(sigma.double())
        root = vectors @ values.clamp_min(0).sqrt().diag() @ vectors.T
        forms = root @ forms @ root
    return forms


def dense_moments(
    query: Tensor, key: Tensor, sigma: Tensor | None = None, n: int | None = None
) -> dict[str, Tensor]:
    """The moments from eigenvalues of d_model × d_model matrices.

    Args:
        query: (heads, d_head, d_model).
        key: (kv_heads, d_head, d_model).
        sigma: token covariance.
        n: size of the support; d_model if None.
    """
    forms = dense_forms(query, key, sigma)
    size = forms.shape[-1]
    n = n or size
    eigenvalues = torch.linalg.eigvals(forms)
    symmetric = torch.linalg.eigvalsh((forms + forms.mT) / 2)
    mean = eigenvalues.sum(-1).real / n
    # The n - size eigenvalues of a smaller support that are left out are zeros.
    spread = (eigenvalues.square().sum(-1)).real / n - mean.square()
    symmetric_sq = symmetric.square().sum(-1)
    frobenius_sq = forms.square().sum((-2, -1))
    antisymmetric_sq = ((forms - forms.mT) / 2).square().sum((-2, -1))
    return {
        "trace": eigenvalues.sum(-1).real,
        "trace_sq": eigenvalues.square().sum(-1).real,
        "frobenius_sq": frobenius_sq,
        "eig_mean": mean,
        "eig_var": spread,
        "sym_var": symmetric_sq / n - mean.square(),
        "asymmetry": antisymmetric_sq / frobenius_sq,
        "concentration": eigenvalues.sum(-1).real.square() / (n * symmetric_sq),
    }


def dense_attention(
    query: Tensor,
    key: Tensor,
    visible: Tensor | None = None,
    *,
    scaling: float | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    padding: Tensor | None = None,
    offset: int = 0,
) -> dict[str, Tensor]:
    """Statistics from the whole attention map, row by row in Python, float64, (heads,) means.

    Args:
        query: (batch, heads, n, d_head).
        key: (batch, kv_heads, m, d_head).
        visible: boolean, broadcastable to (batch, heads, n, m).
        scaling: of the logits.
        bias: added to the logits.
        sinks: learnt logit of each head.
        softcap: of the logits.
        padding: True where a query counts, (batch, n).
        offset: position of the first query.
    """
    query, key = query.double(), key.double()
    batch, heads, n, d_head = query.shape
    m = key.shape[2]
    key = key.repeat_interleave(heads // key.shape[1], dim=1)
    logits = query @ key.mT * (d_head**-0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias.double()
    if visible is None:
        visible = torch.ones(1, 1, n, m, dtype=torch.bool)
    visible = visible.expand(batch, heads, n, m)
    collected: list[dict[str, list[float]]] = [{} for _ in range(heads)]
    for h in range(heads):
        out = collected[h]
        for b in range(batch):
            received = torch.zeros(m, dtype=torch.float64)
            seen = torch.zeros(m)
            for i in range(n):
                keys = visible[b, h, i].nonzero().flatten()
                if len(keys) == 0 or (padding is not None and not padding[b, i]):
                    continue
                row = logits[b, h, i, keys]
                everything = row if sinks is None else torch.cat([row, sinks[h : h + 1].double()])
                all_p = torch.softmax(everything, 0)
                p = all_p[: len(keys)]
                distance = (keys - (i + offset)).abs().double()
                entropy = -(all_p * all_p.clamp_min(1e-300).log()).sum()
                mean_distance = (p * distance).sum()
                rest = 1 - p.sum()
                window = 1 / len(keys) + (row - row.mean()) / len(keys)

                def add(name: str, value: float, out: dict[str, list[float]] = out) -> None:
                    out.setdefault(name, []).append(float(value))

                add("entropy", entropy)
                if len(everything) > 1:
                    add("entropy_normalized", entropy / math.log(len(everything)))
                add("participation", 1 / all_p.square().sum())
                add("max_prob", p.max())
                add("logit_std", row.std(unbiased=False))
                add("distance", mean_distance)
                add(
                    "distance_spread",
                    ((p * (distance - mean_distance) ** 2).sum() + rest * mean_distance**2)
                    .clamp_min(0)
                    .sqrt(),
                )
                add("diagonal", p[keys == i + offset].sum())
                add("sink_first", p[0])
                if sinks is not None:
                    add("sink_learnt", all_p[-1])
                add("linear_share", ((window > 0) & (window < 1)).double().mean())
                add("max_logit", row.max())
                add("max_abs_logit", row.abs().max())
                add("query_norm", query[b, h, i].square().sum().sqrt())
                received[keys] += p
                seen[keys] += 1
            if seen.sum():
                eligible = (seen > 0) & (seen >= seen.max() / 4)
                rate = (received[eligible] / seen[eligible] > 0.3).double().mean()
                out.setdefault("sink_rate", []).append(float(rate))
                for j in visible[b].any(0).any(0).nonzero().flatten():
                    out.setdefault("key_norm", []).append(float(key[b, h, j].square().sum().sqrt()))
    reduce = {"max_logit": max, "max_abs_logit": max}
    return {
        name: torch.tensor(
            [
                reduce.get(name, lambda values: sum(values) / len(values))(collected[h][name])
                for h in range(heads)
            ],
            dtype=torch.float64,
        )
        for name in collected[0]
    }


def sinks_of_maps(
    p: Tensor, value: Tensor, visible: Tensor, *, padding: Tensor | None = None, threshold: float = 0.2
) -> dict[str, Tensor]:
    """Statistics of sinks and waivers by their definitions, key by key, with singular values, (heads,).

    Args:
        p: whole maps, (batch, heads, n, m).
        value: (batch, value_heads, m, d_value).
        visible: boolean, broadcastable to the maps.
        padding: True where a query counts, (batch, n).
        threshold: of a sink.
    """
    p, value = p.double(), value.double()
    batch, heads, n, m = p.shape
    value = value.repeat_interleave(heads // value.shape[1], 1)
    visible = visible.expand(batch, heads, n, m)
    rows = visible.any(-1)
    if padding is not None:
        rows = rows & padding[:, None]
    names = ("sink_number", "sink_share", "sink_output", "waiver_rate", "waiver_mass", "waiver_position")
    found: dict[str, list[list[float]]] = {name: [[] for _ in range(heads)] for name in names}
    small = torch.zeros(batch, heads, m, dtype=torch.float64)
    there = torch.zeros(batch, m, dtype=torch.bool)
    for b in range(batch):
        if not rows[b].any():
            continue
        there[b] = visible[b].any(0).any(0)
        for h in range(heads):
            a, shown = p[b, h][rows[b, h]], visible[b, h][rows[b, h]]
            seen = shown.sum(0)
            enough = (seen > 0) & (seen >= seen.max() / 4)
            received = [float(a[shown[:, j], j].mean()) if seen[j] else 0.0 for j in range(m)]
            is_sink = torch.tensor([received[j] > threshold and bool(enough[j]) for j in range(m)])
            found["sink_number"][h].append(float(is_sink.sum()))
            shares = [float((a[shown[:, j], j] > threshold).double().mean()) for j in range(m) if enough[j]]
            found["sink_share"][h].append(max(shares))
            output = a @ value[b, h].nan_to_num(0.0)
            directions = torch.nn.functional.normalize(value[b, h, is_sink], dim=-1)
            _, singular, basis = torch.linalg.svd(directions, full_matrices=False)
            inside = output @ basis[singular > 1e-6].T
            if output.norm() > 0:
                found["sink_output"][h].append(float(inside.square().sum() / output.square().sum()))
            length = value[b, h].norm(dim=-1)
            median = length[there[b]].sort().values[(int(there[b].sum()) - 1) // 2]
            small[b, h] = ((length < median / 2) & there[b]).double()
            found["waiver_rate"][h].extend(small[b, h][there[b]].tolist())
            found["waiver_mass"][h].extend((a * small[b, h]).sum(-1).tolist())
    for h in range(heads):
        everything = torch.cat([small[b, h][there[b]] for b in range(batch)])
        mean = everything.mean()
        products = []
        for b in range(batch):
            for other in range(batch):
                if b == other or not there[b].any() or not there[other].any():
                    continue
                x = small[b, h][there[b].nonzero()[0, 0] :], there[b][there[b].nonzero()[0, 0] :]
                y = (
                    small[other, h][there[other].nonzero()[0, 0] :],
                    there[other][there[other].nonzero()[0, 0] :],
                )
                length = min(len(x[0]), len(y[0]))
                products += [
                    float((x[0][j] - mean) * (y[0][j] - mean)) for j in range(length) if x[1][j] and y[1][j]
                ]
        spread = everything.var(unbiased=False)
        found["waiver_position"][h] = (
            [float(sum(products) / len(products) / spread)] if products and spread > 0 else []
        )
    return {
        name: torch.tensor([sum(one) / len(one) if one else math.nan for one in values], dtype=torch.float64)
        for name, values in found.items()
    }
