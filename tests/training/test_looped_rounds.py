"""Programs of many rounds: they are those that the host starts one by one; where they end; what is refused."""

import json
import re
import sys
from functools import partial
from types import SimpleNamespace

import chex
import jax
import numpy as np
import pytest

from jaxfed.cli import main
from jaxfed.config import round_stages
from jaxfed.config.build import build_from_config, load_data
from jaxfed.config.round_stages import build_loop
from jaxfed.config.schema import make_config
from jaxfed.core import round_loop
from jaxfed.data.clients import make_clients
from jaxfed.data.device_cohorts import make_drawer
from jaxfed.data.device_rounds import choose_room, drop_finer_kinds, plan_device_round
from jaxfed.data.population import ProcessShare
from jaxfed.data.sources.synthetic import synthetic_data
from jaxfed.training import looped_rounds
from jaxfed.training.looped_rounds import compile_loop, find_stop, plan_rounds, run_looped_rounds
from jaxfed.training.rounds import initial_arrays, make_run_keys, run_rounds

TABLE = {
    "data": {"name": "synthetic", "users": 60, "items": 900, "mean_length": 12.0},
    "model": {"name": "mf", "dim": 4},
    "work": {"draw_on": "device", "batch_size": 128, "optimizer": {"name": "sgd", "learning_rate": 0.5}},
    "cohort": {"size": 6},
    "run": {"rounds_per_program": 4},
}
# normalised vectors of four numbers, and large steps, would make rounding grow a thousandfold in six rounds
HISTORIES = {"name": "sasrec", "length": 10, "dim": 16}
SLOW = {"name": "sgd", "learning_rate": 0.05}
CASES = {
    "fedavg": {},
    "all rows": {"server": {"lazy": False}},
    "several epochs of adam": {"work": {"epochs": 3, "optimizer": {"name": "adam", "learning_rate": 0.01}}},
    "gradient": {"work": {"name": "gradient", "optimizer": {"name": "sgd", "learning_rate": 1.0}}},
    "drop-outs": {
        "cohort": {"name": "poisson", "size": 12, "dropout": 0.4},
        "server": {"name": "adam", "learning_rate": 0.01},
    },
    "everyone": {"cohort": {"name": "everyone", "size": None}},
    "late clients": {"cohort": {"name": "buffered", "size": 6, "concurrency": 12}, "clock": {"name": "lognormal"}},
    "private": {
        "channel": [
            {"name": "mean", "count": 12},
            {"name": "clip", "bound": 0.1},
            {"name": "gaussian", "multiplier": 0.1},
        ],
    },
    "coded": {"channel": [{"name": "quantize", "bits": 4}, {"name": "mean"}]},
    "secure sums": {"channel": [{"name": "clip", "bound": 1.0}, {"name": "ring", "bound": 1.0}]},
    "memory of links": {"channel": [{"name": "top_k", "share": 0.1, "keep_error": True}, {"name": "mean"}]},
    "clients keep a control variate": {"algorithm": {"name": "scaffold"}},
    "clients keep a model": {"algorithm": {"name": "ditto"}},
    "codes of the download": {"download": [{"name": "quantize", "bits": 8}]},
    "sub-models": {"algorithm": {"name": "heterofl"}, "channel": []},
    "pruned": {"model": {"name": "neumf"}, "parametrization": {"name": "pruned", "start": 1, "end": 5, "every": 2}},
    "chunks": {"run": {"chunk": 1}},
    "divided tables": {
        "run": {"devices": 4, "shard_tables": True},
        "server": {"lazy": False},
        "channel": [{"name": "clip", "bound": 1.0}, {"name": "ring", "bound": 1.0, "union": True}],
    },
    "frozen rows": {"work": {"freeze": ["tables/item"]}},
    "histories": {"model": HISTORIES, "work": {"negatives": 20, "epochs": 2, "optimizer": SLOW}},
    "histories with the same negatives": {
        "model": HISTORIES,
        "work": {"negatives": 12, "shared_negatives": True, "optimizer": SLOW},
        "cohort": {"name": "poisson", "size": 12, "dropout": 0.4},
    },
    "pairs": {"model": {"loss": "bpr"}, "work": {"epochs": 2, "optimizer": {"name": "adam", "learning_rate": 0.01}}},
    "features and flipped labels": {
        "data": {"malicious": 0.3, "label_flip": True},
        "model": {"name": "fm"},
        "work": {"optimizer": SLOW},
    },
    "popular negatives": {"work": {"negative_sampling": "popularity", "negatives": 9, "epochs": 2}},
    "histories with popular negatives": {
        "model": HISTORIES | {"loss": "bce"},
        "work": {"negative_sampling": "popularity", "negatives": 20, "optimizer": SLOW},
    },
    "negatives of the batch": {
        "data": {"clients": "silo", "silos": 9},
        "work": {"negative_sampling": "in_batch", "epochs": 2},
    },
    "histories with negatives of the batch": {
        "data": {"clients": "silo", "silos": 9},
        "model": HISTORIES | {"loss": "bce"},
        "work": {"negative_sampling": "in_batch", "batch_size": 3, "optimizer": SLOW},
    },
    "labels": {"data": {"label": "rating"}, "model": {"loss": "squared"}, "work": {"negatives": 0}},
    "several users": {"data": {"clients": "silo", "silos": 9}, "work": {"epochs": 2}},
    "pairs of several users": {"data": {"clients": "silo", "silos": 9}, "model": {"loss": "bpr"}},
    "histories of several users": {
        "data": {"clients": "silo", "silos": 9},
        "model": HISTORIES,
        "work": {"batch_size": 3, "negatives": 20, "epochs": 2, "optimizer": SLOW},
    },
}


def make_parts(**tables):
    """The parts of a run, of `TABLE` with other entries."""
    lists = {name: tables[name] for name in ("channel", "download") if name in tables}
    table = {name: {**TABLE.get(name, {}), **tables.get(name, {})} for name in {*TABLE, *tables} - {*lists}}
    table = {name: {key: x for key, x in section.items() if x is not None} for name, section in table.items()}
    config = make_config(table | lists)
    return build_from_config(config, make_rated_clients() if config.data.label == "rating" else load_data(config.data))


def make_rated_clients():
    """Clients whose rows have ratings from 1 to 5."""
    source = synthetic_data(60, 50, mean_length=12)
    ratings = np.random.default_rng(0).integers(1, 6, len(source.interactions.user)).astype(np.float32)
    return make_clients(source._replace(interactions=source.interactions._replace(rating=ratings)), label="rating")


def run_both(parts, rounds, seed=0, periods=()):
    """[(state, [(figures, what was counted) of each round])] of rounds as programs, and one by one."""
    key, found = make_run_keys(seed).rounds, []
    for run in (
        partial(run_looped_rounds, rounds=range(rounds), key=key, periods=periods),
        partial(run_rounds, start=0, stop=rounds),
    ):
        state, records = initial_arrays(parts, seed)["state"], []
        for done in run(parts, state, seed):
            state, ready = done.state, done.ready
            counted = ready.asked, ready.rows, ready.bytes_down, ready.time, np.asarray(ready.cohort.ids).tolist()
            records.append((jax.device_get(done.info), counted, done.ends_program))
        found.append((jax.device_get(state), records))
    return found


@pytest.mark.parametrize("case", CASES)
def test_rounds_of_a_program_are_those_one_by_one(case):
    """Up to rounding: a program of many rounds adds in another order."""
    looped, single = run_both(make_parts(**CASES[case]), 6)
    start = jax.device_get(initial_arrays(make_parts(**CASES[case]), 0)["state"])
    moved = zip(*map(jax.tree.leaves, (start.shared.params, single[0].shared.params)), strict=True)
    assert max(np.abs(one - other).max() for one, other in moved) > 1e-3
    chex.assert_trees_all_close(looped[0], single[0], atol=1e-5, rtol=1e-4)
    assert [last for _, _, last in looped[1]] == [False, False, False, True, False, True]
    for (info, counted, _), (info_single, counted_single, _) in zip(looped[1], single[1], strict=True):
        assert counted == counted_single
        assert info.keys() == info_single.keys()
        for name in info:
            np.testing.assert_allclose(info[name], info_single[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_cohort_holds_some_rows_of_the_catalogue():
    """Else the law above would not see rows that lie elsewhere among those of the cohort."""
    parts = make_parts()
    looped, _ = run_both(parts, 3)
    assert 1 < max(counted[1] for _, counted, _ in looped[1]) < parts.data.num_items


def test_frozen_rows_are_no_part_of_the_program():
    parts = make_parts(work={"freeze": ["tables/item"]})
    state, plan = initial_arrays(parts, 0)["state"], plan_rounds(parts, 0, 0, 1)
    args = plan.room, state, parts.drawer.train_data(), plan.rounds, np.int32(1), make_run_keys(0).rounds
    frozen = parts.loop.program.keywords["frozen"]
    assert jax.tree.leaves(frozen.clients)
    text = parts.loop.program.func.lower(*args, frozen=frozen).as_text()
    assert not re.search(r"dense<[^>]{2000}", text)


def test_an_error_in_a_later_program_loses_no_round():
    parts = make_parts()

    def draw(seed, round):
        if round >= 6:
            raise ValueError("no clients")
        return parts.sampler.draw(seed, round)

    late = parts._replace(sampler=parts.sampler._replace(draw=draw))
    rounds = run_looped_rounds(late, initial_arrays(late, 0)["state"], 0, range(8), make_run_keys(0).rounds, ())
    assert len([next(rounds) for _ in range(4)]) == 4
    with pytest.raises(ValueError, match="no clients"):
        next(rounds)


def test_a_plan_is_no_longer_than_memory_allows(monkeypatch):
    longest = {"rounds_per_program": 10**6, "checkpoint_every": 10**6}
    assert make_parts(run=longest, evaluation={"every": 5}).loop.length == 5
    length = make_parts(run=longest, evaluation={"every": 10**6}).loop.length
    assert length == round_stages.PLAN_BYTES // (6 * round_stages.BYTES_OF_SLOT)


def test_programs_end_where_the_host_is_asked():
    assert find_stop(0, 100, 20, (10, 25)) == 10
    assert find_stop(20, 100, 20, (10, 25)) == 25
    assert find_stop(25, 100, 3, (10, 25)) == 28
    assert find_stop(90, 97, 20, (10, 25)) == 97


def test_one_program_serves_any_number_of_rounds(monkeypatch):
    """And its round is traced once, which takes seconds."""
    traced, run = [], round_loop.run_planned_round
    monkeypatch.setattr(round_loop, "run_planned_round", lambda *args: (traced.append(1), run(*args))[1])
    parts = make_parts()
    compile_loop(parts, initial_arrays(parts, 0)["state"], make_run_keys(0).rounds)
    run_both(parts, 7, periods=(3, 5))
    assert parts.loop.program.func._cache_size() == len(traced) == 1


def test_clients_of_a_block_are_divided_among_devices():
    parts = make_parts(run={"devices": 4})
    plan, state = plan_rounds(parts, 0, 0, 1), jax.eval_shape(lambda: initial_arrays(parts, 0))["state"]
    args = state, parts.drawer.train_data(), plan.rounds, np.int32(1), make_run_keys(0).rounds
    text = jax.jit(lambda *args: parts.loop.program(plan.room, *args)).lower(*args).as_text()
    assert re.search(r'sharding_constraint.*<@mesh, \[{"clients"}', text)


def test_no_round_of_a_program_that_runs_none():
    parts = make_parts()
    plan, state = plan_rounds(parts, 0, 0, 1), initial_arrays(parts, 0)["state"]
    data, key = parts.drawer.train_data(), make_run_keys(0).rounds
    state, _ = parts.loop.program(plan.room, state, data, plan.rounds, np.int32(0), key)
    chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(initial_arrays(parts, 0)["state"]))


def test_a_cohort_that_holds_many_rows_has_room():
    """More rows than were expected: the room is doubled, and nothing is lost."""
    parts = make_parts(data={"items": 2000, "users": 200}, cohort={"size": 4})
    population, small = parts.data.population, parts.shapes._replace(room=16)
    loop = build_loop(parts.algorithm, 4, population, parts.batching, small)
    assert 16 < loop.room <= population.num_items
    parts = parts._replace(
        shapes=small, drawer=make_drawer(population, parts.batching, small), loop=loop._replace(room=16)
    )
    looped, single = run_both(parts, 4)
    rows = [counted[1] for _, counted, _ in looped[1]]
    assert min(rows) > 16
    room = choose_room(population, parts.batching, 16, [np.array(counted[-1]) for _, counted, _ in looped[1]])
    assert max(rows) <= room < 2 * population.num_items
    chex.assert_trees_all_close(looped[0], single[0], atol=1e-5, rtol=1e-4)


def test_empty_cohorts_move_nothing():
    parts = make_parts()
    slots = np.full(parts.sampler.slots, parts.data.num_clients)
    empty = parts._replace(sampler=parts.sampler._replace(draw=lambda *_: (slots, np.zeros(len(slots), bool))))
    before = jax.device_get(initial_arrays(parts, 0)["state"].shared)
    for state, _ in run_both(empty, 3):
        chex.assert_trees_all_equal(state.shared, before)


def test_every_block_of_a_plan_lies_within_its_places():
    """Cohorts of all sizes: each client lies in one block of its kind or a longer one."""
    parts = make_parts(**CASES["everyone"])
    population, shapes = parts.data.population, parts.shapes
    for size in (0, 1, 2, 7, 31, 60):
        ids = np.full(shapes.slots, population.num_clients)
        ids[:size] = np.random.default_rng(size).permutation(60)[:size]
        planned = plan_device_round(population, parts.batching, shapes, ids, ids < 60, None, 0, 0)
        widths = [shapes.clients(steps) for steps, _ in reversed(shapes.kinds)]
        used, slots = int((planned.blocks_per_kind * widths).sum()), planned.draw_inputs.slots
        assert used <= len(slots)
        assert sorted(slots[slots < len(ids)].tolist()) == np.flatnonzero(ids < 60).tolist()
        assert (slots[used:] == len(ids)).all()


def test_a_program_has_fewer_kinds_of_blocks():
    shapes = make_parts().shapes._replace(kinds=((1, 8), (1, 64), (2, 64), (3, 64), (4, 64), (6, 64)))
    assert drop_finer_kinds(shapes).kinds == ((1, 8), (1, 64), (2, 64), (4, 64), (6, 64))
    three_epochs = shapes._replace(kinds=((3, 8), (3, 64), (4, 64), (6, 64), (8, 64)))
    assert drop_finer_kinds(three_epochs).kinds == ((3, 8), (4, 64), (8, 64))


# --- as a user runs it ------------------------------------------------------------------------------------


@pytest.fixture
def program(monkeypatch, tmp_path):
    """Trains in this process; returns the summary, and the rows of its evaluations but for seconds."""

    def call(out, rounds, together, *more):
        words = "--rounds", rounds, "--evaluation.every", 3, "--run.checkpoint-every", 4, "--cohort.size", 24
        words = *words, "--work.draw-on", "device", "--run.rounds-per-program", together, *more
        monkeypatch.setattr(
            sys, "argv", ["jaxfed", "train", "synthetic_1k", "--out", str(tmp_path / out), *map(str, words)]
        )
        monkeypatch.setattr(main, "set_up_process", lambda: None)
        main.main()
        rows = [json.loads(line) for line in (tmp_path / out / "metrics.jsonl").read_text().splitlines()]
        rows = [{name: value for name, value in row.items() if not name.startswith("seconds")} for row in rows]
        return json.loads((tmp_path / out / "summary.json").read_text()), rows

    return call


def test_a_run_in_programs_goes_on_where_it_was_and_is_that_one_by_one(program, capsys):
    five, rows = program("five", 8, 5)
    assert "8 rounds ran as 4 programs" in "".join(capsys.readouterr())  # after rounds 3, 4, 6 and 8
    program("resumed", 4, 5)
    assert program("resumed", 8, 5, "--resume")[0]["params_sha256"] == five["params_sha256"]
    program("other", 4, 1)
    others = program("single", 8, 1), program("all", 8, 1000), program("other", 8, 5, "--resume")
    others = *others, program("eight", 8, 5, "--run.devices", 8)
    for summary, other_rows in others:
        assert summary["bytes_up_total"] == five["bytes_up_total"]
        assert summary["bytes_down_total"] == five["bytes_down_total"]
        assert summary["test/full/mrr"] == pytest.approx(five["test/full/mrr"], rel=1e-3)  # sums in another order
        for row, other in zip(rows, other_rows, strict=True):
            assert row.keys() == other.keys()
            losses = [each.get("train/loss", 0.0) for each in (row, other)]
            assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_profile_has_whole_programs(program, tmp_path, monkeypatch):
    """It has the rounds of the second program, 4 to 6 of 8, and asks for nothing between them."""
    for part in ("start_trace", "stop_trace"):
        monkeypatch.setattr(jax.profiler, part, lambda *a, part=part, **k: told.append(part))
    told, one_by_one = [], looped_rounds.list_results
    monkeypatch.setattr(
        looped_rounds, "list_results", lambda *a: (told.append(int(a[1].start)) or each for each in one_by_one(*a))
    )
    program("run", 8, 3, "--run.profile", 2, "--run.checkpoint-every", 8)
    assert told == [0, 0, 0, "start_trace", 3, 3, 3, "stop_trace", 6, 6]


def test_a_finished_run_without_a_summary_is_evaluated(program, tmp_path):
    done, rows = program("run", 8, 5)
    (tmp_path / "run" / "summary.json").unlink()
    again, same_rows = program("run", 8, 5, "--resume")
    assert same_rows == rows
    assert again["test/full/mrr"] == done["test/full/mrr"]


@pytest.mark.parametrize(
    ("tables", "reason"),
    [
        ({"work": {"draw_on": "host"}}, 'set work.draw_on = "device" too'),
        ({"run": {"rounds_per_program": 0}}, "at least 1"),
        ({"run": {"rounds_per_program": 4, "client_store": "host"}}, "run.client_store"),
        ({"run": {"rounds_per_program": 4, "placement": "pmap"}}, "run.placement"),
        ({"channel": [{"name": "median"}]}, "a reduction of its own"),
        ({"algorithm": {"name": "gpfedrec"}}, "compares what each client sends"),
        ({"server": {"edges": 2}}, "no program of many rounds"),
        ({"data": {"clients": "device", "devices": 2}}, "no program of many rounds"),
    ],
)
def test_what_needs_the_host_is_refused(tables, reason):
    with pytest.raises(ValueError, match=reason):
        make_parts(**tables)


def test_data_that_the_device_cannot_draw_are_said_to_need_the_host(monkeypatch):
    monkeypatch.setattr(round_stages, "find_draw_problem", lambda *args: "they are too many")
    with pytest.raises(ValueError, match="they are too many.*set it to 1"):
        make_parts(work={"draw_on": "host"})


def test_several_processes_run_no_program_of_many_rounds():
    parts, run = make_parts(), make_config(TABLE).run
    pieces, shapes = SimpleNamespace(run=run, clients=parts.data), parts.shapes._replace(share=ProcessShare(0, 2))
    with pytest.raises(ValueError, match="there are several processes.*set it to 1"):
        round_stages.choose_loop(pieces, parts.algorithm, parts.batching, shapes, lambda method: method)
