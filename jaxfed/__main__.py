"""The program: python -m jaxfed, and the command jaxfed. Ctrl-C is heard before anything large is imported."""

import signal

from jaxfed.cli import interrupted


def main() -> None:
    """The program."""
    signal.signal(signal.SIGINT, interrupted)
    from jaxfed.cli import main

    main.main()


if __name__ == "__main__":
    main()
