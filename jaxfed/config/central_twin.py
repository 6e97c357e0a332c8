"""The central twin of a configuration: what `--central` makes of its table, and what it has no place for."""

from typing import Any

from jaxfed.config.registry import CLOSED
from jaxfed.config.schema import expect_table
from jaxfed.config.stages import Pieces
from jaxfed.core.link import Channel, list_links
from jaxfed.core.processes import Processes
from jaxfed.data.batching import Batching


def with_central(table: dict[str, Any]) -> dict[str, Any]:
    """The table of a configuration that trains the same model on the same data in one place.

    [algorithm], [[channel]], [[download]] and [privacy] are removed, since nothing is sent. [work] keeps only how
    batches are made, with one pass a round, and what is frozen. All else stays: [server] is the optimiser, and [cohort]
    chooses the clients whose data make a batch. Raises ValueError for a model that is solved for.
    """
    model = expect_table(table.get("model", {}), "model").get("name")
    if model in CLOSED:
        raise ValueError(
            f'--central: "{model}" is solved from sums, one round of everyone is the central model already'
        )
    work = expect_table(table.get("work", {}), "work")
    batching = {*Batching._fields, "freeze"} - {"epochs"}
    kept = {key: value for key, value in work.items() if key in batching}
    federated = ("algorithm", "channel", "download", "privacy", "work")
    rest = {key: value for key, value in table.items() if key not in federated}
    return {**rest, "algorithm": {"name": "central"}, "work": kept, "channel": []}


def check_central(pieces: Pieces, channel: Channel, processes: Processes) -> None:
    """Raises ValueError for what a run without messages has no place for."""
    links = [each for each in list_links(channel) if each.encode or each.decode or each.aggregator]
    if links or pieces.download:
        raise ValueError(
            "central training has no messages: leave [[channel]] and [[download]] out (channel = []), or give --central"
        )
    if pieces.edges.number or pieces.sampler.history_length or pieces.clients.population.owner is not None:
        raise ValueError(
            "central training has one model and one copy of the data: leave server.edges, cohort.buffered and clients "
            "by device out"
        )
    if processes.size > 1:
        raise ValueError("central training runs in one process: start one")
    if pieces.run.client_store == "host":
        raise ValueError("central training keeps all clients on the device: leave run.client_store out")
