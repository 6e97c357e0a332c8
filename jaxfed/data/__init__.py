"""Interactions, clients, batches and blocks. `load` or `read` a data set, then `partition` it among clients."""

from jaxfed.data.batching import Batching
from jaxfed.data.clients import Clients, partition
from jaxfed.data.loading import from_arrays, from_description, from_pandas, load, read
from jaxfed.data.shape_description import describe
from jaxfed.data.sources.files import from_arrow

__all__ = [
    "Batching",
    "Clients",
    "describe",
    "from_arrays",
    "from_arrow",
    "from_description",
    "from_pandas",
    "load",
    "partition",
    "read",
]
