"""What a configuration trains with that says nothing of training: rates that follow the data, whatever their shape."""

from typing import Any

from jaxfed.config.settings import NOISE

# Why these, and what they are worth: docs/methods/rates.md
RULE: dict[str, Any] = {
    "rounds": 400,
    "model": {"init_scale": 0.01},
    "optimizer": {
        "name": "sgd",
        "item": {"learning_rate": 1.0, "weight_decay": 0.02, "per_example": True},
        "user": {"learning_rate": 2.0, "weight_decay": 0.64, "per_example": True},
    },
    "channel": [{"name": "per_row_mean", "floor": 4.0}],
    "cohort": {"name": "uniform", "holders": 160.0},
    "evaluation": {"patience": 20},  # figures may stay level for a hundred rounds, while popularity is learnt
}
LOCAL = ("custom", "fedavg", "fedprox", "fednova", "qfedavg", "agnostic", "fedbuff", "fedasync")
COVERED = {  # what of some sections the rule is for; anything else has rates of its own
    "data": ("label", ("implicit",)),
    "model": ("name", ("mf",)),
    "algorithm": ("name", LOCAL),
    "work": ("name", ("local_steps",)),
    "server": ("name", ("sgd",)),
}


def is_covered(table: dict[str, Any]) -> bool:
    """Whether a configuration's table leaves the rates to the rule: a matrix factorisation that learns from
    interactions by local steps, of whose clients' optimiser nothing is said."""
    sections = {name: table.get(name, {}) for name in COVERED}
    if not all(isinstance(each, dict) for each in sections.values()) or "optimizer" in sections["work"]:
        return False
    covered = all(sections[name].get(key, words[0]) in words for name, (key, words) in COVERED.items())
    return covered and sections["model"].get("loss", "bce") == "bce"


def with_rule(table: dict[str, Any]) -> dict[str, Any]:
    """A configuration's table, with the rule's values for what it leaves out, where it follows the rule.

    Args:
        table: As `make_config` takes it. What it says stays as it is.

    Returns:
        The table, or another one.

    Example:
        >>> with_rule({"work": {"batch_size": 32}})["work"]["optimizer"]["item"]["learning_rate"]
        1.0
        >>> with_rule({"work": {"optimizer": {"name": "adam"}}})  # says by itself how it trains
        {'work': {'optimizer': {'name': 'adam'}}}
    """
    if not is_covered(table):
        return table
    made, links = dict(table), table.get("channel", ())
    # a size or a last round that follows the data tells about them: beside links that add noise the rule sets neither
    noisy = isinstance(links, list | tuple) and any(isinstance(x, dict) and x.get("name") in NOISE for x in links)
    made["model"] = RULE["model"] | made.get("model", {})
    made["work"] = made.get("work", {}) | {"optimizer": RULE["optimizer"]}
    cohort = made.get("cohort", {})
    if isinstance(cohort, dict) and cohort.get("name", "uniform") == "uniform" and not (cohort.get("size") or noisy):
        made["cohort"] = RULE["cohort"] | cohort
    evaluation = made.get("evaluation", {})
    if isinstance(evaluation, dict) and not noisy:
        made["evaluation"] = RULE["evaluation"] | evaluation
    return {"rounds": RULE["rounds"], "channel": RULE["channel"]} | made
