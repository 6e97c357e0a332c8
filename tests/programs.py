"""The command line, run in the process of a test."""

import sys

from jaxfed.cli import main


def run_program(monkeypatch, capsys, *words):
    """(exit code, what was printed, what was said) of `jaxfed WORDS`."""
    monkeypatch.setattr(sys, "argv", ["jaxfed", *map(str, words)])
    code = 0
    try:
        main.main()
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    return code, *capsys.readouterr()
