"""A configuration for some data: what their lengths, catalogue, holders and times ask for, each value with its reason.

The rates of a matrix factorisation are left out: they follow the data by a rule of their own (`untuned`).
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxfed.config.build import load_data
from jaxfed.config.config_files import read_config
from jaxfed.config.options import section_arguments
from jaxfed.config.overrides import expand_option, override_config
from jaxfed.config.schema import config_to_table
from jaxfed.config.settings import Section
from jaxfed.config.untuned import RULE
from jaxfed.core.pairs import MOST_ROWS, check_pairs
from jaxfed.data.clients import Clients
from jaxfed.data.shape_description import ALL_TIED
from jaxfed.data.shape_estimates import estimate_order, estimate_ties
from jaxfed.evaluation.metrics import CUTOFFS
from jaxfed.models.closed_form import MOST_DENSE
from jaxfed.sampling.cohort import MOST

ORDER = 0.1  # share of steps that follow from the item before, from which successors are worth counting
LONG = 10  # items of a user: of shorter histories, hardly any successor is met twice
MOST_PAIRS = 200_000_000  # pairs of items, at 12 bytes each, of which a sum is made
PENALTIES = (1 / 3, 1.0, 3.0)  # times the number of holders that an interaction's item has
STEPS = 16  # of a client of middle length in a round, beyond which batches are larger
EXAMPLES = 5  # an interaction and its four negatives
MODELS = ("transitions", "ease", "mf")  # that are suggested
# one sum over all clients, of which the server sees nothing else, and one solve
CLOSED: dict[str, Any] = {
    "rounds": 1,
    "work": {"name": "statistics", "optimizer": {"name": "sgd"}},
    "server": {"name": "solve"},
    "cohort": {"name": "everyone"},
    "evaluation": {"every": 1},
}


class DataFacts(NamedTuple):
    """What a configuration depends on."""

    users: int
    items: int
    rows: int
    length: float  # the median number of rows of a user
    holders: float  # in how many histories the item of an interaction is, on average over interactions
    pairs: int  # of items that are together in a history: at most so many
    has_order: bool  # whether times say what came first
    order: float  # see `Shape`


class Suggestion(NamedTuple):
    """A value of a configuration, and why."""

    key: str  # section.key
    value: Any
    reason: str


def collect_facts(data: Clients) -> DataFacts:
    """What the configuration of some clients depends on. The order of histories is estimated from some of them."""
    source = data.source
    rows, users, items = source.interactions, len(source.users), data.num_items
    length = np.bincount(rows.user, minlength=users).astype(np.float64)
    count = np.bincount(rows.item, minlength=items).astype(np.float64)
    has_order = source.has_times and not data.protocol.endswith(")")  # in brackets: what stands for time
    has_order = has_order and estimate_ties(rows, users) < ALL_TIED
    return DataFacts(
        users=users,
        items=items,
        rows=len(rows.user),
        length=float(np.median(length)),
        holders=float(np.square(count).sum() / count.sum()),
        pairs=int(min(items * (items + 1) / 2, (length * (length + 1) / 2).sum())),
        has_order=has_order,
        order=estimate_order(rows, users) if has_order else 0.0,
    )


def suggest_config(data: Clients, model: str = "") -> list[Suggestion]:
    """A configuration for some clients, whose rows are clicks of users.

    Args:
        data: the clients.
        model: transitions, ease or mf; "": what suits.

    Returns:
        Values that differ from the defaults, or that are worth knowing, with their reasons; the model's own follow it.

    Raises:
        ValueError: no suggestions are made for such a model, or the data have too many items for it.
    """
    if model not in ("", *MODELS):
        raise ValueError(f"no suggestions for the model {model!r}: choose one of {', '.join(MODELS)}")
    facts = collect_facts(data)
    chosen = choose_model(facts)
    if model and model != chosen.value:
        chosen = Suggestion("model.name", model, "as asked")
    if chosen.value != "mf":
        check_pairs(facts.items)
    own = suggest_factorization(facts) if chosen.value == "mf" else suggest_closed_form(facts)
    is_given = data.protocol.startswith("given")  # the data say what is held out
    protocol = [] if is_given else suggest_protocol(facts, chosen.value)
    return [*protocol, chosen, *own, *suggest_cutoffs(data)]


def suggest_protocol(facts: DataFacts, model: str) -> list[Suggestion]:
    """Which items are held out, and what a test sees of a user, where the model reads histories."""
    if not facts.has_order:
        reason = "no times that tell an order: a random item of each user is tested"
        return [Suggestion("data.protocol", "loo-random", reason)]
    latest = Suggestion("data.protocol", "loo-clean", "times say which item of each user was the last")
    reason = "a test sees the validation item, too, as a recommender in use would"
    return [latest, *([] if model == "mf" else [Suggestion("evaluation.history", "all", reason)])]


def suggest_cutoffs(data: Clients) -> list[Suggestion]:
    """The cut-offs, where given negatives are too few for the usual ones."""
    given = data.population.asked.negatives
    most = int(given.counts.max()) + 1 if given else CUTOFFS[-1]
    if most >= CUTOFFS[-1]:
        return []
    cutoffs = tuple(k for k in (5, 10) if k <= most) or (most,)
    reason = f"a held-out item is ranked among {most - 1:,} given negatives"
    select = [Suggestion("evaluation.select", f"val/full/ndcg@{cutoffs[-1]}", "the largest of these cut-offs")]
    return [Suggestion("evaluation.at", cutoffs, reason), *(select if 10 not in cutoffs else [])]


def suggest_labels(section: Section, clients: int) -> dict[str, Any]:
    """The table of a model of labels, without [data]: what `configs/ml100k_fm_rating.toml` has, whose rates are for
    labelled rows; without features it is a matrix factorisation with biases."""
    table = read_config("ml100k_fm_rating")
    made = {key: table[key] for key in ("rounds", "model", "work", "channel", "server", "evaluation")}
    click = section.label == "click"
    made["model"] |= {"loss": "bce"} if click else {}
    made["evaluation"] |= {"select": "val/click/log_loss" if click else "val/rating/rmse"}
    many = {"name": "uniform", "size": MOST}
    return made | {"cohort": many if clients > MOST else {"name": "everyone"}}


def choose_model(facts: DataFacts) -> Suggestion:
    """The model: solved from one sum, where the sum fits."""
    if facts.items > MOST_ROWS:
        reason = (
            f"{facts.items:,} items are too many for sums over their pairs (over {MOST_ROWS:,}): rounds of training"
        )
        return Suggestion("model.name", "mf", reason)
    if facts.pairs > MOST_PAIRS:
        reason = (
            f"up to {facts.pairs:,} pairs of items are too many for one sum (over {MOST_PAIRS:,}): rounds of training"
        )
        return Suggestion("model.name", "mf", reason)
    solved = "solved from one sum over all users, without rates"
    if facts.order < ORDER:
        return Suggestion("model.name", "ease", f"{solved}; order {facts.order:.2f}: what came last says little")
    if facts.length < LONG:
        return Suggestion("model.name", "ease", f"{solved}; histories are too short for counts of what came after what")
    return Suggestion(
        "model.name", "transitions", f"{solved}; order {facts.order:.2f}: items follow from the last ones"
    )


def suggest_closed_form(facts: DataFacts) -> list[Suggestion]:
    """The keys of a model that is solved from one sum."""
    penalties = tuple(float(f"{facts.holders * each:.1g}") for each in PENALTIES)
    reason = f"around {facts.holders:,.0f}, the users who have the item of a row, on average; validation chooses"
    made = [Suggestion("model.l2_grid", penalties, reason)]
    if facts.items > MOST_DENSE:
        reason = f"{facts.items:,} items are too many for the exact solve (over {MOST_DENSE:,})"
        made.append(Suggestion("model.neighbours", 200, reason))
    return made


def suggest_factorization(facts: DataFacts) -> list[Suggestion]:
    """The keys of a matrix factorisation that is trained in rounds."""
    batch = 64
    while facts.length * EXAMPLES > STEPS * batch:
        batch *= 2
    holders, rounds = RULE["cohort"]["holders"], RULE["rounds"]
    return [
        Suggestion("model.dim", 32, "twice as many gained nothing on data of several shapes, 8 lost"),
        Suggestion(
            "work.batch_size", batch, f"a history of {facts.length:,.0f} items is at most {STEPS} steps a round"
        ),
        Suggestion(
            "cohort.holders",
            holders,
            f"clients of a round that have the item of a row, on average; of {facts.users:,} users "
            f"{facts.holders:,.0f} have it",
        ),
        Suggestion("rounds", rounds, "at most; evaluation.patience ends a run that no longer gets better"),
    ]


def is_suggested_for(section: Section) -> bool:
    """Whether suggestions are made for a [data] section: of clicks, with a client for each user."""
    return section.label == "implicit" and section.clients == "user" and not section.cold and not section.malicious


def make_suggested_table(suggestions: list[Suggestion]) -> dict[str, Any]:
    """The table of a configuration with suggested values, without [data]'s own keys."""
    table: dict[str, Any] = {}
    for key, value, _ in suggestions:
        section, _, name = key.rpartition(".")
        (table.setdefault(section, {}) if section else table)[name] = value
    if table["model"]["name"] == "mf":
        return table
    whole = table["model"]["name"] == "ease"  # numbers, which need no bits for what lies below 1
    table["evaluation"] = table.get("evaluation", {}) | CLOSED["evaluation"]
    return CLOSED | table | {"channel": [{"name": "ring", "bound": 1.0, "fraction_bits": 0 if whole else "auto"}]}


class FileData(NamedTuple):
    """A file of data, read as a configuration reads it."""

    section: Section  # [data]
    table: dict[str, Any]  # the same, without defaults that nobody asked for
    clients: Clients


def read_file(path: str, options: Sequence[str]) -> FileData:
    """Reads a file of data with options of the loader, such as `--user COLUMN` or `--data.user COLUMN`. Raises
    ValueError where it cannot be read."""
    words = [f"--data.path={path}", *map(expand_option, options)]
    section = override_config({}, words).data
    found = [re.match(r"--data\.([\w-]+)", word) for word in words]
    said = {each[1].replace("-", "_") for each in found if each}
    values, defaults = config_to_table(section), section_arguments("data", section.name)
    chosen = {key: values[key] for key in values if key in said or getattr(section, key) != defaults.get(key)}
    return FileData(section, {"name": section.name, "path": path} | chosen, load_data(section))


def suggest_table(file: FileData, model: str = "") -> tuple[dict[str, Any], dict[str, str]]:
    """The configuration of a file of data.

    Args:
        file: what was read, and how.
        model: transitions, ease or mf; "": what suits the data.

    Returns:
        (the table: what was asked for, then what the data suggest; {key: why it has its value}). Without
        suggestions there are no reasons, and the table holds [data] and, for labels, a model of labels.

    Raises:
        ValueError: a model is asked for, and no suggestions are made for it or for such data.
    """
    if not is_suggested_for(file.section):
        if model:
            raise ValueError("--model: suggestions are for clicks and a client for each user: leave it out")
        if file.section.label == "implicit":
            return {"data": file.table}, {}
        reasons = {
            "model.name": "that of ml100k_fm_rating, with its rates, which follow no rule: others may suit your data"
        }
        return suggest_labels(file.section, file.clients.num_clients) | {"data": file.table}, reasons
    suggestions = suggest_config(file.clients, model)
    suggestions = [each for each in suggestions if each.key.removeprefix("data.") not in file.table]
    table = make_suggested_table(suggestions)
    return {**table, "data": table.get("data", {}) | file.table}, {each.key: each.reason for each in suggestions}
