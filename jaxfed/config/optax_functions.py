"""What configurations name of Optax: optimisers, schedules of the server's learning rate, and transforms as links."""

from collections.abc import Callable
from typing import Any, Literal

import optax

from jaxfed.core import channel
from jaxfed.core.link import Channel
from jaxfed.core.recipe import named


def sgd_optimizer(learning_rate: float, momentum: float = 0.0, nesterov: bool = False) -> optax.GradientTransformation:
    """Stochastic gradient descent, with momentum where it is not 0.

    Args:
        momentum: Share of the last step that is added to the next one.
        nesterov: Nesterov's momentum, which looks one step ahead.
    """
    return optax.sgd(learning_rate, momentum or None, nesterov)


# optimisers of optax whose step is proportional to their learning rate
OPTIMIZERS: dict[str, Callable] = {"sgd": sgd_optimizer} | {
    name: getattr(optax, name)
    for name in ("adam", "yogi", "adagrad", "rmsprop", "adabelief", "adamax", "nadam", "radam", "lion", "amsgrad")
}


SCHEDULES: dict[str, Callable[[float, int, float], Any]] = {  # (rate, rounds, its last share) -> rate by round
    "constant": lambda rate, rounds, final: optax.constant_schedule(rate),
    "linear": lambda rate, rounds, final: optax.linear_schedule(rate, final * rate, rounds),
    "cosine": lambda rate, rounds, final: optax.cosine_decay_schedule(rate, rounds, final),
    "exponential": lambda rate, rounds, final: optax.exponential_decay(rate, rounds, final, end_value=final * rate),
}


def server_schedule(rate: float, rounds: int, schedule: str, warmup: int, final: float) -> Any:
    """A server's learning rate by round, for optax: `warmup` rounds up from 0, then a schedule that comes to
    final * rate in the last of all rounds. Raises ValueError for what is none."""
    if schedule not in SCHEDULES:
        raise ValueError(f"server.schedule: no schedule {schedule!r}: choose one of {', '.join(SCHEDULES)}")
    if not 0 <= warmup < rounds or not 0 <= final <= 1 or (schedule == "exponential" and not final):
        raise ValueError("server: warmup lies below the number of rounds, final from 0 to 1 (exponential: above 0)")
    if schedule == "constant" and not warmup:
        return rate
    rest = SCHEDULES[schedule](rate, max(rounds - warmup - 1, 1), final)
    return optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), rest], [warmup]) if warmup else rest


@named("channel", "at_client")
def optax_at_client(
    transform: Literal["clip_by_global_norm", "clip", "scale"] = "clip_by_global_norm", value: float = 1.0
) -> Channel:
    """What a stateless transform of optax makes of an update on the client.

    Args:
        transform: The name of the transform.
        value: Its argument: the norm, the largest number, or the factor.
    """
    return channel.at_client(getattr(optax, transform)(value))


@named("channel", "at_server")
def optax_at_server(
    transform: Literal["clip_by_global_norm", "clip", "scale", "trace", "ema"] = "trace", value: float = 0.9
) -> Channel:
    """What a transform of optax makes of the decoded update on the server.

    Args:
        transform: The name of the transform.
        value: Its argument: the norm, the largest number, the factor, or the decay.
    """
    return channel.at_server(getattr(optax, transform)(value))
