"""Text from a file of titles to item vectors: configurations, runs, bytes, checkpoints and what is refused."""

import jax
import numpy as np
import optax
import pytest

pytest.importorskip("safetensors", reason="the extra `text` is not installed")
pytest.importorskip("tokenizers", reason="the extra `text` is not installed")

import jaxfed as jf
from jaxfed.config.build import build_from_config, load_data
from jaxfed.config.config_files import read_config
from jaxfed.config.schema import make_config
from jaxfed.config.start import SavedModel
from jaxfed.models.text import text_vectors
from jaxfed.training.best_model import open_best_model
from jaxfed.training.loop import train_run
from jaxfed.training.rounds import initial_arrays
from tests.small_text import SIZES, random_tensors, write_encoder

ITEMS, USERS = 23, 12
VECTORS = {"name": "text_vectors"}
ENCODER = {"name": "text_encoder", "trained_layers": 1, "encoder_rate": 0.1}
LORA = {"name": "text_encoder", "lora_rank": 2}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with clicks, titles and an encoder; what is fetched or kept lies there, too."""
    monkeypatch.setenv("JAXFED_DATA", str(tmp_path / "cache"))
    write_encoder(tmp_path / "model")
    rng = np.random.default_rng(0)
    clicks = [(u, i) for u in range(USERS) for i in rng.choice(ITEMS, rng.integers(4, 12), replace=False)]
    lines = [f"{u},{i},{t}" for t, (u, i) in enumerate(clicks)]
    (tmp_path / "clicks.csv").write_text("user,item,time\n" + "\n".join(lines) + "\n")
    words = ["red", "blue", "night", "day", "comedy", "war"]
    titles = [f"{i},{' '.join(rng.choice(words, rng.integers(1, 5)))}" for i in range(2, ITEMS)]  # two have none
    (tmp_path / "titles.csv").write_text("item,title\n" + "\n".join(titles) + "\n")
    return tmp_path


def table(files, parametrization, **more):
    named = {} if parametrization is None else {"parametrization": parametrization | {"folder": str(files / "model")}}
    return (
        {
            "rounds": 2,
            "data": {"name": "csv", "path": str(files / "clicks.csv"), "titles": str(files / "titles.csv")},
            "model": {"dim": 6},
            "work": {"batch_size": 8},
            "channel": [{"name": "per_row_mean"}],
            "server": {"name": "adam"},
            "cohort": {"size": 6},
            "evaluation": {"every": 1},
            "run": {"out": str(files / "run")},
        }
        | named
        | more
    )


def trained(files, parametrization, out="run", rounds=2, **more):
    run = {"out": str(files / out), **more}
    return train_run(make_config(table(files, parametrization, run=run, rounds=rounds)), resume=True)


@pytest.mark.parametrize("chosen", [VECTORS, LORA], ids=["vectors", "lora"])
def test_other_weights_are_no_way_to_go_on(files, chosen):
    trained(files, chosen, rounds=1)
    write_encoder(files / "model", tensors=random_tensors(seed=4))
    with pytest.raises(ValueError, match="with other frozen values"):
        trained(files, chosen)
    with pytest.raises(ValueError, match="with other frozen values"):
        open_best_model(files / "run")


def test_what_is_missing_and_cut_is_said(files, caplog):
    with caplog.at_level("INFO", logger="jaxfed"):
        config = make_config(table(files, VECTORS | {"max_pieces": 4}))
        build_from_config(config, load_data(config.data))
    said = [record.getMessage() for record in caplog.records if record.levelname == "INFO"]
    assert any("2 of 23 items have no title and no features: their text is empty" in each for each in said)
    assert any("texts of items are cut at 4 pieces" in each for each in said)


def test_text_is_the_bridge_to_another_catalogue(files, caplog):
    """No item is in both: the projection is taken over, vectors of ids begin at zero; users in both stay themselves."""
    start = {"start": {"run": "other", "private": True}}
    config = make_config(table(files, VECTORS | {"ids": True}, **start))
    data = load_data(config.data)
    arrays = initial_arrays(parts := build_from_config(config, data), 0)
    theta, (shared, private) = jax.tree.map(np.array, (arrays["state"].shared.params, arrays["best"]))
    theta["tables"]["item"].ids.rows[:] = 1.0
    others = np.char.add("x", data.source.items)
    saved = SavedModel("other", shared, theta, others, others, private, parts.data.population.names)
    with caplog.at_level("INFO", logger="jaxfed"):
        begun = initial_arrays(build_from_config(config, data, saved=saved), 3)
    made, left = begun["state"].shared.params["tables"], theta["tables"]
    for name in ("kernel", "bias"):
        np.testing.assert_array_equal(getattr(made["item"], name), getattr(left["item"], name))
    assert not np.any(made["item"].ids.rows)
    assert "0 of 23 rows of tables/bias, tables/item/ids, and 2 of 2 other parameters come from" in caplog.text
    jax.tree.map(np.testing.assert_array_equal, begun["best"][1], private)
    assert f"{USERS} of {USERS} clients keep their private part" in caplog.text


def refuse(*_):
    raise AssertionError("encoded again")


def test_vectors_are_kept(files, monkeypatch):
    """A second build reads what the first made."""
    config = make_config(table(files, VECTORS))
    data = load_data(config.data)
    first = build_from_config(config, data).method.parametrization.frozen
    monkeypatch.setattr("jaxfed.config.text_parametrizations.encode_texts", refuse)
    again = build_from_config(config, data).method.parametrization.frozen
    np.testing.assert_array_equal(first.rows, again.rows)


@pytest.mark.parametrize("chosen", [VECTORS | {"ids": True}, ENCODER], ids=["ids", "top"])
def test_tables_split_among_devices(files, chosen):
    """By rows, which are then more than there are items."""
    one, four = (
        trained(files, chosen, f"on_{devices}", rounds=2, devices=devices, shard_tables=True) for devices in (1, 4)
    )
    for name in ("test/full/ndcg@10", "val/full/hr@10"):
        assert four[name] == pytest.approx(one[name], abs=0.02)
    assert four["bytes_up_total"] == one["bytes_up_total"]


def test_a_program_writes_the_same_configuration(files):
    """A parametrization made by the function that configurations name is written down; of arrays it is not."""
    data = jf.data.read(str(files / "clicks.csv"), titles=str(files / "titles.csv"))
    clients = jf.data.partition(data)
    model = jf.models.mf(clients.num_items, dim=4)
    method = jf.algorithms.fedavg(model, optax.sgd(0.1))
    texts = jf.data.item_texts(clients.source)
    from jaxfed.config.text_parametrizations import read_text_vectors

    made = read_text_vectors(model, texts, folder=str(files / "model"))
    run = jf.Experiment(clients, model, method, parametrization=made, seed=0)
    list(run.train(rounds=1))
    run.save(str(files / "saved"))
    known = read_config(files / "saved" / "config.toml")["parametrization"]
    assert (known["name"], known["folder"]) == ("text_vectors", str(files / "model"))
    pretrained = jf.data.read_pretrained(str(files / "model"))
    encoder = jf.models.convert_bert(pretrained.config, pretrained.tensors)
    vectors = jf.models.encode_texts(encoder, jf.data.tokenize_texts(pretrained, texts).ids)
    own = text_vectors(model, vectors)
    for a, b in zip(jax.tree.leaves(own.frozen), jax.tree.leaves(made.frozen), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"parametrization": VECTORS | {"folder": "/no/such"}}, "/no/such: config.json is missing"),
        ({"parametrization": LORA | {"lora_rank": 13}}, "lora_rank is 13: layer_0/query has a width of 12"),
        ({"parametrization": LORA | {"lora_rank": -1}}, "lora_rank is -1"),
        ({"parametrization": LORA | {"lora_pattern": "x"}}, 'lora_pattern "x" is in the path of no layer'),
        ({"parametrization": ENCODER | {"trained_layers": 3}}, "trained_layers is 3"),
        ({"parametrization": ENCODER | {"max_pieces": 99}}, "max_pieces is 99: set it from 4 to 32"),
        ({"parametrization": VECTORS, "model": {"name": "popularity"}}, "no table of item vectors"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(files, change, said):
    known = table(files, None) | change
    known["parametrization"] = {"folder": str(files / "model")} | change["parametrization"]

    def build():
        config = make_config(known)
        build_from_config(config, load_data(config.data))

    with pytest.raises(ValueError, match=said) as error:
        build()
    assert "\n" not in str(error.value)


def test_data_without_texts_are_refused(files):
    config = make_config(table(files, VECTORS, data={"name": "csv", "path": str(files / "clicks.csv")}))
    with pytest.raises(ValueError, match="the data have no titles and no features of items, so there are no texts"):
        build_from_config(config, load_data(config.data))


def test_a_model_of_other_files_is_read(files):
    """With `bert.` before every name, as Hugging Face writes models with a head."""
    tensors = {f"bert.{name}": x for name, x in random_tensors().items() if "pooler" not in name}
    tensors |= {"cls.predictions.bias": np.zeros(SIZES["vocab_size"], np.float32)}
    plain = trained(files, VECTORS, "plain")
    write_encoder(files / "model", tensors=tensors)
    assert trained(files, VECTORS, "prefixed")["params_sha256"] == plain["params_sha256"]


def test_random_weights_are_asked_for_by_name(files):
    """Then no weights are read. A folder that lacks them is refused otherwise, and so is one without a shape."""
    (files / "model" / "model.safetensors").unlink()
    model = {"name": "text_lora", "folder": str(files / "model"), "dim": 4, "lora_rank": 2, "trained_layers": 0}
    with pytest.raises(ValueError, match="model.safetensors is missing"):
        make_model_of(files, model)
    made, again = (make_model_of(files, model | {"weights": "random"}) for _ in range(2))
    frozen = made.frozen["text"]
    assert frozen["base"]["embeddings"]["word"].shape == (SIZES["vocab_size"], SIZES["hidden_size"])
    assert np.std(frozen["base"]["layer_1"]["hidden"]["kernel"]) == pytest.approx(0.02, rel=0.2)
    assert not np.any(frozen["base"]["layer_0"]["query"]["bias"])
    jax.tree.map(np.testing.assert_array_equal, made.frozen, again.frozen)
    with pytest.raises(ValueError, match="none of 'pretrained', 'random'"):
        make_model_of(files, model | {"weights": "none"})
    for name in ("tokenizer.json", "config.json"):
        (files / "model" / name).unlink()
        with pytest.raises(ValueError, match=f"{name} is missing: name a folder with config.json and tokenizer.json$"):
            make_model_of(files, model | {"weights": "random"})


def make_model_of(files, model):
    config = make_config(table(files, None, model=model))
    return build_from_config(config, load_data(config.data)).model


@pytest.mark.parametrize("weights", ["pretrained", "random"])
def test_a_run_with_random_weights_trains(files, weights):
    """As one with pretrained ones does, and it resumes: its weights are the same in each process."""
    model = {"name": "text_lora", "folder": str(files / "model"), "dim": 4, "lora_rank": 2, "trained_layers": 1}
    work = {"name": "local_steps", "batch_size": 4, "accumulate": 2}
    more = {"model": model | {"weights": weights}, "work": work, "run": {"out": str(files / weights)}}
    train_run(make_config(table(files, None, **more, rounds=1)), resume=True)
    summary = train_run(make_config(table(files, None, **more, rounds=2)), resume=True)
    assert summary["rounds"] == 2
