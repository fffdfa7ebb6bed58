"""Whose keys a layer uses that has none of its own."""

from typing import NamedTuple

from torch import nn

from lightning_qk.heads.errors import UnreadLayer
from lightning_qk.heads.find import Site
from lightning_qk.heads.layouts import borrows_keys

# Layers lend to layers of their own kind.
_KIND = ("layer_type", "use_rope")


class Lender(NamedTuple):
    """The layer whose keys another one uses: its qualified name and itself."""

    name: str
    module: nn.Module


def key_lender(site: Site) -> Lender | None:
    """Find the earlier layer whose keys a layer uses; None where it has its own.

    It is the one whose index the layer holds, else the last one before it that is of its kind, has keys and,
    where layers say so (``store_full_length_kv``), stores them.

    Raises:
        UnreadLayer: the layer has no keys of its own, and no such layer is found.
    """
    module = site.module
    if not borrows_keys(module):
        return None
    parts = site.name.split(".")
    for depth, ancestor in enumerate(site.ancestors):
        # The module list that holds the layers, and the way from one of them to its attention.
        place = len(parts) - 1 - depth
        if not isinstance(ancestor, nn.ModuleList) or not parts[place].isdigit():
            continue
        index, path = int(parts[place]), ".".join(parts[place + 1 :])
        own = getattr(module, "kv_shared_layer_index", None)
        for earlier in [own] if isinstance(own, int) else range(index - 1, -1, -1):
            found = _attention(ancestor[earlier], path)
            if found is not None and _lends(found, module):
                return Lender(".".join([*parts[:place], str(earlier), *parts[place + 1 :]]), found)
    raise UnreadLayer("it uses the keys of an earlier layer, which is not part of the module that was passed")


def _attention(layer: nn.Module, path: str) -> nn.Module | None:
    try:
        return layer.get_submodule(path)
    except AttributeError:
        return None


def _lends(module: nn.Module, to: nn.Module) -> bool:
    same = all(getattr(module, name, None) == getattr(to, name, None) for name in _KIND)
    return same and not borrows_keys(module) and getattr(module, "store_full_length_kv", True)
