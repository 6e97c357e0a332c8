"""What a run says of its differential privacy: every round in the log, whole in the summary and in the checkpoint."""

import json
import math
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxfed.cli.privacy import spent_command
from jaxfed.config.build import build_from_config, load_data
from jaxfed.config.schema import make_config
from jaxfed.core.types import Mechanism
from jaxfed.privacy import accountant
from jaxfed.privacy.releases import Sampling
from jaxfed.training import checkpoint
from jaxfed.training.loop import train_run
from jaxfed.training.rounds import initial_arrays, make_run_keys, prepare_round
from tests.training.test_run import TABLE

NOISED = [{"name": "mean", "count": 10}, {"name": "clip", "bound": 0.001}, {"name": "gaussian", "multiplier": 1.5}]
ASKED = {"name": "poisson", "size": 10, "dropout": 0.2}
DELTA = {"delta": 1e-3}


def table(out, **changes):
    return {**TABLE, "channel": NOISED, "cohort": ASKED, "privacy": DELTA, **changes, "run": {"out": str(out)}}


def rows_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def private(tmp_path_factory):
    out = tmp_path_factory.mktemp("ledger") / "a"
    return train_run(make_config(table(out))), out


def accounted(kind, method, rounds=4):
    """By hand: 40 clients, 10 expected, at most 10 + 6 sqrt(7.5) = 27 slots."""
    sampling = Sampling(kind, 40, 10, 27 if kind == "poisson" else 0)
    return accountant.compute_spent([Mechanism("gaussian", 1.5)], sampling, rounds, 1e-3, method).epsilon


def test_every_row_says_what_was_spent_until_then(private):
    summary, out = private
    rows = rows_of(out)
    assert [(row["round"], row["delta"]) for row in rows[:2]] == [(2, 1e-3), (4, 1e-3)]
    assert [row["epsilon"] for row in rows[:2]] == [
        pytest.approx(accounted("poisson", "rdp", rounds)) for rounds in (2, 4)
    ]
    assert all(row["server_sees"] == "update+rows" for row in rows[:2])
    assert summary["epsilon"] == pytest.approx(accounted("poisson", "pld"))
    assert summary["epsilon"] < rows[1]["epsilon"]
    assert summary["privacy"]["accountant"] == "pld"


def test_a_checkpoint_holds_the_ledger(private):
    config = make_config(table(private[1]))
    arrays = initial_arrays(build_from_config(config, load_data(config.data)), 0)
    with checkpoint.open_checkpoints(private[1] / "checkpoints", 2) as kept:
        _, meta, _ = checkpoint.restore_newest(kept, arrays, print, lambda meta: None)
    assert meta["privacy"] == {"epsilon": pytest.approx(accounted("poisson", "rdp")), "delta": 1e-3}


def test_the_run_can_be_explained(private):
    text = "\n".join(spent_command(str(private[1])))
    assert "each of 40 clients by itself with probability 0.25, at most 27 at a time" in text
    assert f"epsilon {private[0]['epsilon']:.4g} at delta 0.001" in text


def test_who_was_clipped_and_who_did_not_answer_is_counted(private):
    """So small a bound clips everybody who reports; who was asked and did not report was dropped."""
    summary, out = private
    experiment = build_from_config(config := make_config(table(out)), load_data(config.data))
    drawn = [prepare_round(experiment, 0, t) for t in range(4)]
    reported = sum(int(ready.cohort.present.sum()) for ready in drawn)
    asked = sum(ready.asked for ready in drawn)
    assert summary["clients/clipped_total"] == reported > 0
    assert summary["clients/dropped_total"] == asked - reported > 0
    assert summary["clients/refused_total"] == 0
    assert rows_of(out)[1]["clients/clipped_total"] == reported


def test_a_run_without_noise_claims_nothing(tmp_path):
    summary = train_run(make_config({**TABLE, "run": {"out": str(tmp_path / "n")}}))
    assert summary["epsilon"] is summary["delta"] is summary["privacy"] is None
    assert rows_of(tmp_path / "n")[0]["epsilon"] is None
    json.loads((tmp_path / "n" / "summary.json").read_text(), parse_constant=pytest.fail)


def test_the_seed_and_floats_are_named_where_they_weaken_the_guarantee(private):
    text = "\n".join(spent_command(str(private[1])))
    assert "the noise can be recomputed from the seed in config.toml" in text
    assert "the noise is added in floating point, whose lowest bits" in text
    assert "not covered train/loss, clip/clients" in text


def test_a_secret_seed_is_in_no_file_and_decides_the_noise(tmp_path, monkeypatch, private):
    """With correlated noise, of which a state keeps what later rounds take back: a checkpoint holds none of it."""
    secret = 6_148_914_691_236_517_205
    monkeypatch.setattr("secrets.randbits", lambda bits: secret)
    links = [*NOISED[:2], {"name": "correlated", "kind": "tree"}]
    changes = {"channel": links, "cohort": {"name": "everyone"}, "privacy": DELTA | {"seed": "secret"}}
    config = make_config(table(tmp_path / "a", **changes))
    first = train_run(config)
    for file in (path for path in (tmp_path / "a").rglob("*") if path.is_file()):
        content = file.read_bytes()
        for form in (str(secret).encode(), f"{secret:x}".encode(), secret.to_bytes(8, "little"), secret.to_bytes(8)):
            assert form not in content
    arrays = initial_arrays(build_from_config(config, load_data(config.data)), 0)
    with checkpoint.open_checkpoints(tmp_path / "a" / "checkpoints", 2) as kept:
        state = checkpoint.restore_newest(kept, arrays, print)[0]["state"]
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(state.channel))
    monkeypatch.setattr("secrets.randbits", lambda bits: secret ^ (1 << 62))  # the upper bits count too
    assert train_run(make_config(table(tmp_path / "b", **changes)))["params_sha256"] != first["params_sha256"]
    text = "\n".join(spent_command(str(tmp_path / "a")))
    assert "follow from the seed" not in text
    evaluated = {"where": "clients", "channel": links}
    with pytest.raises(ValueError, match=r"evaluation\.channel: its noise would come from the seed that config"):
        train_run(make_config(table(tmp_path / "c", **changes, evaluation={**TABLE["evaluation"], **evaluated})))


def test_a_run_whose_seed_is_gone_does_not_go_on(tmp_path, monkeypatch):
    config = make_config(table(tmp_path / "a", privacy=DELTA | {"seed": "secret"}))
    monkeypatch.setattr(
        "jaxfed.training.loop.summarize", lambda *_: 1 / 0
    )  # all rounds are done, and nothing sums them up
    with pytest.raises(ZeroDivisionError):
        train_run(config)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="the secret seed is not stored, so this run cannot be resumed"):
        train_run(config, resume=True)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_all_bits_of_a_seed_count():
    seeds = (0, 1, 1 << 32, (1 << 32) + 1, (1 << 63) - 1, (1 << 62) - 1)
    assert len({np.asarray(jax.random.key_data(make_run_keys(seed).rounds)).tobytes() for seed in seeds}) == len(seeds)


def test_stopping_early_by_a_figure_without_noise_is_said_and_stored(tmp_path, capsys):
    summary = train_run(make_config(table(tmp_path / "p", evaluation={"every": 2, "patience": 1})))
    assert "evaluation.patience stops the run by val/full/ndcg@10, without noise" in summary["privacy"]["note"]
    assert "privacy: evaluation.patience" in capsys.readouterr().err


def test_a_delta_that_would_allow_to_publish_a_client_is_said(tmp_path, capsys):
    summary = train_run(make_config(table(tmp_path / "d", privacy={"delta": 0.03})))
    assert "delta 0.03 is not below 1/40" in summary["privacy"]["note"]
    assert "delta 0.03 is not below 1/40" in capsys.readouterr().err


@pytest.mark.parametrize("delta", [0.0, 1.0])
def test_a_delta_that_is_none(tmp_path, delta):
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        train_run(make_config(table(tmp_path / "x", privacy={"delta": delta})))


@pytest.mark.parametrize("kind", ["poisson", "uniform", "cyclic", "everyone"])
def test_only_what_a_sampler_earns_is_claimed(kind):
    """Poisson cohorts are amplified and nothing is doubled; the others of that size spend more."""
    size = {} if kind == "everyone" else {"size": 10}
    config = make_config({
        "data": TABLE["data"], "channel": NOISED, "privacy": DELTA, "cohort": {"name": kind, **size},
    })  # fmt: skip
    made = build_from_config(config, load_data(config.data))
    known = {"uniform": "fixed"}.get(kind, kind)
    assert made.account.sampling == (known, 40, size.get("size", 40), 27 if kind == "poisson" else 0)
    best = accounted("poisson", "rdp")
    assert made.epsilon(4) == pytest.approx(best) if kind == "poisson" else math.inf > made.epsilon(4) > 1.05 * best


@pytest.mark.parametrize("kind", ["central", "distributed", "dp-ftrl", "local"])
def test_the_table_of_epsilons_trains_with_the_noise_of_its_epsilon(kind):
    """scripts/privacy_quality.py: the chain it makes for an epsilon spends that, by the run's own account."""
    script = runpy.run_path(str(Path(__file__).parents[2] / "scripts/privacy_quality.py"))
    cohort = {"name": script["KINDS"][kind][1], "size": 10}
    table = {"rounds": 8, "data": TABLE["data"], "privacy": DELTA | {"accountant": "rdp"}, "cohort": cohort}
    multiplier = script["noise"](kind, 8.0, make_config(table), 40, 0.5)
    config = make_config(table | {"channel": script["links"](kind, multiplier, 10, 0.5)})
    made = build_from_config(config, load_data(config.data))
    assert 7.9 < accountant.compute_spent(*made.account[:2], 8, *made.account[2:]).epsilon < 8.01
