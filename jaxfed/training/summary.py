"""The summary of a run: its figures, and what readers must know about them."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxfed.core.tree import tree_digest
from jaxfed.data.population import Labels
from jaxfed.privacy import accountant
from jaxfed.training.log import log
from jaxfed.training.records import lower_is_better
from jaxfed.training.rounds import (
    Progress,
    count_negatives,
    evaluate_model,
    evaluation_facts,
    make_run_keys,
    mark_leaky,
    scored_model,
)
from jaxfed.training.session import Session
from jaxfed.training.timing import peak_megabytes, time_stage

KEPT = 0.5  # share of the best figure below which a run is said to have trained past its best
LOWER_RATES = "lower the learning rates (work.optimizer.learning_rate, server.learning_rate)"


def describe_decline(name: str, best: tuple[int, float], last: tuple[int, float | None]) -> str:
    """What to say where a model lost half of its figure after its best round; "": nothing.

    name: of the figure. best, last: (round, value); where less is better, a value has doubled. NaN is worse than any.
    """
    (best_round, best_value), (last_round, last_value) = best, last
    if last_value is None or last_round <= best_round:
        return ""
    below, above = (best_value, last_value) if lower_is_better(name) else (last_value, best_value)
    if below > KEPT * above:
        return ""
    then = "numbers were not finite" if math.isnan(last_value) else f"it was {last_value:.4f}"
    return (
        f"best at round {best_round} ({name} {best_value:.4f}); at round {last_round} {then}: the learning rates are "
        f"too large for so many rounds: {LOWER_RATES}, or stop earlier (rounds, evaluation.patience)"
    )


def worse_than_the_mean(labels: Labels | None, values: dict[str, float]) -> str:
    """What to say where the error on ratings of validation is larger than that of one number for all; "": nothing."""
    if labels is None or labels.kind != "rating" or "val/rating/rmse" not in values:
        return ""
    constant = float(np.sqrt(np.mean((labels.valid - labels.train.mean()) ** 2)))
    if values["val/rating/rmse"] <= constant:
        return ""
    return (
        f"val/rating/rmse {values['val/rating/rmse']:.4g} is worse than predicting the mean rating for everybody "
        f"({constant:.4g}): the model has learnt nothing, or diverged: {LOWER_RATES}, or train for more rounds"
    )


def privacy_cautions(config: Any, account: accountant.PrivacyAccount, rounds: int) -> list[str]:
    """What a reader of a private run's figure must know."""
    if not account.mechanisms:
        return []
    found = accountant.list_remarks(account.mechanisms, account.sampling, rounds, account.delta)
    if config.privacy.seed == "run":
        found.append(
            "the noise can be recomputed from the seed in config.toml, so epsilon holds only against readers who do "
            'not know that seed (privacy.seed = "secret" draws one that is not stored)'
        )
    if {each.kind for each in account.mechanisms} & {"gaussian", "correlated", "local"}:
        found.append(
            "the noise is added in floating point, whose lowest bits can reveal the sum (Mironov 2012): use "
            "discrete_gaussian or skellam to avoid this"
        )
    if (start := getattr(config, "start", None)) and start.run:  # a program's settings have none
        found.append(f"what the run in {start.run} has spent is not in epsilon: of clients of both, the two add up")
    if config.evaluation.patience:
        select = config.evaluation.select
        found.append(f"evaluation.patience stops the run by {select}, without noise: when it stops is not covered")
    return found


def privacy_record(config: Any, account: accountant.PrivacyAccount, rounds: int) -> dict[str, Any]:
    """The final figure of a run and all that it rests on; see `jaxfed privacy spent`."""
    mechanisms, sampling, delta, how, relation = account
    if not mechanisms:
        return {"epsilon": None, "delta": None, "privacy": None}
    found = accountant.compute_spent(mechanisms, sampling, rounds, delta, how, relation)
    more = [each for each in privacy_cautions(config, account, rounds) if each not in found.note]
    found = found._replace(note="; ".join([found.note, *more]))
    record = accountant.spent_to_dict(mechanisms, sampling, rounds, found)
    return {"epsilon": found.epsilon, "delta": delta, "privacy": record}


def summarize(session: Session, log_row: Callable[[dict[str, Any]], None] = lambda row: None) -> dict[str, Any]:
    """Tests the best model once and sums the run up.

    log_row: is told the figures of the test.
    """
    settings, parts, progress = session.settings, session.parts, session.progress
    key = make_run_keys(settings.seed).evaluation
    with time_stage(progress.stages, "evaluate"):
        test = evaluate_model(parts, session.best, "test", key)
        val = evaluate_model(parts, session.best, "val", key)
    if caution := worse_than_the_mean(parts.data.population.labels, val):
        log(caution)
    select = settings.evaluation.select
    last = progress.round, session.last_value
    if caution := describe_decline(select, (progress.best_round, progress.best_value), last):
        log("LEAKY: " * parts.leaky + caution)
    log_row(mark_leaky(parts, {"round": progress.best_round, **test}))
    summary = {
        "rounds": progress.round,
        "best_round": progress.best_round,
        "extended": progress.extended,
        **({"past_its_best": caution} if caution else {}),
        "seconds": round(progress.seconds, 3),
        "compile_seconds": round(progress.compile_seconds, 3),
        **progress.spent(),
        "client_updates_per_second": round(progress.updates / max(progress.seconds, 1e-9), 1),
        "peak_memory_mb": round(peak_megabytes(), 1),
        **bytes_per_client(progress),
        **progress.totals(),
        **({"bytes_frozen": parts.wire.frozen} if parts.wire.frozen else {}),
        "server_sees": parts.wire.sees,
        **privacy_record(settings, parts.account, progress.round),
        "params_sha256": params_digest(session),
        "data_sha256": parts.data.digest,
        **evaluation_facts(parts, settings.evaluation),
        **count_negatives(parts.eval_splits["test"]),
        **val,
        **test,
    }
    return mark_leaky(parts, summary)


def bytes_per_client(progress: Progress) -> dict[str, int]:
    """What a client sent and was sent in a round, in bytes, on average."""
    return {
        "bytes_up_per_client": round(progress.bytes_up / max(progress.updates, 1)),
        "bytes_down_per_client": round(progress.bytes_down / max(progress.asked, 1)),
    }


def params_digest(session: Session) -> str:
    """SHA-256 of the model and the clients' private parts as they stand."""
    return tree_digest(jax.tree.map(np.asarray, scored_model(session.parts, session.state)))
