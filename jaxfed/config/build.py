"""From a configuration, or from the pieces that a program hands over, to all that a run needs."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from jaxfed.algorithms.discordance import add_discordance
from jaxfed.config.central_twin import check_central
from jaxfed.config.evaluation_stages import make_account, make_evaluators
from jaxfed.config.options import BESIDE
from jaxfed.config.registry import REGISTRY
from jaxfed.config.round_stages import RoundLoop, choose_loop, make_algorithm, make_central_rounds
from jaxfed.config.schema import config_to_table
from jaxfed.config.sections import call_registered, make_pieces
from jaxfed.config.settings import Config, Section
from jaxfed.config.stages import (
    Pieces,
    add_popularity,
    check_method,
    choose_block_shapes,
    fit_batching,
    fit_model,
    make_runtime,
)
from jaxfed.config.start import SavedModel
from jaxfed.core.channel import chain
from jaxfed.core.federate import Algorithm
from jaxfed.core.link import Channel
from jaxfed.core.method import Method
from jaxfed.core.model import Model
from jaxfed.core.parametrization import Parametrization, frozen_arguments
from jaxfed.core.placement import Placement
from jaxfed.core.processes import Processes
from jaxfed.core.types import Sampler, Tree
from jaxfed.core.wire import Wire
from jaxfed.data import cache
from jaxfed.data.batching import Batching
from jaxfed.data.blocks import BlockShapes
from jaxfed.data.clients import Clients, make_clients
from jaxfed.data.device_cohorts import CohortDrawer, make_drawer
from jaxfed.data.draw_place import choose_draw_place
from jaxfed.data.features import Features
from jaxfed.data.interactions import Dataset, Interactions
from jaxfed.data.population import Labels, Population, Times
from jaxfed.data.preparation import add_notes
from jaxfed.data.ragged import Domains, NegativeIndex, Ragged
from jaxfed.data.sequences import describe_cut_histories
from jaxfed.data.stages import LOGGER, log_stage
from jaxfed.evaluation.split import EvalSplit
from jaxfed.privacy.accountant import PrivacyAccount

LARGE = 1_000_000  # rows from which prepared data are kept on disk
KEPT = (Clients, Dataset, Interactions, Features, Population, NegativeIndex, Ragged, Labels, Domains, Times)


class RunParts(NamedTuple):
    """All that a run needs, none of it with state."""

    data: Clients
    model: Model
    batching: Batching
    shapes: BlockShapes
    sampler: Sampler
    method: Method
    channel: Channel
    algorithm: Algorithm
    placement: Placement
    evaluator: Any  # see `make_evaluator`
    user_evaluator: Any  # see `make_user_evaluator`
    eval_splits: dict[str, EvalSplit]
    wire: Wire
    account: PrivacyAccount
    epsilon: Callable[[int], float]  # rounds -> what was spent; see `make_ledger`
    processes: Processes = Processes()
    cold_evaluator: Any = None  # for clients of which nothing is kept; see `check_cold_start`
    drawer: CohortDrawer | None = None  # None: rounds are drawn on the host
    loop: RoundLoop | None = None  # None: the host starts each round

    @property
    def protocol(self) -> str:
        """How what is held out was chosen, and whether it leaks."""
        read = ", the time of the held-out item is read" if self.reads_request_times else ""
        return f"{self.data.protocol}{read}{' (LEAKY)' if self.leaky else ''}"

    @property
    def reads_request_times(self) -> bool:
        """Whether the model reads the time of the item to be predicted."""
        return self.model.sequence is not None and self.model.sequence.times == "request"

    @property
    def leaky(self) -> bool:
        """Whether results must be marked LEAKY, as data or model tell something of the held-out items."""
        return self.data.leaky or self.reads_request_times

    @property
    def frozen(self) -> Tree:
        """What is read and nobody trains: of the model, and of its parametrization, where that has any."""
        parametrization, frozen = self.method.parametrization, self.model.frozen
        if parametrization and frozen_arguments(parametrization.frozen):
            return frozen, parametrization.frozen
        return frozen


def load_data(config: Section) -> Clients:
    """Reads the data of a configuration's [data] section. Raises ValueError with one line where they are not fit.

    Large data are prepared once, kept on disk and mapped from there.
    """
    folder = cache.cache_place(config_to_table(config))
    with log_stage("checking prepared data on disk"):
        found, wrong = cache.read_cache(folder, KEPT)
    if found is not None:
        return found
    data = read_data(config)
    if len(data.source.interactions.user) >= LARGE:
        try:
            with log_stage("keeping the prepared data on disk"):
                cache.write_cache(folder, data, KEPT, config_to_table(config))
                data = cache.read_cache(folder, KEPT)[0] or data
        except OSError as error:
            wrong = f"prepared data cannot be kept in {folder} ({error.strerror}): they are read anew each time"
    return data._replace(source=add_notes(data.source, wrong)) if wrong else data


def read_data(config: Section) -> Clients:
    """Reads the clients of a [data] section from their source, without the prepared data on disk."""
    return make_clients(read_source_data(config), **{name: getattr(config, name) for name in BESIDE["data"]})


def read_source_data(config: Section) -> Dataset:
    """What a [data] section's source has, before anything is left out of it."""
    is_file = isinstance(REGISTRY["data"][config.name], partial)  # files keep only the columns asked for
    return call_registered("data", config, **({"keep": config.clients} if is_file else {}))


def build_from_config(
    config: Config,
    data: Clients,
    watch: Callable[[Channel], Channel] = lambda channel: channel,
    saved: SavedModel | None = None,
) -> RunParts:
    """Builds everything from a configuration and its data; `watch` may replace the channel by one that records.

    saved: of the run that this one starts from, see `training.best_model.build_run`.

    Raises ValueError with one line for what cannot be.
    """
    return build_parts(make_pieces(config, data, saved), watch)


def fit_method(method: Method, model: Model, parametrization: Parametrization | None) -> Method:
    """A method as its rounds run: its links are in the channel, and it knows its parametrization."""
    return add_discordance(method, model)._replace(links=(), parametrization=parametrization)


def build_parts(pieces: Pieces, watch: Callable[[Channel], Channel] = lambda channel: channel) -> RunParts:
    """Builds everything from the pieces of a run, stage by stage: what it runs on, the model, the method and its
    channel, the blocks that cohorts are packed in, the algorithm, the evaluation, and the account of its privacy.

    Args:
        pieces: what a configuration names, or a program hands over.
        watch: may replace the channel by one that records.

    Returns:
        The parts of the run.

    Raises:
        ValueError: pieces do not go together or do not fit into the machine: one line that says what to do.
    """
    sampler, method = pieces.sampler, pieces.method
    runtime = make_runtime(pieces.run, pieces.clients.num_items)
    pieces = pieces._replace(clients=add_popularity(pieces.clients, pieces.batching, runtime))
    data = pieces.clients
    model = fit_model(pieces.model, data.population, runtime.table_rows)
    if model.sequence and (note := describe_cut_histories(data.population, model.sequence.length)):
        LOGGER.info("data: %s", note)
    channel = watch(chain(*method.links, pieces.channel))
    check_method(method, pieces, channel, runtime.processes)
    if method.is_central:
        check_central(pieces, channel, runtime.processes)
    fit = partial(fit_method, model=model, parametrization=pieces.parametrization)
    method = fit(method)
    batching = fit_batching(pieces.batching, model, method)
    shapes = choose_block_shapes(pieces, batching, channel.claims.needs_all_rows or method.needs_all_rows, runtime)
    batching = choose_draw_place(data.population, batching, shapes)
    if method.is_central:
        rounds = make_central_rounds(pieces, model, method, runtime)
    else:
        rounds = make_algorithm(pieces, model, method, channel, batching, shapes, runtime)
    evaluation = make_evaluators(pieces, model, rounds.method, runtime)
    account, epsilon = make_account(pieces, channel)
    return RunParts(
        data=data,
        model=model,
        batching=batching,
        shapes=shapes,
        sampler=sampler,
        method=rounds.method,
        channel=channel,
        algorithm=rounds.algorithm,
        placement=runtime.placement,
        evaluator=evaluation.evaluator,
        user_evaluator=evaluation.user_evaluator,
        eval_splits=evaluation.eval_splits,
        wire=rounds.wire,
        account=account,
        epsilon=epsilon,
        processes=runtime.processes,
        cold_evaluator=evaluation.cold_evaluator,
        drawer=make_drawer(data.population, batching, shapes) if batching.draw_on == "device" else None,
        loop=choose_loop(pieces, rounds.algorithm, batching, shapes, fit),
    )
