"""Pruned weights: on schedule, the same for all, zero wherever they could show; without any, nothing changes."""

import signal
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfed.config.build import build_from_config, load_data
from jaxfed.config.schema import make_config
from jaxfed.core.pruning import Pruning, count_kept, find_masks, mark_largest, prune_params
from jaxfed.models.pruned import pruned_weights
from jaxfed.training.loop import train_run
from jaxfed.training.rounds import Progress, initial_arrays, make_run_keys, prepare_round
from tests.small import close

DATA = {"name": "synthetic", "users": 8, "items": 20, "mean_length": 5.0}
CONTENT = load_data(make_config({"data": DATA}).data)
MADE = {"name": "pruned", "sparsity": 0.5, "start": 1, "end": 6, "every": 2}
SASREC = {"name": "sasrec", "dim": 4, "length": 6, "blocks": 1, "dropout": 0.0}
NEUMF = {"name": "neumf", "dim": 4}
CENTRAL = {"algorithm": {"name": "central"}, "work": {"negatives": 6}, "channel": []}
LOCAL = {"batch_size": 8, "optimizer": {"name": "adam", "learning_rate": 0.05, "weight_decay": 0.1}}


def table(model=SASREC, parametrization=MADE, **more):
    plain = {"batch_size": 8, "optimizer": {"name": "sgd", "learning_rate": 0.1}}
    return {
        "rounds": 8,
        "data": DATA,
        "model": model,
        "work": {"name": "gradient", "negatives": 6} | plain,
        "channel": [{"name": "weighted_mean"}],
        "server": {"name": "adam", "learning_rate": 0.02, "lazy": False},
        "cohort": {"name": "everyone", "dropout": 0.2},
        **({"parametrization": parametrization} if parametrization else {}),
    } | more


def build(*args, **more):
    return build_from_config(make_config(table(*args, **more)), CONTENT)


def states_of(it, rounds):
    """The server's model before each round, and what was booked."""
    state, booked, seen = initial_arrays(it, 0)["state"], Progress(), []
    for t in range(rounds):
        seen.append(jax.tree.map(np.array, state.shared.params))
        ready = prepare_round(it, 0, t)
        booked.count_request(ready)
        state, info = it.algorithm.step(state, ready.cohort, make_run_keys(0).rounds)
        booked.record_round(it.wire, info | {"clients/ids": ready.cohort.ids, "round": t})
    return [*seen, jax.tree.map(np.array, state.shared.params)], booked


def test_counts_are_those_of_the_cubic_schedule():
    """16 weights, half of them pruned from round 1 to 6 in steps of 2: before rounds 3, 5 and 6."""
    pruning = Pruning(("w",), 0.5, 1, 6, 2)
    shares = [0.5 * (1 - (1 - done / 5) ** 3) for done in (2, 4, 5)]
    assert count_kept(pruning, 16).tolist() == [16, *(16 - int(16 * share) for share in shares)]
    assert count_kept(pruning, 16)[-1] == 8
    assert count_kept(pruning._replace(start=6), 16).tolist() == [16, 8]


def test_the_smallest_go_first_and_stay_away():
    """By hand. A kept weight that the optimiser sets to zero exactly is kept; one that was pruned is not moved."""
    pruning = Pruning(("w",), 0.5, 0, 2, 1)
    start = {"w": jnp.array([3.0, -1.0, 2.0, -4.0]), "b": jnp.zeros(1)}
    moved = {"w": jnp.array([0.0, -1.5, 2.5, -4.0]), "b": jnp.zeros(1)}
    first = prune_params(pruning, start, moved, jnp.int32(1))  # 1/2 (1 - 1/8) of 4: one goes
    assert (first["w"] != 0).tolist() == [False, True, True, True]
    again = {"w": jnp.array([9.0, -1.0, 0.0, -4.0]), "b": jnp.ones(1)}
    second = prune_params(pruning, first, again, jnp.int32(2))
    assert second["w"].tolist() == [0.0, -1.0, 0.0, -4.0]
    third = prune_params(pruning, second, {"w": jnp.array([1.0, 0.0, 1.0, -4.0]), "b": jnp.ones(1)}, jnp.int32(3))
    assert (third["w"] != 0).tolist() == [False, True, False, True]
    assert mark_largest(jnp.array([1.0, 1.0, -1.0]), 2).sum() == 2


@pytest.mark.parametrize(
    ("model", "more"),
    [
        (NEUMF, {"algorithm": {"name": "scaffold"}, "work": LOCAL, "channel": [{"name": "per_row_mean"}]}),
        (SASREC, {"channel": [{"name": "mean", "count": 8}, {"name": "clip"}, {"name": "gaussian"}]}),
    ],
    ids=["control_variates", "noise"],
)
def test_each_leaf_is_as_sparse_as_the_schedule_says(model, more):
    """And a weight that is zero once is never anything else, whatever the optimiser, or noise, adds to it."""
    it = build(model, **more)
    pruning = it.method.parametrization.pruning
    models, _ = states_of(it, 8)
    masks = [find_masks(pruning, each) for each in models]
    assert len(masks[0]) == len(pruning.paths) > 2
    level = [0, 0, 0, 1, 1, 2, 3, 3, 3]
    for name in pruning.paths:
        kept = [int(each[name].sum()) for each in masks]
        assert kept == [int(count_kept(pruning, masks[0][name].size)[at]) for at in level]
        for before, after in pairwise(masks):
            assert not (np.asarray(after[name]) & ~np.asarray(before[name])).any()


def test_what_a_client_sends_is_zero_where_weights_are_pruned():
    """Local steps with momentum and decay; the same masks for all, as all read one model."""
    sent = []

    def watch(channel):
        def encode(update, received, client):
            message, kept = channel.encode(update, received, client)
            jax.debug.callback(lambda *x: sent.append(x), update.params["params"])
            return message, kept

        return channel._replace(encode=encode)

    work = {"name": "local_steps", "negatives": 6, "epochs": 2} | LOCAL
    it = build_from_config(make_config(table(work=work, parametrization=MADE | {"start": 0, "end": 1})), CONTENT, watch)
    state = initial_arrays(it, 0)["state"]
    for t in range(2):
        sent.clear()
        masks = find_masks(it.method.parametrization.pruning, state.shared.params)
        ready = prepare_round(it, 0, t)
        masks = {name: np.array(x) for name, x in masks.items()}
        state, _ = it.algorithm.step(state, ready.cohort, make_run_keys(0).rounds)
        jax.effects_barrier()
        assert len(sent) >= 8
        for (update,) in sent:
            for name, mask in masks.items():
                leaf = update
                for key in name.split("/")[1:]:
                    leaf = leaf[key]
                assert not np.asarray(leaf)[~mask].any()
                assert t == 0 or mask.sum() == mask.size / 2
        assert any(np.asarray(leaf).any() for leaf in jax.tree.leaves(sent))


@pytest.mark.parametrize("central", [False, True])
def test_no_sparsity_is_the_run_without(central):
    more = CENTRAL if central else {}
    (got, _), (want, _) = (states_of(build(SASREC, made, **more), 3) for made in (MADE | {"sparsity": 0.0}, None))
    close(got, want, atol=1e-7)


def test_central_training_prunes_by_the_same_schedule():
    it = build(**CENTRAL)
    model = states_of(it, 7)[0][-1]
    assert all(mask.sum() == mask.size / 2 for mask in find_masks(it.method.parametrization.pruning, model).values())


def test_bytes_are_those_of_what_is_kept():
    """Six kernels of 16 weights, half of them pruned from round 6 on, then with a bit for each weight down."""
    it, plain = build(), build(parametrization=None)
    rows = np.array([1, 5, 20])
    for name, masks in (("up", 0), ("down", 6 * 2)):
        whole = getattr(plain.wire, name)(rows)
        np.testing.assert_array_equal(getattr(it.wire.in_round(2), name)(rows), whole)
        np.testing.assert_array_equal(getattr(it.wire.in_round(6), name)(rows), whole - 6 * 8 * 4 + masks)
    codes = [
        build(parametrization=made, channel=[{"name": "weighted_mean"}, {"name": "quantize"}]) for made in (MADE, None)
    ]
    saved = codes[1].wire.up(rows) - codes[0].wire.in_round(7).up(rows)
    assert (saved == 6 * 8).all()  # a byte a weight
    booked, whole = (states_of(each, 8)[1] for each in (it, plain))
    reports = [booked.updates, whole.updates]
    assert reports[0] == reports[1]
    assert 0 < whole.bytes_up - booked.bytes_up < booked.updates * 6 * 8 * 4


class StopAfter:
    """A logger that stops the run as the operating system would."""

    def __init__(self, round):
        self.round = round

    def log_row(self, row):
        if row["round"] == self.round:
            signal.raise_signal(signal.SIGTERM)

    def close(self):
        pass


def test_a_run_goes_on_in_the_middle_of_the_schedule(tmp_path):
    """The best round is one in which pruning is finished."""

    def run(name, resume=False, loggers=()):
        config = table() | {"run": {"out": str(tmp_path / name)}, "evaluation": {"every": 2}}
        return train_run(make_config(config), resume, load=lambda _: CONTENT, loggers=loggers)

    whole = run("whole")
    with pytest.raises(SystemExit):
        run("cut", loggers=[StopAfter(4)])
    resumed = run("cut", True)
    assert whole["best_round"] in (6, 8)
    assert resumed["params_sha256"] == whole["params_sha256"]
    assert resumed["bytes_up_total"] == whole["bytes_up_total"]


@pytest.mark.parametrize(
    ("made", "more", "said"),
    [
        ({"sparsity": 1.0}, {}, "parametrization.sparsity is 1: it must be from 0 to below 1"),
        ({"start": 5, "end": 4}, {}, "parametrization.end is 4: it must be at least 5"),
        ({}, {"rounds": 5}, "parametrization.end is 6 and rounds is 5: pruning would not be finished"),
        ({"every": 0}, {}, "parametrization.every is 0: it must be at least 1"),
        ({"pattern": "("}, {}, "is no regular expression"),
        ({"pattern": "none"}, {}, 'pattern "none" is in the path of no dense leaf: there are params/'),
        ({}, {"channel": [{"name": "mean"}, {"name": "rotate"}]}, "pruned: rotate mixes or chooses"),
        ({}, {"channel": [{"name": "median"}]}, "pruned: median mixes or chooses"),
        ({}, {"download": [{"name": "quantize"}]}, r"leave \[\[download\]\] out"),
    ],
)
def test_what_cannot_be_is_one_line(made, more, said):
    with pytest.raises(ValueError, match=said) as error:
        build(SASREC, MADE | made, **more)
    assert "\n" not in str(error.value)


def test_a_model_of_tables_alone_has_nothing_to_prune():
    with pytest.raises(ValueError, match="the model has tables alone"):
        pruned_weights(build({"name": "mf", "dim": 4}, None, work={"batch_size": 8}).model)
