"""What a configuration can name: functions by section and name. Adding one is adding a line here.

A section of a configuration holds `name` and that function's keyword arguments with a default. Arguments without one
(`num_items`, `num_clients`, ...) are given by the program.
"""

import inspect
import typing
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import optax

from jaxfed import arrivals, channel, clock, cohort
from jaxfed.channel import Channel
from jaxfed.channels.attack import noise, promote, scaled, sign_flip
from jaxfed.channels.clip import adaptive_clip, clip, clip_per_row, zero_out
from jaxfed.channels.compress import drive, low_rank, quantise, random_k, rotate, sign, top_k
from jaxfed.channels.correlated import correlated
from jaxfed.channels.difference import difference
from jaxfed.channels.discrete import discrete_gaussian
from jaxfed.channels.distributed import skellam
from jaxfed.channels.drift import feddyn, fednova
from jaxfed.channels.fair import agnostic, fair
from jaxfed.channels.noise import densify, gaussian, local_gaussian
from jaxfed.channels.robust import geometric_median, krum, median, trimmed_mean
from jaxfed.channels.secure import pads, ring
from jaxfed.channels.stale import mixing, staleness
from jaxfed.channels.weigh import cluster_mean, mean, per_row_mean, weighted_mean
from jaxfed.data.batches import Batching
from jaxfed.data.clients import prepare
from jaxfed.data.files import read_interactions
from jaxfed.data.movielens import ml_100k
from jaxfed.data.synthetic import synthetic
from jaxfed.models.closed import ease, ials, item_knn, transitions
from jaxfed.models.controls import counter, popularity
from jaxfed.models.factorisation import mf
from jaxfed.models.features import fm, two_tower
from jaxfed.models.generated import metamf
from jaxfed.models.neural import fedrap, neumf, pfedrec
from jaxfed.rows import is_table
from jaxfed.server_optimizers import fedadagrad, fedadam, fedyogi
from jaxfed.works.clusters import clustered
from jaxfed.works.control import dynamic, mime, scaffold
from jaxfed.works.graph import graph_guided
from jaxfed.works.local import gradient, local_steps
from jaxfed.works.personal import alternate, apfl, ditto, reconstruct
from jaxfed.works.statistics import solve, statistics


def sgd(learning_rate: float, momentum: float = 0.0, nesterov: bool = False) -> optax.GradientTransformation:
    """Stochastic gradient descent, with momentum where it is not 0.

    Args:
        momentum: Share of the last step that is added to the next one.
        nesterov: Nesterov's momentum, which looks one step ahead.
    """
    return optax.sgd(learning_rate, momentum or None, nesterov)


# optimisers of optax whose step is proportional to their learning rate
OPTIMIZERS: dict[str, Callable] = {"sgd": sgd} | {
    name: getattr(optax, name)
    for name in ("adam", "yogi", "adagrad", "rmsprop", "adabelief", "adamax", "nadam", "radam", "lion", "amsgrad")
}


def grouped(
    core: Callable[..., optax.GradientTransformation],
    learning_rate: float,
    weight_decay: float,
    item: dict[str, float | None],
    user: dict[str, float | None],
    **rest: Any,
) -> optax.GradientTransformation:
    """A client's optimiser on the pair (shared, private): `item` (the tables of either) and `user` (the rest of the
    private part) may have a learning rate and weight decay of their own. A step is rate * (core(g) - decay * p)."""

    def of(group):
        rate, decay = group["learning_rate"], group["weight_decay"]
        return learning_rate if rate is None else rate, weight_decay if decay is None else decay

    def leaf(rate_decay):
        rate, decay = rate_decay
        return lambda step, value: rate * (step - decay * value)

    def paced(steps, params):
        def part(rest):
            return lambda step, value: jax.tree.map(leaf(of(item) if is_table(step) else rest), step, value)

        rests = (learning_rate, weight_decay), of(user)
        each = zip(rests, steps, params, strict=True)
        return tuple(jax.tree.map(part(rest), *pair, is_leaf=is_table) for rest, *pair in each)

    return optax.chain(core(learning_rate=1.0, **rest), optax.stateless(paced))


SCHEDULES: dict[str, Callable[[float, int, float], Any]] = {  # (rate, rounds, its last share) -> rate by round
    "constant": lambda rate, rounds, final: optax.constant_schedule(rate),
    "linear": lambda rate, rounds, final: optax.linear_schedule(rate, final * rate, rounds),
    "cosine": lambda rate, rounds, final: optax.cosine_decay_schedule(rate, rounds, final),
    "exponential": lambda rate, rounds, final: optax.exponential_decay(rate, rounds, final, end_value=final * rate),
}


def scheduled(rate: float, rounds: int, schedule: str, warmup: int, final: float) -> Any:
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


def at_client(
    transform: Literal["clip_by_global_norm", "clip", "scale"] = "clip_by_global_norm", value: float = 1.0
) -> Channel:
    """What a stateless transform of optax makes of an update on the client.

    Args:
        transform: The name of the transform.
        value: Its argument: the norm, the largest number, or the factor.
    """
    return channel.at_client(getattr(optax, transform)(value))


def at_server(
    transform: Literal["clip_by_global_norm", "clip", "scale", "trace", "ema"] = "trace", value: float = 0.9
) -> Channel:
    """What a transform of optax makes of the decoded update on the server.

    Args:
        transform: The name of the transform.
        value: Its argument: the norm, the largest number, the factor, or the decay.
    """
    return channel.at_server(getattr(optax, transform)(value))


CLOSED: dict[str, Callable] = {"ease": ease, "item_knn": item_knn, "transitions": transitions, "ials": ials}

REGISTRY: dict[str, dict[str, Callable]] = {
    "data": {
        "ml-100k": ml_100k,
        "synthetic": synthetic,
        **{kind: partial(read_interactions, kind=kind) for kind in ("csv", "tsv", "parquet", "inter")},
    },
    "model": {
        **CLOSED,
        "mf": mf,
        "neumf": neumf,
        "pfedrec": pfedrec,
        "fedrap": fedrap,
        "metamf": metamf,
        "fm": fm,
        "two_tower": two_tower,
        "popularity": popularity,
        "counter": counter,
    },
    "work": {
        "local_steps": local_steps,
        "gradient": gradient,
        "scaffold": scaffold,
        "dynamic": dynamic,
        "mime": mime,
        "reconstruct": reconstruct,
        "alternate": alternate,
        "ditto": ditto,
        "apfl": apfl,
        "clustered": clustered,
        "graph_guided": graph_guided,
        "statistics": statistics,
    },
    "optimizer": OPTIMIZERS,
    "channel": {
        "mean": mean,
        "weighted_mean": weighted_mean,
        "per_row_mean": per_row_mean,
        "cluster_mean": cluster_mean,
        "fair": fair,
        "agnostic": agnostic,
        "fednova": fednova,
        "feddyn": feddyn,
        "difference": difference,
        "staleness": staleness,
        "mixing": mixing,
        "at_client": at_client,
        "at_server": at_server,
        "clip": clip,
        "clip_per_row": clip_per_row,
        "adaptive_clip": adaptive_clip,
        "zero_out": zero_out,
        "gaussian": gaussian,
        "local_gaussian": local_gaussian,
        "correlated": correlated,
        "skellam": skellam,
        "discrete_gaussian": discrete_gaussian,
        "densify": densify,
        "quantise": quantise,
        "sign": sign,
        "drive": drive,
        "rotate": rotate,
        "top_k": top_k,
        "random_k": random_k,
        "low_rank": low_rank,
        "ring": ring,
        "pads": pads,
        "median": median,
        "trimmed_mean": trimmed_mean,
        "geometric_median": geometric_median,
        "krum": krum,
        "sign_flip": sign_flip,
        "scaled": scaled,
        "noise": noise,
        "promote": promote,
    },
    "server": {**OPTIMIZERS, "fedadam": fedadam, "fedyogi": fedyogi, "fedadagrad": fedadagrad, "solve": solve},
    "cohort": {
        "uniform": cohort.uniform,
        "poisson": cohort.poisson,
        "cyclic": cohort.cyclic,
        "everyone": cohort.everyone,
        "deadline": arrivals.deadline,
        "buffered": arrivals.buffered,
    },
    "clock": {"none": clock.none, "constant": clock.constant, "lognormal": clock.lognormal, "trace": clock.trace},
}


class OfWork(NamedTuple):
    """What every work takes beside its batches and its own arguments.

    Args:
        keep_copy: Clients keep what they have trained until their next round, and it is evaluated as `personal`.
    """

    keep_copy: bool = False


class OfOptimizer(NamedTuple):
    """What every client optimiser takes beside its own arguments; see `grouped`.

    Args:
        learning_rate: Learning rate; [work.optimizer.item] and [work.optimizer.user] may override it.
        weight_decay: Decoupled weight decay: each step subtracts learning_rate x weight_decay x parameter.
    """

    learning_rate: float = 0.1
    weight_decay: float = 0.0


class OfServer(NamedTuple):
    """What every server optimiser takes beside its own arguments; see `scheduled` and `hierarchy`.

    Args:
        learning_rate: Learning rate of the server optimiser. sgd: factor on the aggregated update (1: plain FedAvg).
            Adam and other adaptive optimisers: roughly the size of each step.
        lazy: true: an optimiser with a state updates only the table rows that this round's cohort holds. false: all
            rows in every round.
        schedule: How the learning rate changes over the rounds: constant, or a linear, cosine or exponential decay.
        warmup: Number of rounds at the start in which the learning rate rises from 0.
        final: Learning rate of the last round, divided by the initial one. Not used by constant.
        edges: Number of edge servers (hierarchical FL), each with its own model. 0: none.
        edge_rounds: Number of rounds after which the edge servers average their models.
    """

    learning_rate: float = 1.0
    lazy: bool = True
    schedule: str = "constant"
    warmup: int = 0
    final: float = 0.1
    edges: int = 0
    edge_rounds: int = 1


# whose arguments a section takes beside those of its function
SOURCES: dict[str, tuple[Callable, ...]] = {
    "data": (prepare,),
    "work": (Batching, OfWork),
    "optimizer": (OfOptimizer,),
    "server": (OfServer,),
}
GIVEN = ("data", "pairwise", "ordered", "features")  # of these, what the program gives

BESIDE: dict[str, dict[str, Any]] = {
    section: {
        name: each.default
        for source in sources
        for name, each in inspect.signature(source).parameters.items()
        if name not in GIVEN
    }
    for section, sources in SOURCES.items()
}

# in place of these for adaptive optimisers, which are all but sgd and solve: their steps are about as long as their
# rate, whatever the model, loss and batch, while those of sgd are as long as the gradient
STEADY: dict[str, dict[str, float]] = {
    "optimizer": {"learning_rate": 0.05, "weight_decay": 0.5},
    "server": {"learning_rate": 0.05},
}


def arguments(section: str, name: str) -> dict[str, Any]:
    """{argument: default} of what a section may hold for this name: numbers, words and tuples of them."""
    function = REGISTRY[section][name]
    fixed = function.keywords if isinstance(function, partial) else {}
    found = {
        each.name: each.default
        for each in inspect.signature(function).parameters.values()
        if isinstance(each.default, bool | int | float | str | tuple) and each.name not in (*fixed, "keep")
    }
    return found | BESIDE.get(section, {}) | (STEADY.get(section, {}) if name not in ("sgd", "solve") else {})


def choices(section: str, name: str, key: str) -> tuple[str, ...]:
    """The words that an argument may be, where its function names them (a Literal); none otherwise."""
    for function in (REGISTRY[section][name], *SOURCES.get(section, ())):
        if key in (parameters := inspect.signature(function, eval_str=True).parameters):
            return typing.get_args(parameters[key].annotation) if isinstance(parameters[key].default, str) else ()
    return ()
