"""Runs in processes of their own, for scripts that train many."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w


def trained(table: dict[str, Any], folder: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The summary of `jaxfed train` of a configuration's table in `folder`/run, which goes on where it was.

    Exits with the code of a run that fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "asked.toml").write_text(tomli_w.dumps(table))
    words = ["train", str(folder / "asked.toml"), "--out", str(folder / "run"), "--resume", *overrides]
    done = subprocess.run([sys.executable, "-m", "jaxfed", *words], stdout=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads((folder / "run" / "summary.json").read_text())
