"""jaxfed data --cache"""

import time
from typing import Any

from jaxfed.core.excerpt import printable, shorten

ACTIONS = ("list", "clear")


def cache_command(action: str, kind: str | None) -> None:
    """Lists what jaxfed keeps on disk, or removes it.

    Args:
        action: `list` or `clear`.
        kind: what of it: prepared, fetched or programs; None: all.

    Raises:
        ValueError: there is no such action or kind.
    """
    from jaxfed.data.cache_entries import KINDS, clear_cache, list_cache
    from jaxfed.data.sources.movielens_files import cache_folder

    if action not in ACTIONS:
        raise ValueError(
            f"--cache {shorten(action)}: there are {' and '.join(ACTIONS)}, with the kind behind them: "
            f"--cache clear {KINDS[0]}"
        )
    if kind not in (None, *KINDS):
        raise ValueError(f'--cache {action}: no kind "{shorten(kind)}" of what is kept: {", ".join(KINDS)}, or none')
    entries = [entry for entry in list_cache() if kind in (None, entry.kind)]
    size = size_text(sum(entry.size for entry in entries))
    if action == "clear":
        removed = 0
        for entry, left in clear_cache(entries):
            removed += 0 if entry.held else entry.size
            verb = "kept" if entry.held else "removed"
            print(printable(f"{verb} {entry_line(entry)}{f' ({left})' if left else ''}"))
        print(printable(f"{size_text(removed)} removed from {cache_folder()}"))
        return
    for entry in entries:
        print(printable(f"{entry_line(entry)}{f' ({entry.held})' if entry.held else ''}"))
    print(printable(f"{size} in {cache_folder()}; jaxfed data --cache clear [{'|'.join(KINDS)}] removes it"))


def entry_line(entry: Any) -> str:
    """What is kept, how large it is, since when, and of what."""
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.changed))
    of = describe_origin(entry.origin)
    if entry.kind == "programs":
        of = f"{len(entry.parts):,} files of programs that JAX compiled"
    elif entry.folder.parent.name == "tfds":
        of = "ml-100k, as tensorflow-datasets keeps it"
    name = entry.folder.name if len(entry.folder.name) < 24 else entry.folder.name[:12]
    return f"{entry.kind:<9} {name:<17} {size_text(entry.size):>9}  {when}  {of}".rstrip()


def describe_origin(origin: dict[str, Any]) -> str:
    """A [data] section in a few words: the file or the name, and whatever is not its default."""
    from jaxfed.config.schema import config_to_table, make_config

    if not origin:
        return ""
    try:
        usual = config_to_table(make_config({"data": {"name": origin["name"]}}).data)
    except (ValueError, KeyError):
        usual = {}
    rest = {key: value for key, value in origin.items() if key not in ("name", "path") and usual.get(key) != value}
    own = [f"{key} {shorten(str(value), 60)}" for key, value in rest.items()]
    return ", ".join([str(origin.get("path") or origin.get("name", "")), *own])


def size_text(size: int) -> str:
    """Bytes in words: 1.2 GB."""
    for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if size >= 10**power:
            return f"{size / 10**power:.1f} {unit}"
    return f"{size} bytes"
