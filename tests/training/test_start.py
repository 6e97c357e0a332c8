"""A run that starts with the parameters of another one, of which some may be frozen."""

from dataclasses import replace

import jax
import numpy as np
import pytest

import jaxfed as jf
from jaxfed.config import start
from jaxfed.config.build import load_data
from jaxfed.config.schema import make_config
from jaxfed.config.settings import Start
from jaxfed.config.start import SavedModel, choose_leaves
from jaxfed.config.text_parametrizations import EncodedTexts
from jaxfed.core.leaf_paths import list_leaves
from jaxfed.core.tree import count_bytes
from jaxfed.training.best_model import build_run, open_best_model, open_run
from jaxfed.training.loop import train_run
from jaxfed.training.rounds import initial_arrays, make_run_keys, prepare_round
from tests.small import close, same

MODEL = {"name": "neumf", "dim": 4, "hidden": [6, 5]}
RUN = {
    "rounds": 2,
    "model": MODEL,
    "work": {"batch_size": 16, "optimizer": {"name": "sgd", "learning_rate": 0.5}},
    "channel": [{"name": "mean"}],
    "cohort": {"name": "everyone"},
    "evaluation": {"every": 1},
}
TABLES = {"tables/item_network", "tables/item_product"}


def write_catalogue(folder, items, seed):
    """A file in which each of 20 users has 6 of some items, and one of their titles: `film` and the item's number."""
    random = np.random.default_rng(seed)
    rows = [f"u{user},i{item}" for user in range(20) for item in random.permutation(items)[:6]]
    folder.mkdir()
    (folder / "rows.csv").write_text("\n".join(["user_id,item_id", *rows]))
    (folder / "titles.csv").write_text("\n".join(["item_id,title", *(f"i{item},film {item % 100}" for item in items)]))
    return {"name": "csv", "path": str(folder / "rows.csv"), "titles": str(folder / "titles.csv")}


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """(its folder, its data): a finished run on items 0 to 29."""
    folder = tmp_path_factory.mktemp("other")
    data = write_catalogue(folder / "data", range(30), 0)
    train_run(make_config(RUN | {"data": data, "run": {"out": str(folder / "run")}}))
    return folder / "run", data


def begin(other, data, taken=None, **more):
    """(the parts of a run that starts from the other one, its configuration)."""
    taken = {"run": str(other[0])} | (taken or {})
    config = make_config(RUN | {"data": data, "start": taken} | more)
    return build_run(config, load_data(config.data)), config


def held(parts):
    """{path: leaf} of what the server holds before the first round."""
    return list_leaves(initial_arrays(parts, 7)["state"].shared.params)


@pytest.mark.parametrize(("match", "shift"), [("id", 0), ("text", 100)])
def test_rows_of_the_same_items_and_dense_parameters_are_taken(other, tmp_path, caplog, match, shift):
    """By text: the ids of the other catalogue are others, its titles the same."""
    caplog.set_level("INFO")
    data = write_catalogue(tmp_path / "data", range(20 + shift, 45 + shift), 1)
    parts, config = begin(other, data, {"match": match})
    source = open_run(str(other[0]))
    old, new = list_leaves(source.arrays["best"][0]), held(parts)
    alone = held(build_run(make_config(RUN | {"data": data}), load_data(config.data)))
    items = {name: row for row, name in enumerate(source.parts.data.source.items.tolist())}
    names = [f"i{int(name[1:]) - shift}" for name in parts.data.source.items]
    for path in TABLES:
        for row, name in enumerate(names):
            want = old[path].rows[items[name]] if name in items else alone[path].rows[row]
            same(new[path].rows[row], want)
    for path in new.keys() - TABLES:
        same(new[path], old[path])
    matched, dense = sum(name in items for name in names), len(new) - len(TABLES)
    assert 0 < matched < len(names)
    words = (
        f"start: {matched} of {len(names)} rows of tables/item_network, tables/item_product, and {dense} of {dense} "
    )
    assert words in caplog.text


def test_only_the_parts_that_are_asked_for_are_taken(other):
    new = held(begin(other, other[1], {"parts": ["hidden_0/", "tables/item_product"]})[0])
    old, alone = list_leaves(open_run(str(other[0])).arrays["best"][0]), held(begin(other, other[1], {"run": ""})[0])
    for path in new:
        taken = "hidden_0/" in path or path == "tables/item_product"
        same(new[path], (old if taken else alone)[path])


def test_clients_keep_their_private_part(other, tmp_path):
    """Of two files with common users; who is in one of them alone begins anew."""
    data = write_catalogue(tmp_path / "data", range(50, 75), 1)
    text = (tmp_path / "data" / "rows.csv").read_text()
    (tmp_path / "data" / "rows.csv").write_text(text.replace("u7,", "v7,"))
    parts, _ = begin(other, data, {"private": True})
    fresh, _ = begin(other, data)
    kept, random = (initial_arrays(each, 7)["best"][1]["private"] for each in (parts, fresh))
    source = open_run(str(other[0]))
    names = source.parts.data.population.names.tolist()
    for part, old in source.arrays["best"][1]["private"].items():
        for place, name in enumerate(parts.data.population.names):
            same(kept[part][place], random[part][place] if name == "v7" else old[names.index(name)])


def test_new_rows_are_the_mean_of_those_nearest_by_text(other, tmp_path, monkeypatch):
    """Texts whose vectors are the corners of a square: nearest to a new one are those of its own corner."""
    corners = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]], np.float32)

    def encode(rows, texts, folder, pieces):
        return EncodedTexts(None, None, corners[[int(text.split()[1]) % 4 for text in texts]])

    monkeypatch.setattr(start, "encode_catalogue", encode)
    monkeypatch.setattr(start, "NEAREST", 2)
    data = write_catalogue(tmp_path / "data", range(10, 45), 1)
    new = held(parts := begin(other, data, {"new_rows": "text"})[0])
    source = open_run(str(other[0]))
    old, items = list_leaves(source.arrays["best"][0]), source.parts.data.source.items.tolist()
    for row, name in enumerate(parts.data.source.items.tolist()):
        number = int(name[1:])
        near = [items.index(each) for each in parts.data.source.items if each in items]
        near = [place for place in near if (int(items[place][1:]) - number) % 4 == 0][:2]
        for path in TABLES:
            rows = old[path].rows
            want = rows[items.index(name)] if name in items else rows[np.array(near)].mean(0)
            close(np.asarray(new[path].rows[row]), want, atol=1e-7)


def test_a_run_that_starts_from_another_goes_on_and_is_evaluated_without_it(other, tmp_path):
    """Of a moved run only what is frozen is missed."""
    moved = tmp_path / "moved"
    other[0].rename(moved)
    try:
        for name, freeze in (("plain", []), ("frozen", ["hidden_0/"])):
            config = RUN | {"data": other[1], "start": {"run": str(moved)}, "run": {"out": str(tmp_path / name)}}
            train_run(make_config(config | {"work": RUN["work"] | {"freeze": freeze}}))
        moved.rename(other[0])
        open_best_model(str(tmp_path / "plain"))
        assert jf.load_run(tmp_path / "plain").round == 2
        with pytest.raises(ValueError, match=r"start.run: .*moved: no run here"):
            open_best_model(str(tmp_path / "frozen"))
        other[0].rename(moved)
        open_best_model(str(tmp_path / "frozen"))
        assert jf.load_run(tmp_path / "frozen").round == 2
    finally:
        if moved.exists():
            moved.rename(other[0])


def test_what_is_frozen_stays_and_costs_nothing_after_the_first_download(other, tmp_path):
    """Bit by bit what the other run had; bytes fall by what the parameters take, of tables by the rows of a client."""
    patterns = ["hidden_0/", "tables/item_product"]
    config = {"work": RUN["work"] | {"freeze": patterns}, "run": {"out": str(tmp_path / "run")}}
    summary = train_run(make_config(RUN | {"data": other[1], "start": {"run": str(other[0])}} | config))
    source, run = open_run(str(other[0])), open_run(str(tmp_path / "run"))
    old, trained = (list_leaves(each.arrays["best"][0]) for each in (source, run))
    kept = list_leaves(run.parts.model.frozen["frozen_parameters"])
    chosen = {path for path in old if any(pattern in path for pattern in patterns)}
    assert kept.keys() == chosen
    assert trained.keys() == old.keys() - chosen
    for path in chosen:
        same(kept[path], old[path])
    moved = [not np.array_equal(*(jax.tree.leaves(each[path])[0] for each in (old, trained))) for path in trained]
    assert all(moved)
    rows, table = np.array([0, 3]), count_bytes(kept["tables/item_product"])
    size, items = count_bytes(kept), len(source.parts.data.source.items)
    fewer = size - table + table * rows // items
    for before, after in ((source.parts.wire.up, run.parts.wire.up), (source.parts.wire.down, run.parts.wire.down)):
        assert ((before(rows) - after(rows)) == fewer).all()
    assert summary["bytes_frozen"] == size


def test_what_is_frozen_without_a_start_is_the_same_for_every_seed(other):
    parts, config = begin(other, other[1], {"run": ""}, work=RUN["work"] | {"freeze": ["hidden_0/"]})
    again = build_run(replace(config, seed=5), load_data(config.data))
    same(parts.model.frozen, again.model.frozen)


def test_rates_fall_from_the_top_layer_down(other):
    """One step of one client: the update of the k-th layer is decay^k times that of a run without layers."""
    layers = ["output/", "hidden_0/", "tables/item_product"]
    moved = []
    for more in ({}, {"layers": layers, "layer_decay": 0.5}):
        work = {"batch_size": 4096, "optimizer": RUN["work"]["optimizer"] | more}
        parts, _ = begin(other, other[1], {"run": ""}, work=work)
        before, ready = initial_arrays(parts, 0)["state"], prepare_round(parts, 0, 0)
        first = {path: np.array(jax.tree.leaves(x)[0]) for path, x in list_leaves(before.shared.params).items()}
        state, _ = parts.algorithm.step(before, ready.cohort, make_run_keys(0).rounds)
        end = list_leaves(state.shared.params)
        moved.append({path: np.asarray(jax.tree.leaves(end[path])[0]) - first[path] for path in first})
    for path, step in moved[0].items():
        depth = next((k for k, pattern in enumerate(layers) if pattern in path), 0)
        assert abs(step).max() > 0
        close(moved[1][path], 0.5**depth * step, atol=1e-7)  # differences of numbers below 1


@pytest.mark.parametrize(
    ("taken", "more", "words"),
    [
        ({"run": "nowhere"}, {}, "start.run: nowhere: no run here"),
        ({}, {"model": MODEL | {"dim": 6}}, r"item_half/kernel has the shape \[4, 6\] in .* and \[6, 6\] here"),
        ({}, {"model": MODEL | {"hidden": [9]}}, r"item_half/bias has the shape \[6\] in .* and \[9\] here"),
        ({}, {"model": {"name": "mf"}}, "nothing of .* is a part of this model: it has params/hidden_0"),
        ({"parts": ["hiden"]}, {}, 'start.parts: "hiden" is in the path of no parameter; there are params/hidden_0/'),
        ({"parts": ["("]}, {}, "is no regular expression"),
        (
            {"match": "text", "parts": ["tables/"]},
            {"data": "other titles"},
            "no item of .* is in these data by their texts",
        ),
        ({"private": True}, {"work": RUN["work"] | {"name": "scaffold"}}, "do not keep the private part of the model"),
        ({}, {"algorithm": {"name": "ifca"}, "channel": []}, "several models at the server, which would begin alike"),
        ({}, {"algorithm": {"name": "heterofl"}, "channel": [], "work": {"freeze": ["bias"]}}, "have the whole width"),
        ({}, {"work": RUN["work"] | {"freeze": ["nothing"]}}, 'work.freeze: "nothing" is in the path of no parameter'),
        ({}, {"work": RUN["work"] | {"freeze": [""]}}, "nothing would be trained"),
        (
            {},
            {"work": {"optimizer": {"name": "sgd", "layers": ["x_"]}}},
            'work.optimizer.layers: "x_" is in the path of',
        ),
        ({}, {"work": {"optimizer": {"layers": ["t"], "layer_decay": 0.0}}}, "layer_decay is 0.0: it must be above 0"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(other, tmp_path, taken, more, words):
    if more.get("data"):
        more = {"data": write_catalogue(tmp_path / "data", range(50, 75), 2)}
    with pytest.raises(ValueError, match=words) as error:
        begin(other, **{"data": other[1]} | more, taken=taken)
    assert "\n" not in str(error.value)


def test_adapters_that_would_be_lost_are_refused():
    """What FLoRA has learnt lies in a residual, and half a pair of factors means nothing."""
    here = {"params": {"lora_a": {"q": np.zeros((4, 2))}, "lora_b": {"q": np.zeros((2, 4))}, "shift": np.zeros(3)}}
    there = {"params": here["params"] | {"lora_residual": {"q": np.ones((4, 4))}}}
    saved = SavedModel("runs/other", there, None, np.array([]), np.array([]), (), np.array([]))
    with pytest.raises(ValueError, match="has params/lora_residual/q, for which this run has no place"):
        choose_leaves(Start(run="runs/other"), saved, here, there)
    assert choose_leaves(Start(run="runs/other", parts=("shift",)), saved, here, there).keys() == {"params/shift"}
    assert len(choose_leaves(Start(run="runs/other"), saved, here, here)) == 3


def test_a_run_that_is_not_finished_is_no_start(other, tmp_path):
    run = jf.from_config(RUN | {"data": other[1], "rounds": 4})
    next(run.train())
    run.save(tmp_path / "run")
    with pytest.raises(ValueError, match=r"is not finished: jaxfed train .*--resume"):
        begin((tmp_path / "run", other[1]), other[1])
