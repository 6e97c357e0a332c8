"""The program: python -m jaxfed, and the command jaxfed. Ctrl-C is heard before anything large is imported."""

import os
import signal
import sys
from typing import Any, NoReturn


def interrupted(*_: Any) -> NoReturn:
    """Ctrl-C where nothing is to be saved. Not an exception: raised inside of a callback, Python would ignore it."""
    print("jaxfed: interrupted", file=sys.stderr, flush=True)
    os._exit(130)


def main() -> None:
    """The program."""
    signal.signal(signal.SIGINT, interrupted)
    from jaxfed import cli

    cli.main()


if __name__ == "__main__":
    main()
