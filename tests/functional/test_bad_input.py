"""Bad input to every public function: a value that is right, or one sentence of our own that says how to mend it.

Valid calls are mutated one argument at a time, by what the argument is there. A function of ``functional.__all__``
without a valid call here fails the test, and so does an argument that no call passes.
"""

import inspect
import math
import warnings

import pytest
import torch

from lightning_qk import functional
from lightning_qk.functional import AttentionOptions, Rotary

B, H, N, D = 2, 4, 6, 8


def attention(*, value: bool = False, **more):
    torch.manual_seed(0)
    call = {"query": torch.randn(B, H, N, D), "key": torch.randn(B, 2, N, D)}
    if value:
        call["value"] = torch.randn(B, 2, N, D)
    call |= {
        "mask": torch.ones(B, 1, N, N, dtype=torch.bool).tril(),
        "is_causal": True,
        "scaling": 0.5,
        "sliding_window": 5,
        "softcap": 30.0,
        "bias": torch.randn(1, H, N, N),
        "sinks": torch.randn(H),
        "query_mask": torch.ones(B, N, dtype=torch.bool),
        "query_offset": 0,
        "self_attention": True,
    }
    return call | more


def sampled(**more):
    return {"rows": 3, "generator": torch.Generator().manual_seed(0), **more}


def weights(*leading: int):
    torch.manual_seed(0)
    return {"query": torch.randn(*leading, H, 3, D), "key": torch.randn(*leading, 2, 3, D)}


ROTARY = Rotary(torch.tensor([0.5]))
INDICES = (
    torch.zeros(1, 1, 1, 1, dtype=torch.long),
    torch.zeros(1, 1, 1, dtype=torch.long),
    torch.arange(N)[None, None, :, None],
    torch.arange(N),
)
CALLS = {
    "AttentionLogits": None,  # the argument of the others: its two ways to be made are called by them
    "AttentionOptions": None,
    "TokenMoments": None,  # holds what it is given
    "Rotary": None,  # holds what it is given
    # Functions of index tensors that are made by the package and called by it.
    "diagonal_prior": None,
    "uniform_prior": None,
    "attention_entropy": attention(normalized=True, reduction="sequence"),
    "attention_on_keys": attention(marked=torch.arange(N) > 2, per_sequence=False, **sampled()),
    "attention_statistics": attention(only=("entropy", "sink_rate"), per_sequence=False, **sampled()),
    "circle_law_radius": {"frobenius_sq": torch.rand(3), "d_model": 8},
    "circle_law_share": {"modulus": torch.rand(3), "d_head": 2, "d_model": 8},
    "effective_rank": {"singular_values": torch.rand(3, 4)},
    "energy_concentration": {"singular_values": torch.rand(3, 4).sort(descending=True).values, "s": 2},
    "entropy_floor": {"sigma": 1.5, "n": 8, "norm": "max"},
    "exact_signal_propagation_probability": {
        "theta": 0.5, "query": torch.randn(2, 3, 5), "key": torch.randn(2, 3, 5), "length": 64,
    },
    "hard_attention": attention(value=True, training=True),
    "hidden_statistics": {
        "states": torch.randn(B, N, D), "mask": torch.ones(B, N, dtype=torch.bool), "tokens": 4,
        "per_sequence": False, "generator": torch.Generator().manual_seed(0),
    },
    "kendall_tau": {"x": torch.randn(2, 5), "y": torch.randn(2, 5)},
    "linear_share_profile": attention(bins=4, **sampled()),
    "logit_statistics": {
        "logits": torch.randn(B, H, N, N), "query_mask": torch.ones(B, N, dtype=torch.bool), "query_offset": 0,
        "self_attention": True, "relative": False, "sinks": torch.randn(H, 1), "per_sequence": False, **sampled(),
    },
    "max_logits": attention(above=1.0),
    "positional_share": attention(per_sequence=False),
    "prior_divergence": attention(prior=torch.rand(1, 1, N, N), reduction="batch"),
    "qk_eigenvalues": {**weights(), "offset": 2, "rotary": ROTARY, "sigma": torch.eye(D)},
    "qk_moments": {**weights(3), "sigma": torch.eye(D), "support": "head", "offset": torch.arange(2),
                   "rotary": ROTARY},
    "qk_singular_values": weights(3),
    "signal_propagation_probability": {
        "theta": 0.7, "trace": torch.rand(4), "trace_sq": torch.rand(4), "frobenius_sq": 2 + torch.rand(4),
        "length": 64,
    },
    "sink_statistics": attention(value=True, threshold=0.3, per_sequence=False, **sampled()),
    "stable_rank": {"singular_values": torch.rand(3, 4)},
    "update_ratio": {
        **weights(), "query_before": torch.randn(H, 3, D), "key_before": torch.randn(2, 3, D),
    },
    "update_spectra": {
        **weights(), "query_before": torch.randn(H, 3, D), "key_before": torch.randn(2, 3, D),
    },
    "window_prior": {"width": 3},
}  # fmt: skip

calls = [(name, call) for name, call in CALLS.items() if call is not None]


def tensor_mutations(good: torch.Tensor):
    """Name, and what it becomes; whether it must be refused."""
    as_float = good.float()
    yield "None of a tensor", "text", True
    yield "a list", good.tolist(), None
    yield "a number", 3, None
    yield "complex", as_float.to(torch.complex64), True
    yield "fp8", as_float.to(torch.float8_e4m3fn), True
    yield "meta", good.to("meta"), True
    yield "sparse", good.to_sparse(), True
    yield "sparse rows", as_float.flatten(0, -2).to_sparse_csr() if good.dim() > 1 else good.to_sparse(), True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield "nested", torch.nested.nested_tensor([as_float[:1], as_float[:1]]), True
    if good.is_floating_point():
        for dtype in (torch.long, torch.int8, torch.bool):
            yield f"{dtype}", good.to(dtype), None
        yield "gradient", good.clone().requires_grad_(), False
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            yield f"{dtype}", good.to(dtype), False
        yield "NaN", torch.full_like(good, math.nan), False
        yield "infinite", torch.full_like(good, math.inf), False
        yield "zeros", torch.zeros_like(good), False
    else:
        yield "float", as_float, None
        yield "long", good.long(), None
    for axis in range(good.dim()):
        for size in (0, 1, good.shape[axis] + 1):
            yield (
                f"axis {axis} of {size}",
                good.new_ones([*good.shape[:axis], size, *good.shape[axis + 1 :]]),
                None,
            )
    yield "no axis", good.new_ones(()), None
    yield "one more axis", good[None], None
    yield "one axis less", good[0] if good.dim() else good, None
    yield "five axes", good.new_ones(1, 1, 1, 1, 1), None


def other_mutations(name: str, good: object):
    if isinstance(good, bool):
        for bad in (1, 0.0, "yes", torch.ones(2)):
            yield repr(bad), bad, name not in ("per_sequence",) or None
        return
    if isinstance(good, int):
        for bad in (0, -1, 1000, -1000):
            yield repr(bad), bad, None
        for bad in (True, 1.5, math.nan, math.inf, "3", 2 + 1j, torch.ones(2), [1]):
            yield repr(bad), bad, True
        return
    if isinstance(good, float):
        yield "nan", math.nan, True
        yield "-inf", -math.inf, True
        for bad in (0, -1.0, 1e30, 10**400, torch.tensor(0.5), math.inf):
            yield repr(bad)[:9], bad, None
        for bad in (True, "1.0", 2 + 1j, torch.ones(2, dtype=torch.cfloat), [1.0]):
            yield repr(bad), bad, True
        return
    for bad in (3, "wrong", 1.5, [0], b"model", object()):
        yield repr(bad)[:12], bad, True


def mutations(name: str, good: object):
    return tensor_mutations(good) if isinstance(good, torch.Tensor) else other_mutations(name, good)


def fresh(value: object) -> object:
    return torch.Generator().manual_seed(0) if isinstance(value, torch.Generator) else value


def flat(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else []
    return [part for item in values for part in flat(item)]


def outcome(function, call: dict) -> tuple[str, object]:
    try:
        return "value", function(**{name: fresh(value) for name, value in call.items()})
    except (ValueError, TypeError) as error:
        said = str(error)
        if said.startswith("expected ") and "\n" not in said:
            return "said", said
        return "unclear", f"{type(error).__name__}: {said}"
    except Exception as error:
        return "unclear", f"{type(error).__name__}: {error}"


def test_every_function_has_a_valid_call_with_all_of_its_arguments():
    assert set(CALLS) == set(functional.__all__)
    for name, call in CALLS.items():
        if call is None:
            continue
        known = set(inspect.signature(getattr(functional, name)).parameters)
        if "options" in known:
            old = {"positional"}  # options by place, deprecated
            known = known - {"options"} - old | set(AttentionOptions.__annotations__)
        passed = set(call)
        assert known == passed, name


@pytest.mark.parametrize(("name", "call"), calls, ids=[name for name, _ in calls])
def test_one_bad_argument(name, call):
    function = getattr(functional, name)
    kind, found = outcome(function, call)
    assert kind == "value", found
    failures = []
    for argument, good in call.items():
        for how, bad, refused in mutations(argument, good):
            kind, found = outcome(function, {**call, argument: bad})
            if kind == "unclear" or (refused is not None and refused != (kind == "said")):
                failures.append(f"{argument} = {how}: {kind} {str(found)[:160]}")
    assert not failures, f"{len(failures)}\n" + "\n".join(failures)


@pytest.mark.parametrize(("name", "call"), calls, ids=[name for name, _ in calls])
def test_layouts_of_memory(name, call):
    """Transposed, expanded and offset storage give what contiguous tensors give."""
    function = getattr(functional, name)
    want = flat(outcome(function, call)[1])
    for make in (
        lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
        lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]] if x.dim() else x,
        lambda x: torch.stack([x, x], -1)[..., 0],
    ):
        moved = {n: make(value) if isinstance(value, torch.Tensor) else value for n, value in call.items()}
        for got, expected in zip(flat(outcome(function, moved)[1]), want, strict=True):
            torch.testing.assert_close(got, expected, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "call"), calls, ids=[name for name, _ in calls])
def test_wrong_arguments_together_are_no_accident_either(name, call):
    """Seeded pairs of mutations."""
    function = getattr(functional, name)
    draw = torch.Generator().manual_seed(len(name))
    every = [(a, how, bad) for a, good in call.items() for how, bad, _ in mutations(a, good)]
    for _ in range(60):
        first, second = (every[int(i)] for i in torch.randint(len(every), (2,), generator=draw))
        kind, found = outcome(function, {**call, first[0]: first[2], second[0]: second[2]})
        assert kind != "unclear", (first[:2], second[:2], found)


EMPTY = [
    "attention_entropy",
    "attention_on_keys",
    "attention_statistics",
    "hard_attention",
    "linear_share_profile",
]
EMPTY += ["max_logits", "positional_share", "prior_divergence", "sink_statistics"]


@pytest.mark.parametrize("name", EMPTY)
@pytest.mark.parametrize("sizes", [(0, N, N), (B, 0, 0), (B, N, 0), (B, 0, N), (1, 1, 1)])
def test_empty_calls_have_no_number(name, sizes):
    """No sequence, no token, no key: NaN (-inf for a maximum, 0 for an output), with or without all the rest."""
    batch, n, m = sizes
    tensors = {"query": torch.randn(batch, H, n, D), "key": torch.randn(batch, 2, m, D)}
    extra = {
        "value": {"value": torch.randn(batch, 2, m, D)},
        "marked": {"marked": torch.zeros(m, dtype=torch.bool)},
    }
    extra["prior"] = {"prior": torch.rand(1, 1, n, m)}
    function = getattr(functional, name)
    takes = inspect.signature(function).parameters
    for argument, given in extra.items():
        tensors |= given if argument in takes else {}
    for more in ({}, {"is_causal": True}, {"mask": torch.ones(batch, 1, n, m, dtype=torch.bool)}):
        for value in flat(function(**tensors, **more)):
            if sizes != (1, 1, 1):
                assert not value.isfinite().any() or (name == "hard_attention" and not value.any()), value


@pytest.mark.parametrize("sizes", [(0, 4, 8), (2, 0, 8), (2, 4, 0)])
def test_empty_hidden_states_have_no_number(sizes):
    for value in functional.hidden_statistics(torch.zeros(sizes)).values():
        assert not value.isfinite().any()
