"""The command line."""

import os
import sys
from typing import Any, NoReturn


def interrupted(*_: Any) -> NoReturn:
    """Ctrl-C where nothing is to be saved. Not an exception: raised inside of a callback, Python would ignore it."""
    print("jaxfed: interrupted", file=sys.stderr, flush=True)
    os._exit(130)
