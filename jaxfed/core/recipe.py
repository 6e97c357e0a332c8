"""`Recipe`: the call that made a piece of a run, so that a configuration can be written from a program."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import optax

P = ParamSpec("P")
Piece = TypeVar("Piece")


class Recipe(NamedTuple):
    """A call of a function that configurations can name.

    section: of the configuration: "model", "algorithm", "channel", ...
    name: of the function in that section's registry.
    arguments: {argument: value}, defaults among them.
    made: what the call gave, without this recipe.
    """

    section: str
    name: str
    arguments: dict[str, Any]
    made: tuple


def named(section: str, name: str = "") -> Callable[[Callable[P, Piece]], Callable[P, Piece]]:
    """Has a function leave a `Recipe` in what it makes.

    Args:
        section: the section of a configuration that names the function.
        name: its name there. Left out: the function's own.

    Returns:
        A decorator for functions that give a Model, Method, Channel, Sampler or Parametrization, a data set, or a
        transform of optax.

    Example:
        >>> import optax
        >>> from jaxfed.core.channel import at_client
        >>> @named("channel")
        ... def half(factor: float = 0.5):
        ...     return at_client(optax.scale(factor))
        >>> find_recipe(half()).arguments
        {'factor': 0.5}
    """

    def decorate(function: Callable[P, Piece]) -> Callable[P, Piece]:
        signature = inspect.signature(function)

        @wraps(function)
        def make(*args: P.args, **kwargs: P.kwargs) -> Piece:
            piece = function(*args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return put_recipe(piece, Recipe(section, name or function.__name__, dict(bound.arguments), ()))

        return make

    return decorate


def put_recipe(piece: Any, recipe: Recipe) -> Any:
    """The same piece with the recipe in it; a transform of optax, which has no room, has it at its `update`."""
    if isinstance(piece, optax.GradientTransformation):
        piece.update.recipe = recipe._replace(made=tuple(piece))
        return piece
    if hasattr(piece, "claims"):
        return piece._replace(claims=piece.claims._replace(recipe=recipe._replace(made=drop_recipe(piece))))
    if hasattr(piece, "recipe"):
        return piece._replace(recipe=recipe._replace(made=drop_recipe(piece)))
    return piece


def drop_recipe(piece: Any) -> tuple:
    """The fields of a piece, those of its claims among them, without its recipe."""
    if isinstance(piece, optax.GradientTransformation):
        return tuple(piece)
    if hasattr(piece, "claims"):
        return (*piece._replace(claims=None), *piece.claims._replace(recipe=None))
    return tuple(piece._replace(recipe=None))


def find_recipe(piece: Any) -> Recipe | None:
    """How a piece was made; None where no function of a registry made it, or something of it was replaced since."""
    if isinstance(piece, optax.GradientTransformation):
        recipe = getattr(piece.update, "recipe", None)
    else:
        recipe = piece.claims.recipe if hasattr(piece, "claims") else getattr(piece, "recipe", None)
    if recipe is None:
        return None
    now = drop_recipe(piece)
    same = len(now) == len(recipe.made) and all(a is b for a, b in zip(now, recipe.made, strict=True))
    return recipe if same else None
