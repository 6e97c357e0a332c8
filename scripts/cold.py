"""What labels cost to predict, by how many train rows there are of the item or of the user.

    python scripts/cold.py runs/ml100k_fm_rating [runs/another ...]

For test rows of runs on ratings (RMSE) or clicks (log-loss), at their best rounds.
"""

import sys
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.cli.main import set_up_process
from jaxfed.evaluation.metrics import LABELLED, finalize_metric
from jaxfed.evaluation.split import user_feature_rows
from jaxfed.training.best_model import open_best_model

EDGES = (0, 1, 5, 20, 50, 100, 1 << 30)


def predicted(experiment, shared, private) -> np.ndarray:
    """float32 [U, N]: what every user is predicted to say of every item, one client after the other."""
    population, score = experiment.data.population, jax.jit(experiment.model.score)
    out = np.empty((len(population.user_names), population.num_items), np.float32)
    for user, client in enumerate(population.client_of):
        mine = jax.tree.map(lambda x, client=client: x[client], private)
        known = (
            (user_feature_rows(population, experiment.model.features, np.array(user)),)
            if experiment.model.features
            else ()
        )
        out[user] = score(shared, mine, np.int32(user - population.client_offsets[client]), *known)
    return out


def by_count(experiment, shared, private) -> dict[str, list[tuple[int, float]]]:
    """{item or user: [(test rows, their error)]} for the ranges of EDGES."""
    population = experiment.data.population
    test, labels = population.test, population.labels
    user = np.repeat(np.arange(len(test.counts)), test.counts)
    found, name = predicted(experiment, shared, private)[user, test.values], {"rating": "rmse", "click": "log_loss"}
    rows = {"item": np.bincount(population.train.values, minlength=population.num_items)[test.values]}
    rows["user"] = population.train.counts[user]

    def error(here):
        if not here.any():
            return 0, float("nan")
        mean = LABELLED[labels.kind](found[here], labels.test[here], jnp.ones(int(here.sum()), bool))[name[labels.kind]]
        return int(here.sum()), float(finalize_metric(name[labels.kind], mean.value))

    each = list(pairwise(EDGES))
    return {side: [error((low <= n) & (n < high)) for low, high in each] for side, n in rows.items()}


def main() -> None:
    """Prints a line a run and side."""
    set_up_process()
    print(" " * 40 + "".join(f"{f'{low}+':>16}" for low in EDGES[:-1]))
    for folder in sys.argv[1:]:
        experiment, _, best = open_best_model(folder)
        if experiment.data.population.labels is None:
            raise SystemExit(f"{folder}: rows have no labels: a run with data.label rating or click")
        for side, cells in by_count(experiment, *best).items():
            print(f"{folder[-34:] + ' ' + side:>40}" + "".join(f"{e:>9.4f} ({n:>4})" for n, e in cells), flush=True)


if __name__ == "__main__":
    main()
