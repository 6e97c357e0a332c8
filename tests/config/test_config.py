"""Configurations: strict, complete, and one line when wrong."""

import re
import tomllib
from pathlib import Path

import optax
import pytest

from jaxfed.config.config_files import config_differences, config_to_toml, read_config
from jaxfed.config.options import section_arguments
from jaxfed.config.overrides import override_config
from jaxfed.config.registry import REGISTRY
from jaxfed.config.schema import config_to_table, make_config
from jaxfed.config.sections import make_client_optimizer
from jaxfed.core.tables import Table

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))
SECTIONS = [(s, n) for s in ("data", "model", "work", "server", "cohort") for n in REGISTRY[s]]


@pytest.mark.parametrize(("section", "name"), SECTIONS)
def test_every_name_of_the_registry_has_a_section_that_comes_back(section, name):
    config = make_config({section: {"name": name}})
    again = make_config(tomllib.loads(config_to_toml(config)))
    assert config_to_table(again) == config_to_table(config)
    assert set(section_arguments(section, name)) <= set(
        config_to_table(config)[section]
    )  # every default is spelled out


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_configs_of_the_repository(path):
    config = make_config(read_config(path))
    assert config_to_table(make_config(tomllib.loads(config_to_toml(config)))) == config_to_table(config)
    table = read_config(path)  # which says itself what it rests on: a default that changes changes no result of ours
    assert "name" in table["work"]["optimizer"]
    assert "channel" in table
    assert table["cohort"]["name"] == "everyone" or "size" in table["cohort"]
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"jaxfed train configs/{path.name}" in line for line in header), "its command on top"
    figures = r"(HR@10|RMSE|log-loss) \.\d"
    assert any(re.search(figures, line) for line in header), "and the result it gave"


WRONG = [
    ({"modle": {}}, 'unknown key "modle"; did you mean "model"?'),
    ({"model": {"dmi": 3}}, 'unknown key "model.dmi"; did you mean "dim"?'),
    ({"work": {"optimizer": {"item": {"learning_rat": 3}}}}, 'work.optimizer.item.learning_rat"; did you mean'),
    ({"model": {"name": "nuemf"}}, 'no model "nuemf"; did you mean "neumf"?'),
    ({"server": {"name": "adma"}}, 'no server "adma"; did you mean "adam"?'),
    ({"channel": [{"name": "per_row"}]}, 'no channel "per_row"; did you mean "per_row_mean"?'),
    ({"channel": [{"by": "x"}]}, "a link needs a name"),
    ({"channel": {"name": "mean"}}, r"a list of links, each \[\[channel\]\]"),
    ({"model": {"dim": "x"}}, "model.dim: 'x' is not a whole number"),
    ({"model": {"dim": True}}, "model.dim: True is not a whole number"),
    ({"model": {"dim": 1.5}}, "model.dim: 1.5 is not a whole number"),
    ({"model": 3}, r"model: a section \[model\]"),
    ({"model": {"name": 3}}, "model.name: a name in quotes"),
    ({"run": {"placement": "tpu"}}, "run.placement: 'tpu' is none of 'jit', 'pmap'"),
    ({"rounds": 0}, "rounds is 0: it must be at least 1"),
    ({"evaluation": {"every": 0}}, "evaluation.every is 0"),
    ({"seed": -1}, "seed is -1"),
    ({"seed": "x"}, "seed: 'x' is not a whole number"),
    ({"evaluation": {"targets": "12"}}, r"evaluation.targets: '12' is no list: put it in brackets, \['12'\]"),
    ({"data": {"promoted": "50"}}, "data.promoted: '50' is no list"),
    ({"data": {"ratio": 0.1}}, r"data.ratio: 0.1 is no list: put it in brackets, \[0.1\]"),
    ({"clock": {"name": "constant", "awake": 0.5}}, r"clock.awake: 0.5 is no list"),
    ({"clock": {"name": "lognormal", "shares": 1}}, r"clock.shares: 1 is no list"),
    ({"model": {"name": "neumf", "hidden": 8}}, r"model.hidden: 8 is no list"),
    ({"channel": [{"name": "promote", "targets": "12"}]}, "channel.0.targets: '12' is no list"),
    ({"evaluation": {"targets": [12]}}, "evaluation.targets: 12 is not text in quotes"),
]


@pytest.mark.parametrize(("table", "words"), WRONG, ids=[words[:30] for _, words in WRONG])
def test_wrong_configurations_say_what_is_wrong(table, words):
    with pytest.raises(ValueError, match=words) as error:
        make_config(table)
    assert "\n" not in str(error.value)


def test_what_is_quoted_of_a_configuration_is_cut():
    for table in (
        {"seed": "x" * 10_000},
        {"data": {"ratio": [0.1] * 9999 + ["x"] * 9}},
        {"model": {"name": "x" * 10_000}},
    ):
        with pytest.raises(ValueError) as error:  # noqa: PT011  whatever it says
            make_config(table)
        assert len(str(error.value)) < 1_000


def test_a_byte_order_mark_is_no_part_of_a_configuration(tmp_path):
    (tmp_path / "a.toml").write_bytes("seed = 3\r\n".encode("utf-8-sig"))
    assert read_config(tmp_path / "a.toml") == {"seed": 3}


def test_files_that_are_no_configuration(tmp_path):
    with pytest.raises(ValueError, match="no such file, and no configuration of that name"):
        read_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = [")
    with pytest.raises(ValueError, match="not TOML"):
        read_config(tmp_path / "bad.toml")


def test_overrides():
    args = "--work.optimizer.item.learning-rate 40 --server.name=adam --server.b1 .5 --channel.0.by activity"
    config = override_config({}, [*args.split(), "--model.no-bias", "--data.ratio", ".2", ".1"])
    assert config.work.optimizer.item.learning_rate == 40
    assert config.work.optimizer.user.learning_rate is None
    assert (config.server.name, config.server.b1) == ("adam", 0.5)
    assert (config.channel[0].by, config.model.bias, config.data.ratio) == ("activity", False, (0.2, 0.1))


def test_another_name_keeps_what_still_fits():
    table = {"model": {"name": "mf", "dim": 7, "bias": False}, "channel": [{"name": "per_row_mean", "power": 0.5}]}
    config = override_config(
        table, ["--model.name", "neumf", "--channel.0.name", "mean", "--work.optimizer.name", "adam"]
    )
    assert (config.model.name, config.model.dim) == ("neumf", 7)
    assert config.channel[0].name == "mean"
    assert config.work.optimizer.name == "adam"


@pytest.mark.parametrize("words", ["--channel none --work.name none", "--work.name=none --channel=none"])
def test_none_leaves_links_and_work_out(words):
    table = {"work": {"name": "gradient", "negatives": 2}, "channel": [{"name": "mean"}, {"name": "zero_out"}]}
    config = override_config(table, [*words.split(), "--algorithm.name", "raflora", "--algorithm.ranks", "4"])
    assert (config.channel, config.work.negatives, config.algorithm.name) == ((), 2, "raflora")
    assert config.algorithm.ranks == (4,)
    begun_anew = override_config(table, ["--channel", "none", "--channel.0.name", "per_row_mean", "--rounds", "3"])
    assert [link.name for link in begun_anew.channel] == ["per_row_mean"]
    assert (begun_anew.work.name, begun_anew.rounds) == ("gradient", 3)


def test_a_name_after_the_last_link_is_one_more():
    args = "--channel.0.name fednova --channel.1.name weighted_mean --channel.1.by activity --download.0.name drive"
    table = {"channel": [{"name": "per_row_mean"}]}
    config = override_config(table, args.split())
    assert [each.name for each in config.channel] == ["fednova", "weighted_mean"]
    assert config.channel[1].by == "activity"
    assert [each.name for each in config.download] == ["drive"]
    assert len(override_config({}, args.split()).channel) == 2
    assert len(override_config({}, []).channel) == 1  # what a configuration has without being told is as it was


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--model.dmi", "3"], 'unknown option --model.dmi; did you mean "--model.dim"?'),
        (["--model.dim", "eight"], 'model.dim is "eight": it must be a whole number'),
        (["--work.optimizer.learning-rate", "fast"], 'work.optimizer.learning-rate is "fast": it must be a number'),
        (["--channel.name", "ring"], "what is in it has numbers: pass --channel.0.name ring"),
        (["--model.name", "mff"], 'no model "mff"; did you mean "mf"?'),
        (["--parametrization.sparsity", "0.5"], "it is a key of parametrization pruned: pass --parametrization.name"),
        (["--model.lora-rank", "4"], "it is a key of model text_lora, decoder_lora: pass --model.name, too"),
        (["--model.no-remat"], "it is a key of model sasrec"),
        (["--centrl"], 'did you mean "--central"'),
        (["--channel.3.name", "mean"], "channel.3: the configuration has 1 links: the next is number 1"),
        (["--rounds"], "Missing value for argument '--rounds'"),
        (["--rounds", "0"], "rounds is 0"),
        (["--run.placement", "x"], "Expected one of"),
        (["--channel.bits", "8"], "unknown option --channel.bits; links have numbers: pass --channel.0.bits, or the "),
    ],
)
def test_wrong_overrides_say_what_is_wrong(args, words):
    import re

    with pytest.raises(ValueError, match=re.escape(words)) as error:
        override_config({"channel": [{"name": "mean"}]}, args)
    assert "\n" not in str(error.value)


def test_differences_leave_out_where_it_runs():
    a = make_config({"model": {"dim": 8}, "channel": [{"name": "weighted_mean"}]})
    b = make_config({"model": {"dim": 9}, "channel": [], "run": {"devices": 2, "out": "x"}})
    assert config_differences(a, b) == [
        "channel: unset -> []", "channel.0.by: examples -> unset", "channel.0.name: weighted_mean -> unset",
        "channel.0.power: 1.0 -> unset", "model.dim: 8 -> 9",
    ]  # fmt: skip
    assert config_differences(a, a) == []


def test_groups_of_an_optimiser_have_their_own_pace():
    table = {
        "name": "sgd", "learning_rate": 0.5, "weight_decay": 0.1,
        "item": {"learning_rate": 2.0}, "user": {"weight_decay": 0.0},
    }  # fmt: skip
    opt = make_client_optimizer(make_config({"work": {"optimizer": table}}).work.optimizer)
    import jax.numpy as jnp

    params = ({"t": Table(jnp.full(2, 3.0)), "d": jnp.full(2, 3.0)}, {"u": jnp.full(2, 3.0)})
    gradient = ({"t": Table(jnp.ones(2)), "d": jnp.ones(2)}, {"u": jnp.ones(2)})
    step, _ = opt.update(gradient, opt.init(params), params)
    moved = optax.apply_updates(params, step)
    assert float(moved[0]["t"].rows[0]) == pytest.approx(3 - 2.0 * (1 + 0.1 * 3))
    assert float(moved[0]["d"][0]) == pytest.approx(3 - 0.5 * (1 + 0.1 * 3))
    assert float(moved[1]["u"][0]) == pytest.approx(3 - 0.5)
