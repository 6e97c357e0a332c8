"""The figures of a run's files: what each is called, its unit, what it means, and which way is better.

`metrics.jsonl`, `summary.json`, TensorBoard, the tables of the terminal, sweeps and the table of results all read their
names here. A link or a method of one's own may write figures that are not listed: they are written as they are.
"""

import math
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, Literal, NamedTuple

LEAKY_NOTE = "LEAKY: train negatives exclude the held-out items, or the model reads when they were met"
DIGITS = {"share": 4, "rounds": 0, "bytes": 0, "s": 1}  # after the point in a table, by unit


class Figure(NamedTuple):
    """What is known of a figure of a run's files."""

    unit: str  # a count has the name of what is counted; "": a number without a unit, or words
    meaning: str
    better: Literal["", "more", "less"] = ""  # "": neither
    in_terminal: bool = False  # the table at the end of `jaxfed train` shows it
    in_sweep: bool = False  # tables of several runs keep it


# In the order of the terminal. A name may be a pattern, as of file names: * is anything.
FIGURES: dict[str, Figure] = {
    "round": Figure("rounds", "Rounds that were done when the row was written."),
    "rounds": Figure("rounds", "Rounds that the run did.", in_sweep=True),
    "best_round": Figure("rounds", "Round of the best model, by `evaluation.select`.", in_sweep=True),
    "past_its_best": Figure("", "What became of the model after its best round, where it lost half of its figure."),
    "extended": Figure("rounds", "Numbers of rounds that were asked for before the run was extended."),
    "simulated_seconds": Figure("s", "Time by the simulated clock of [clock].", "less", in_terminal=True),
    "seconds": Figure("s", "Time of the rounds, without compilation and evaluation.", "less", True, True),
    "compile_seconds": Figure("s", "Time to compile the programs of a round.", "less", in_terminal=True),
    "solve/candidate": Figure("", "The value of a hyper-parameter that validation chose (`l2_grid`).", ""),
    "seconds/sample": Figure("s", "Time to draw cohorts, while devices compute.", "less"),
    "seconds/pack": Figure("s", "Time to pack cohorts, while devices compute.", "less"),
    "seconds/transfer": Figure("s", "Time to put cohorts on devices, while they compute.", "less"),
    "seconds/wait": Figure("s", "Time in which the rounds waited for their cohort.", "less"),
    "seconds/compute": Figure("s", "Time to start programs and to wait for their results.", "less"),
    "seconds/solve": Figure("s", "Time to solve for candidates.", "less"),
    "seconds/evaluate": Figure("s", "Time of evaluations.", "less"),
    "seconds/checkpoint": Figure("s", "Time in which checkpoints held the rounds.", "less"),
    "client_updates_per_second": Figure("updates/s", "Client updates per second of `seconds`.", "more", True),
    "clients/refused_total": Figure(
        "clients", "Client updates that were discarded, as they held NaN or infinity, of all rounds.", "less", True
    ),
    "clients/dropped_total": Figure(
        "clients", "Clients that were asked and did not report in time, of all rounds.", "less", True
    ),
    "clients/clipped_total": Figure("clients", "Client updates that a clipping link scaled down.", "", True),
    "epsilon": Figure(
        "", "Epsilon of differential privacy at `delta`; null where no link is private.", "less", True, True
    ),
    "delta": Figure("", "Delta of differential privacy.", "less", True),
    "privacy": Figure("", "What epsilon rests on: mechanisms, sampling and accountant."),
    "peak_memory_mb": Figure("MB", "The most memory that the process held.", "less", True),
    "bytes_up_per_client": Figure("bytes", "Mean upload of a client update.", "less", True, True),
    "bytes_down_per_client": Figure("bytes", "Mean download of a client that was asked.", "less", True, True),
    "bytes_frozen": Figure("bytes", "What a client downloads once: the frozen part of the model.", "less", True),
    "bytes_up_total": Figure("bytes", "Uploads of all clients.", "less"),
    "bytes_down_total": Figure("bytes", "Downloads of all clients.", "less"),
    "server_sees": Figure("", "What the server learns of a client's update.", "", True, True),
    "network/bytes_up": Figure("bytes", "Replies of all nodes in a round, as they were (`jaxfed deploy`).", "less"),
    "network/bytes_down": Figure("bytes", "Requests to all nodes in a round, as they were (`jaxfed deploy`).", "less"),
    "params_sha256": Figure("", "Hash of the last model: shared parameters and private parts.", "", True),
    "data_sha256": Figure(
        "", "Hash of the rows of the data in their order, and of features that are not part of them."
    ),
    "sampled_negatives": Figure(
        "items", "Where users have fewer negatives than `negatives` says: the most there are for one."
    ),
    "leaky": Figure("", "true: train negatives exclude the held-out items, or the model reads when they were met."),
    "protocol": Figure("", "How the held-out rows were chosen; LEAKY where it leaks.", "", True),
    "history": Figure("", "What a test knows of a user, where that is more than train items.", "", True),
    "negatives": Figure("", "What `sampled` figures rank a held-out item among.", "", True),
    "train/loss": Figure("", "Mean training loss of the clients that reported.", "less"),
    "rows/sent": Figure("rows", "Table rows that the cohort's clients sent, those of each counted."),
    "rows/union": Figure("rows", "Table rows that any client of the cohort holds."),
    "clients/reported": Figure("clients", "Clients whose update was used in the round.", "more"),
    "clients/refused": Figure("clients", "Client updates of the round that held NaN or infinity.", "less"),
    "clients/dropped": Figure("clients", "Clients that were asked in the round and did not report in time.", "less"),
    "clients/age": Figure("rounds", "Mean number of rounds since the reporting clients were sent their model.", "less"),
    "clients/merged": Figure("clients", "Users whose devices' private parts were averaged in the round."),
    "clip/clients": Figure("share", "Share of the clients whose update was clipped."),
    "clip/bound": Figure("", "The bound of adaptive clipping."),
    "zero_out/clients": Figure("share", "Share of the clients whose update was set to zero for its norm."),
    "noise/stddev": Figure("", "Standard deviation of the noise on each number of the sum."),
    "ring/cut": Figure("share", "Share of the clients of whom the link `ring` cut a value.", "less"),
    "lora/discordance": Figure(
        "", "Distance of the product of mean low-rank factors from the mean product, over its update.", "less"
    ),
    "clusters/empty": Figure("clusters", "Clusters without a client in the round.", "less"),
    "clusters/*": Figure("share", "Share of the clients in a cluster."),
    "agnostic/largest": Figure("", "The largest weight of a group, over that of equal weights."),
    "edges/silent": Figure("edges", "Edge servers without a client in the round.", "less"),
    "edges/bytes_total": Figure("bytes", "Traffic between edge servers and the server.", "less"),
    "graph/neighbours": Figure("clients", "Mean number of neighbours of a client in the graph of clients."),
}
# by the last word of val/... and test/...
METRICS: dict[str, Figure] = {
    "hr@*": Figure("share", "Hit rate: users with a held-out item among their first k.", "more"),
    "ndcg@*": Figure("share", "Normalised discounted cumulative gain of the first k.", "more"),
    "recall@*": Figure("share", "Share of a user's held-out items among the first k.", "more"),
    "precision@*": Figure("share", "Share of the first k that are held-out items.", "more"),
    "f1@*": Figure("share", "Harmonic mean of precision and recall of the first k.", "more"),
    "mrr": Figure("share", "Mean of 1 / rank of a user's best held-out item.", "more"),
    "auc": Figure("share", "Share of the pairs of a positive and a negative in the right order.", "more"),
    "er@*": Figure("share", "Exposure: users who are recommended a promoted item among their first k."),
    "accuracy": Figure("share", "Share of the candidates that are classified rightly at probability 1/2.", "more"),
    "precision": Figure("share", "Share of those classified as positive that are.", "more"),
    "recall": Figure("share", "Share of the positives that are classified as such.", "more"),
    "f1": Figure("share", "Harmonic mean of precision and recall at probability 1/2.", "more"),
    "log_loss": Figure("nats", "Mean cross-entropy of predicted probabilities.", "less"),
    "rmse": Figure("ratings", "Root of the mean squared error of predicted ratings.", "less"),
    "mae": Figure("ratings", "Mean absolute error of predicted ratings.", "less"),
}
# what tables show, in this order
ERROR_COLUMNS = ("rmse", "mae", "log_loss", "auc")  # where rows are labelled
HEADLINES = ("test/full/hr@10", "test/full/ndcg@10", "test/sampled/hr@10", "test/sampled/ndcg@10")
TERMINAL_FACTS = tuple(name for name, each in FIGURES.items() if each.in_terminal)
SWEEP_FACTS = tuple(name for name, each in FIGURES.items() if each.in_sweep)


@lru_cache(maxsize=1024)
def find_figure(name: str) -> Figure | None:
    """What is known of a figure, by its name in a run's files; None: it is not listed.

    Args:
        name: for example `seconds/pack`, `val/full/ndcg@10`, `test/sampled/hr@10_sd`, `test/full/hr@10/decile_3`.
    """
    if re.match(r"(val|test)/", name):
        whole, _, decile = name.partition("/decile_")
        word, spread = re.subn(r"_sd$", "", whole.rpartition("/")[2])
        found = next((each for key, each in METRICS.items() if fnmatchcase(word, key)), None)
        if found and spread:
            return Figure(found.unit, f"Standard deviation over draws of negatives. {found.meaning}")
        if found and decile:
            of = "1: the least active clients, 10: the most"
            return found._replace(meaning=f"{found.meaning} Decile {decile} ({of}).")
        return found
    return FIGURES.get(name) or next((each for key, each in FIGURES.items() if fnmatchcase(name, key)), None)


def ranking_columns(names: Iterable[str]) -> tuple[str, ...]:
    """The columns of a table of rankings: hr@k and ndcg@k of each cut-off among the names of figures, mrr and auc; none
    where nothing was ranked."""
    found = [re.search(r"/hr@(\d+)$", name) for name in names]
    cutoffs = sorted({int(each[1]) for each in found if each})
    return tuple(f"{metric}@{k}" for k in cutoffs for metric in ("hr", "ndcg")) + ("mrr", "auc") * bool(cutoffs)


def lower_is_better(name: str) -> bool:
    """Whether less is better of a figure of a run's files."""
    found = find_figure(name)
    return found is not None and found.better == "less"


def is_better(name: str, value: float, other: float) -> bool:
    """Whether a value of a figure is better than another one; any number is better than NaN."""
    if math.isnan(other):
        return not math.isnan(value)
    return value < other if lower_is_better(name) else value > other


def describe_figure(name: str) -> str:
    """What a figure means, with its unit; "" for one that is not listed."""
    found = find_figure(name)
    if not found:
        return ""
    return found.meaning if found.unit in ("", "share") else f"{found.meaning} Unit: {found.unit}."


def figure_digits(name: str) -> int:
    """How many digits after the point a table shows of a figure."""
    found = find_figure(name)
    return DIGITS.get(found.unit, 4) if found else 4


def format_fact(name: str, value: Any) -> str:
    """A figure of a summary for the terminal: all of its digits, six of epsilon."""
    if not isinstance(value, int | float):
        return str(value)
    return f"{round(value, 6) if name == 'epsilon' else value:,}"
