"""Paths of the leaves of a tree, such as `params/block_0/query/kernel` and `tables/item`, and patterns in them."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from jaxfed.core.excerpt import shorten, shorten_list
from jaxfed.core.tables import is_table
from jaxfed.core.types import Tree


def join_path(keys: Sequence[Any]) -> str:
    """The keys of a leaf, joined by slashes."""
    names = [getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))) for key in keys]
    return "/".join(map(str, names))


def list_leaves(tree: Tree) -> dict[str, Any]:
    """{path: leaf} of a tree; a `Table` is one leaf."""
    return {join_path(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_table)}


def map_with_paths(change: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Maps change(path, leaf, *others) over the leaves of a tree; a `Table` is one leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, *leaves: change(join_path(keys), *leaves), tree, *rest, is_leaf=is_table
    )


def match_paths(patterns: Sequence[str], paths: Iterable[str], where: str) -> dict[str, int]:
    """{path: the number of the first pattern that is found in it}; paths without any are left out.

    Args:
        patterns: Regular expressions, each found anywhere in a path.
        paths: See `list_leaves`.
        where: The key of the configuration, for messages.

    Returns:
        The paths, with the numbers of their patterns.

    Raises:
        ValueError: a pattern is no regular expression, or is in no path.

    Example:
        >>> match_paths(["block_1/", "kernel"], ["block_0/kernel", "block_1/kernel", "bias"], "work.freeze")
        {'block_0/kernel': 1, 'block_1/kernel': 0}
    """
    paths = list(paths)
    found: dict[str, int] = {}
    for number, pattern in enumerate(patterns):
        try:
            hits = [path for path in paths if re.search(pattern, path)]
        except re.error as error:
            raise ValueError(f'{where}: "{shorten(pattern)}" is no regular expression: {error}') from None
        if not hits:
            raise ValueError(
                f'{where}: "{shorten(pattern)}" is in the path of no parameter; there are {shorten_list(paths, 6, 80)}'
            )
        for path in hits:
            found.setdefault(path, number)
    return {path: found[path] for path in paths if path in found}
