"""The script that compares compressors: what it trains, what it writes, and the entropy of real messages."""

import importlib.util
import math
from pathlib import Path

import pytest

from jaxfed.config.schema import make_config
from jaxfed.training.loop import train_run

spec = importlib.util.spec_from_file_location("rate_quality", Path(__file__).parent.parent / "scripts/rate_quality.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

BASE = [{"name": "per_row_mean"}]


def test_every_method_is_a_configuration():
    made = script.methods(BASE, 32)
    assert len(made) > 20
    for name, sections in made.items():
        config = make_config(sections)
        assert [link.name for link in config.channel if link.name in ("per_row_mean",)] == ["per_row_mean"]
        assert bool(config.download) == name.startswith("download")
    assert "low_rank 32" not in made
    assert "low_rank 32" in script.methods(BASE, 64)


def figures(method, seed, ndcg, up, share=0.5):
    summary = dict.fromkeys(script.METRICS, 0.1) | {"test/full/ndcg@10": ndcg, "test/sampled/ndcg@10": 2 * ndcg}
    summary |= {"rounds": 2, "best_round": 2, "seconds": 1.0, "bytes_up_per_client": up, "bytes_down_per_client": 7}
    return script.row(method, seed, summary | {"server_sees": "update"}, share)


def test_relative_figures_are_those_of_the_same_seed(tmp_path):
    """By hand: .9 of .10 and .9 of .20 are both 10 % less, whatever the means are."""
    rows = [figures("none", 0, 0.10, 100), figures("none", 1, 0.20, 100)]
    rows += [figures("x", 0, 0.09, 50), figures("x", 1, 0.18, 50, None)]
    plain, x = script.summarised(rows)
    assert (plain["relative/full"], plain["relative/full_sd"]) == (0, 0)
    assert x["relative/full"] == pytest.approx(-10)
    assert x["relative/sampled_sd"] == pytest.approx(0, abs=1e-9)
    assert x["test/full/ndcg@10"] == pytest.approx(0.135)
    assert x["test/full/ndcg@10_sd"] == pytest.approx(0.09 / math.sqrt(2))
    assert (plain["entropy_bytes_up_per_client"], x["entropy_bytes_up_per_client"]) == (50, 25)
    text = script.markdown(script.summarised(rows))
    assert "| x | 0.1000 ± 0.0000 | 0.1350 ± 0.0636 |" in text
    assert len({line.count("|") for line in text.splitlines()}) == 1
    one = script.summarised(rows[:1])[0]
    assert math.isnan(one["test/full/ndcg@10_sd"])
    assert "±" not in script.markdown([one])
    pytest.importorskip("matplotlib")
    script.draw(script.summarised(rows), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_without_matplotlib_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    script.draw(script.summarised([figures("none", 0, 0.1, 9)]), tmp_path / "figure.png")
    assert "matplotlib is missing" in capsys.readouterr().out
    assert not (tmp_path / "figure.png").exists()


def test_the_entropy_of_messages_that_clients_of_a_run_send(tmp_path):
    """Floats cost what they are; of two bits, which say little, less is left; a sum that hides says nothing."""
    shares = {}
    for name, links in {
        "none": BASE,
        "coarse": [*BASE, {"name": "quantize", "bits": 2}],
        "ring": [{"name": "mean"}, {"name": "clip"}, {"name": "ring"}],
    }.items():
        table = {
            "rounds": 2,
            "data": {"name": "synthetic", "users": 20, "items": 30, "mean_length": 5.0},
            "model": {"dim": 4},
            "cohort": {"name": "everyone"},
            "channel": links,
            "run": {"out": str(tmp_path / name)},
        }
        train_run(make_config(table))
        shares[name] = script.coded_share(tmp_path / name, 5)
    assert shares["none"] == 1
    assert 0.5 < shares["coarse"] < 1
    assert shares["ring"] is None
