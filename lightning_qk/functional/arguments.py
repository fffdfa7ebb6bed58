"""Arguments of functions of attention: one checked call, or its parts."""

from torch import Tensor

from lightning_qk.functional.checks import KindError, floating, one_device
from lightning_qk.functional.chunks import checked_products
from lightning_qk.functional.logits import AttentionLogits, AttentionOptions, ProductLogits


def as_logits(
    query: Tensor | AttentionLogits, key: Tensor | None, options: AttentionOptions
) -> AttentionLogits:
    """The call given to a function of attention, as one object or as its parts.

    Raises:
        KindError: neither of the two, or both.
        ValueError: shapes that do not fit, or a mask of another form.
    """
    known = AttentionOptions.__annotations__
    unknown = [name for name in options if name not in known]
    if unknown:
        raise KindError(
            f"expected options among {', '.join(known)}, got {unknown[0]!r}: see AttentionOptions"
        )
    if not isinstance(query, AttentionLogits):
        return ProductLogits(**checked_products(query, key, **options))  # type: ignore[arg-type]
    if key is not None or options:
        named = ", ".join((["key"] if key is not None else []) + sorted(options))
        raise KindError(
            f"expected an AttentionLogits by itself, got {named} beside it: pass them to AttentionLogits.of"
        )
    return query


def as_products(
    query: Tensor | AttentionLogits, key: Tensor | None, options: AttentionOptions
) -> ProductLogits:
    """As :func:`as_logits`, for functions that need queries and keys.

    Raises:
        KindError: also logits without them.
    """
    logits = as_logits(query, key, options)
    if not isinstance(logits, ProductLogits):
        raise KindError(
            "expected an attention call with queries and keys, got logits alone: pass what "
            "AttentionLogits.of(query, key) returns"
        )
    return logits


def as_output(
    query: Tensor | AttentionLogits, key: Tensor | None, value: Tensor | None, options: AttentionOptions
) -> tuple[ProductLogits, Tensor]:
    """As :func:`as_products`, with the values of the output.

    Raises:
        ValueError: also no values ``(batch, kv_heads, m, d_value)``.
    """
    logits = as_products(query, key, options)
    value = floating(value, "value")
    one_device(query=logits.query, value=value)
    if value.dim() != 4 or value.shape[:3] != logits.key.shape[:3]:
        raise ValueError(
            f"expected a value (batch, kv_heads, m, d_value) = {(*logits.key.shape[:3], 'd_value')}, got "
            f"{tuple(value.shape)}: pass it as the attention function gets it"
        )
    return logits, value
