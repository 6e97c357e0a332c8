"""What takes long on large data, said while it is done: records of the logger `jaxfed.data`, which a terminal shows as
a line that goes away."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

LOGGER = logging.getLogger("jaxfed.data")


@contextmanager
def log_stage(text: str) -> Iterator[None]:
    """Logs at DEBUG that its body begins, in these words, and that it ends; `stage_begins` of a record says which."""
    LOGGER.debug("%s", text, extra={"stage_begins": True})
    try:
        yield
    finally:
        LOGGER.debug("%s: done", text, extra={"stage_begins": False})
