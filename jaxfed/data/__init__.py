"""Interactions, clients, batches and blocks. `load` or `read` a data set, then `partition` it among clients."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxfed.data.batching import Batching as Batching
    from jaxfed.data.clients import Clients as Clients
    from jaxfed.data.clients import partition as partition
    from jaxfed.data.item_descriptions import item_texts as item_texts
    from jaxfed.data.loading import from_arrays as from_arrays
    from jaxfed.data.loading import from_description as from_description
    from jaxfed.data.loading import from_pandas as from_pandas
    from jaxfed.data.loading import load as load
    from jaxfed.data.loading import read as read
    from jaxfed.data.shape_description import describe as describe
    from jaxfed.data.sources.files import from_arrow as from_arrow
    from jaxfed.data.sources.pretrained import Pretrained as Pretrained
    from jaxfed.data.sources.pretrained import TokenTable as TokenTable
    from jaxfed.data.sources.pretrained import read_pretrained as read_pretrained
    from jaxfed.data.sources.pretrained import tokenize_texts as tokenize_texts

# the module of each public name, imported when it is first used: reading files takes libraries that rounds do not
_WHERE = {
    "Batching": ("batching", "Batching"),
    "Clients": ("clients", "Clients"),
    "Pretrained": ("sources.pretrained", "Pretrained"),
    "TokenTable": ("sources.pretrained", "TokenTable"),
    "describe": ("shape_description", "describe"),
    "from_arrays": ("loading", "from_arrays"),
    "from_arrow": ("sources.files", "from_arrow"),
    "from_description": ("loading", "from_description"),
    "from_pandas": ("loading", "from_pandas"),
    "item_texts": ("item_descriptions", "item_texts"),
    "load": ("loading", "load"),
    "partition": ("clients", "partition"),
    "read": ("loading", "read"),
    "read_pretrained": ("sources.pretrained", "read_pretrained"),
    "tokenize_texts": ("sources.pretrained", "tokenize_texts"),
}
__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    """A public name, from the module that defines it."""
    from importlib import import_module

    if name not in _WHERE:
        raise AttributeError(f"module 'jaxfed.data' has no attribute {name!r}")
    module, own_name = _WHERE[name]
    return getattr(import_module(f"jaxfed.data.{module}"), own_name)


def __dir__() -> list[str]:
    """What an editor completes."""
    return list(__all__)
