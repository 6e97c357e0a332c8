"""The central twin of a configuration: what `--central` makes of its table."""

from typing import Any

from jaxfed.config.registry import CLOSED
from jaxfed.config.schema import expect_table
from jaxfed.data.batching import Batching


def with_central(table: dict[str, Any]) -> dict[str, Any]:
    """The table of a configuration that trains the same model on the same data in one place.

    [work] keeps how data are cut into batches, with one pass a round; [algorithm], [[channel]], [[download]] and
    [privacy] say what there is none of. All else stays, [server] and [cohort] among it: they are the optimiser and the
    clients whose data make a batch. Raises ValueError for a model that is solved for.
    """
    model = expect_table(table.get("model", {}), "model").get("name")
    if model in CLOSED:
        raise ValueError(
            f'--central: "{model}" is solved from sums, one round of everyone is the central model already'
        )
    work = expect_table(table.get("work", {}), "work")
    kept = {key: value for key, value in work.items() if key in Batching._fields and key != "epochs"}
    federated = ("algorithm", "channel", "download", "privacy", "work")
    rest = {key: value for key, value in table.items() if key not in federated}
    return {**rest, "algorithm": {"name": "central"}, "work": kept, "channel": []}
