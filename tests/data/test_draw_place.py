"""`work.draw_on = "auto"`: which place is chosen, and that a run stays with it."""

import sys
from types import SimpleNamespace

import jax
import optax
import pytest
import tomli_w

import jaxfed as jf
from jaxfed.cli import main
from jaxfed.config.build import build_from_config, load_data
from jaxfed.config.config_files import read_config
from jaxfed.config.options import list_batching_keys
from jaxfed.config.schema import make_config
from jaxfed.core.tree import count_bytes
from jaxfed.data import device_data, draw_place
from jaxfed.data.batching import Batching
from jaxfed.data.blocks import make_block_shapes
from jaxfed.data.device_data import list_train_data
from jaxfed.data.draw_place import choose_draw_place
from jaxfed.data.preparation import prepare_population
from jaxfed.data.sources.synthetic import synthetic_data
from jaxfed.training.loop import train_run

POPULATION = prepare_population(synthetic_data(60, 50, mean_length=12))[1]
TABLE = {
    "data": {"name": "synthetic", "users": 40, "items": 30, "mean_length": 6.0},
    "model": {"name": "mf", "dim": 4},
    "work": {"batch_size": 16, "negatives": 2, "optimizer": {"name": "sgd"}},
    "channel": [{"name": "per_row_mean"}],
    "cohort": {"name": "uniform", "size": 8},
    "evaluation": {"every": 2},
}


def pretend_accelerator(monkeypatch, memory=1 << 40):
    """The device is a GPU with so many bytes, as far as the choice of a place goes."""
    device = SimpleNamespace(platform="gpu")
    monkeypatch.setattr(draw_place, "jax", SimpleNamespace(local_devices=lambda: [device]))
    monkeypatch.setattr(device_data, "device_memory", lambda: memory)


def train(folder, place, rounds):
    """Trains a run, or goes on with it."""
    table = TABLE | {"work": TABLE["work"] | {"draw_on": place}, "rounds": rounds, "run": {"out": str(folder)}}
    return train_run(make_config(table), resume=folder.exists())


def test_a_place_is_chosen_by_kind_and_memory_of_the_device(monkeypatch, caplog):
    caplog.set_level("INFO", "jaxfed")
    auto = Batching(draw_on="auto")
    shapes, need = make_block_shapes(POPULATION, auto, 4, 1), count_bytes(list_train_data(POPULATION, auto))

    def choose(batching=auto):
        return choose_draw_place(POPULATION, batching, shapes).draw_on, caplog.messages[-1]

    assert jax.local_devices()[0].platform != "cpu" or choose()[1] == "work.draw_on: host, since the device is a CPU"
    pretend_accelerator(monkeypatch, 2 * need)
    assert choose() == ("device", "work.draw_on: device")
    place, line = choose(Batching(1, 0, ordered=True, draw_on="auto"))
    assert (place, line) == ("host", "work.draw_on: host, since sums for a closed form are drawn on the host alone")
    pretend_accelerator(monkeypatch, 2 * need - 1)
    place, line = choose()
    assert place == "host"
    assert "host, since what clients train on takes" in line
    assert choose(Batching(draw_on="device"))[0] == "device"  # as was asked for: refused when rounds begin


def test_a_run_stays_where_it_was_drawn(monkeypatch, tmp_path):
    """Begun where there is a GPU and resumed where there is none, and the other way round: with the draws that it was
    begun with."""
    want = {place: train(tmp_path / place, place, 4)["params_sha256"] for place in ("host", "device")}
    assert want["host"] != want["device"]
    train(tmp_path / "from cpu", "auto", 2)
    with monkeypatch.context() as patched:
        pretend_accelerator(patched)
        train(tmp_path / "from gpu", "auto", 2)
        assert train(tmp_path / "from cpu", "auto", 4)["params_sha256"] == want["host"]
    assert train(tmp_path / "from gpu", "auto", 4)["params_sha256"] == want["device"]
    assert read_config(tmp_path / "from gpu")["work"]["draw_on"] == "device"
    with pytest.raises(ValueError, match="draw_on: device -> host"):
        train(tmp_path / "from gpu", "host", 6)


def test_the_configuration_of_a_program_says_how_batches_are_drawn(monkeypatch, tmp_path):
    """All that `Batching` has, and the place that was chosen."""
    pretend_accelerator(monkeypatch)
    clients = jf.data.partition(jf.data.load("synthetic", users=40, items=30, mean_length=6.0))
    model, given = jf.models.sasrec(clients.num_items, dim=4, length=5), jf.Batching(2, 3, 2, draw_on="auto")
    method = jf.algorithms.fedavg(model, optax.sgd(0.5))
    run = jf.Experiment(clients, model, method, batching=given._replace(shared_negatives=True))
    assert (
        run.to_table(tmp_path)["work"].items()
        >= {"batch_size": 2, "negatives": 3, "epochs": 2, "shared_negatives": True, "draw_on": "device"}.items()
    )
    keys = {"batch_size", "negatives", "epochs", "shared_negatives", "negative_sampling", "draw_on"}
    assert {*list_batching_keys()} == keys


def test_a_saved_run_that_was_drawn_on_the_device_is_reproduced(tmp_path):
    clients = jf.data.partition(jf.data.load("synthetic", users=40, items=30, mean_length=6.0))
    model = jf.models.mf(clients.num_items, dim=4)
    method = jf.algorithms.fedavg(model, optax.sgd(0.5))
    run = jf.Experiment(
        clients, model, method, cohort=jf.sampling.uniform(8), batching=jf.Batching(16, 2, draw_on="device")
    )
    assert [*run.train(2)]
    run.save(tmp_path / "saved")
    table = read_config(tmp_path / "saved")
    again = train_run(make_config(table | {"run": table["run"] | {"out": str(tmp_path / "again")}}))
    assert again["params_sha256"] == run.params_sha256


def test_a_sweep_is_begun_again(monkeypatch, tmp_path):
    """Its runs have written down a place, and the sweep leaves it open still."""
    path = tmp_path / "auto.toml"
    path.write_text(tomli_w.dumps(TABLE | {"work": TABLE["work"] | {"draw_on": "auto"}, "rounds": 2}))
    words = ["jaxfed", "sweep", str(path), "--seeds", "0", "1", "--out", str(tmp_path / "sweep")]
    monkeypatch.setattr(sys, "argv", words)
    with monkeypatch.context() as patched:
        pretend_accelerator(patched)
        main.main()
    main.main()
    places = [read_config(each.parent)["work"]["draw_on"] for each in (tmp_path / "sweep").glob("**/config.toml")]
    assert places == ["device", "device"]


def test_what_does_not_fit_is_refused_before_anything_is_written(monkeypatch, tmp_path):
    monkeypatch.setattr(device_data, "device_memory", lambda: 10)
    with pytest.raises(ValueError, match='take a device with room, or "host" in a new run'):
        train(tmp_path / "run", "device", 2)
    assert not (tmp_path / "run").exists()
    assert train(tmp_path / "run", "host", 2)["rounds"] == 2


def test_a_program_restores_where_the_run_was_drawn(monkeypatch, tmp_path):
    def make(place):
        clients = jf.data.partition(jf.data.load("synthetic", users=40, items=30, mean_length=6.0))
        model = jf.models.mf(clients.num_items, dim=4)
        batching = jf.Batching(16, 2, draw_on=place)
        method = jf.algorithms.fedavg(model, optax.sgd(0.5))
        return jf.Experiment(clients, model, method, cohort=jf.sampling.uniform(8), batching=batching)

    with monkeypatch.context() as patched:
        pretend_accelerator(patched)
        run = make("auto")
    run.save(tmp_path / "saved")
    with pytest.raises(ValueError, match=r'make it with Batching\(draw_on="device"\)'):
        make("auto").restore(tmp_path / "saved")
    make("device").restore(tmp_path / "saved")


@pytest.mark.parametrize("place", ["device", "auto"])
def test_many_rounds_in_a_program_say_what_chose_the_host(place):
    table = TABLE | {"work": TABLE["work"] | {"draw_on": place}, "run": {"rounds_per_program": 2}}
    config = make_config(table)
    if place == "device":
        assert build_from_config(config, load_data(config.data)).loop
        return
    with pytest.raises(ValueError, match='"auto" chose the host here'):
        build_from_config(config, load_data(config.data))
