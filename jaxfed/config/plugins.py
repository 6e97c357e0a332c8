"""Modules of one's own that add to the registry: those a configuration names, and those of installed packages.

    # my_module.py
    import optax
    from jaxfed.config.registry import register
    from jaxfed.core.channel import at_client

    def scaled_update(factor: float = 0.5):
        '''Multiplies every update by `factor`.'''
        return at_client(optax.scale(factor))

    register("channel", "my_scale", scaled_update)

With `imports = ["my_module"]` under [run] a configuration can say `[[channel]] name = "my_scale"`, and its run can be
resumed, evaluated and swept. A package does the same for all configurations by an entry point in its pyproject.toml:

    [project.entry-points."jaxfed.plugins"]
    my_package = "my_package.my_module"
"""

import importlib
import os
import sys
from functools import cache
from importlib import metadata
from typing import Any

from jaxfed.core.excerpt import shorten

GROUP = "jaxfed.plugins"


def import_plugins(table: dict[str, Any]) -> None:
    """Imports what adds to the registry, before a configuration's names are looked up.

    Args:
        table: of a configuration, whose `run.imports` are names of modules. They are looked for where Python looks, and
            in the working directory.

    Raises:
        ValueError: where one cannot be imported.
    """
    import_entry_points()
    run = table.get("run")
    names = run.get("imports") if isinstance(run, dict) else None
    for name in names if isinstance(names, list | tuple) else ():  # what is no list is refused with the other keys
        if isinstance(name, str):
            import_plugin(name)


@cache
def import_entry_points() -> None:
    """Imports the plug-ins of installed packages, once. Raises ValueError where one cannot be imported."""
    for each in metadata.entry_points(group=GROUP):
        try:
            each.load()
        except Exception as error:  # of somebody else's code: whatever it is
            raise ValueError(
                f"the plug-in {each.name} ({each.value}) of an installed package cannot be imported: "
                f"{describe_error(error)}: mend or uninstall it"
            ) from error


def import_plugin(name: str) -> None:
    """Imports a module by name. Raises ValueError where it cannot be imported."""
    if name.endswith(".py") or not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f'run.imports: "{shorten(name)}" is no name of a module: write my_module for my_module.py')
    if not {"", os.getcwd()} & {*sys.path}:  # which the command `jaxfed` does not look in
        sys.path.append(os.getcwd())
    try:
        importlib.import_module(name)
    except Exception as error:  # of the user's code: whatever it is
        missing = isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}.")
        if missing:
            raise ValueError(
                f'run.imports: no module "{shorten(name)}": go to the folder that it lies in, or add that folder to '
                "PYTHONPATH"
            ) from None
        raise ValueError(f"run.imports: {name} cannot be imported: {describe_error(error)}") from error


def describe_error(error: Exception) -> str:
    """An error in one line, with where it was raised."""
    text, trace = " ".join(str(error).split()), error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    place = f" ({trace.tb_frame.f_code.co_filename}, line {trace.tb_lineno})" if trace else ""
    place = "" if isinstance(error, SyntaxError) else place  # which says where it is
    return f"{type(error).__name__}: {text}{place}"
