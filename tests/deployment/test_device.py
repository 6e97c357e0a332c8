"""A device alone: the message that it writes is a client's of the simulator, and folding it in is a round."""

import copy
import json
import shutil
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxfed.config.schema import make_config
from jaxfed.data.packing import pack_cohort
from jaxfed.deployment.device import TRAINED, train_on_device
from jaxfed.deployment.folded_run import fold_into_run
from jaxfed.deployment.message_files import MODELS, KnownModels, fold_messages, read_models
from jaxfed.export.bundle import export_run
from jaxfed.export.loader import load_export
from jaxfed.training.best_model import open_run
from jaxfed.training.loop import train_run
from jaxfed.training.rounds import initial_arrays, make_run_keys
from tests.deployment.federation import MF, RING
from tests.programs import run_program

SGD = {"server": {"name": "sgd", "learning_rate": 1.0}}
KINDS = {
    "mf": SGD,
    "quantized": SGD
    | {"channel": [{"name": "per_row_mean"}, {"name": "clip", "bound": 0.5}, {"name": "quantize", "bits": 8}]},
    "adam": {},
    "sasrec": SGD
    | {
        "model": {"name": "sasrec", "dim": 8, "length": 6, "dropout": 0.0},
        "work": {"negatives": 8, "optimizer": {"name": "sgd", "learning_rate": 0.1}},
        "channel": [{"name": "weighted_mean"}],
    },
}


def make_run(folder, **changes):
    """A run whose last round is its best one: there is no other evaluation."""
    config = make_config(MF | {"rounds": 3, "evaluation": {"every": 3}} | changes | {"run": {"out": str(folder)}})
    train_run(config)
    return config


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(kind) -> (configuration, folder of a run, its export), each made once."""
    known = {}

    def find(kind):
        if kind not in known:
            root = tmp_path_factory.mktemp(kind.replace(" ", "_"))
            config = make_run(root / "run", **KINDS[kind])
            export_run(str(root / "run"), root / "out")
            known[kind] = config, root / "run", load_export(root / "out")
        return known[kind]

    return find


def write_messages(folder, parts, export, clients, keys="reproducible"):
    """A message file of each of some clients of the run, from what they trained on there."""
    train, files = parts.data.population.train, []
    folder.mkdir(exist_ok=True)
    for client in clients:
        history = train.of(int(client)).tolist()
        message = train_on_device(export, folder / f"device{client}", history, int(client), keys)
        files.append(folder / f"{client}.message")
        files[-1].write_bytes(message.data)
    return files


def fold(config, run, files, known=None, exponent=0.5):
    return fold_messages(
        config,
        run.parts,
        run.arrays["state"],
        (run.arrays["best"][0], run.best_round),
        files,
        known or KnownModels(),
        exponent,
    )


def first_leaves(state):
    return [np.asarray(x) for x in jax.tree.leaves(state.shared.params)]


@pytest.mark.parametrize("kind", KINDS)
def test_folding_messages_in_is_a_round_of_the_simulator(made, kind, tmp_path):
    config, folder, export = made(kind)
    run = open_run(str(folder))
    parts, state, population = run.parts, run.arrays["state"], run.parts.data.population
    able = np.flatnonzero(population.num_train > 1)  # one item is no sequence
    clients = able[np.argsort(population.num_train[able], kind="stable")][[0, 3, -1, -2, 17]]  # of different lengths
    files = write_messages(tmp_path / "messages", parts, export, clients)
    folded = fold(config, run, files)
    assert not folded.refused
    assert set(folded.counted.values()) == {0}
    ids = np.full(parts.shapes.slots, population.num_clients)
    ids[: len(clients)] = np.sort(clients)
    cohort = pack_cohort(population, parts.batching, parts.shapes, ids, ids < population.num_clients, config.seed, 3)
    before = first_leaves(state)
    first = initial_arrays(parts, config.seed)["state"].client_states  # devices have not trained before
    want, _ = parts.algorithm.step(state._replace(client_states=first), cohort, make_run_keys(config.seed).rounds)
    for old, new, expected in zip(before, first_leaves(folded.state), first_leaves(want), strict=True):
        np.testing.assert_allclose(new, expected, rtol=1e-5, atol=2e-6)  # sums of five clients in another order
        assert not old.size or np.abs(new - old).max() > 1e-5
    assert int(folded.state.round) == 4


def test_old_messages_weigh_less(made, tmp_path):
    """(1 + age)^-exponent of what they would do today, exactly: the server is plain descent."""
    config, folder, export = made("mf")
    run = open_run(str(folder))
    files = write_messages(tmp_path / "messages", run.parts, export, [1, 7, 20])
    older = run._replace(arrays=run.arrays | {"state": run.arrays["state"]._replace(round=jax.numpy.int32(11))})
    before = first_leaves(run.arrays["state"])
    fresh, aged = fold(config, run, files, exponent=0.5), fold(config, older, files, exponent=0.5)
    assert set(aged.counted.values()) == {8}
    for old, new, discounted in zip(before, first_leaves(fresh.state), first_leaves(aged.state), strict=True):
        np.testing.assert_allclose(discounted - old, (new - old) / 3, rtol=1e-3, atol=1e-6)  # differences of floats
    for plain, new in zip(
        first_leaves(fold(config, older, files, exponent=0.0).state), first_leaves(fresh.state), strict=True
    ):
        np.testing.assert_allclose(plain, new, rtol=1e-6)


def test_a_message_is_made_once(made, tmp_path):
    """With keys of its own, which nobody can compute; another device draws others."""
    _, _, export = made("mf")
    first = train_on_device(export, tmp_path / "a", [1, 2, 3, 4], client=2)
    assert train_on_device(export, tmp_path / "a", [1, 2, 3, 4], client=2) == first
    assert train_on_device(export, tmp_path / "b", [1, 2, 3, 4], client=2).data != first.data
    with pytest.raises(ValueError, match="another history already"):
        train_on_device(export, tmp_path / "a", [1, 2, 3, 4, 5], client=2)
    chosen = train_on_device(export, tmp_path / "c", [1, 2, 3, 4])
    assert train_on_device(export, tmp_path / "c", [1, 2, 3, 4]).client == chosen.client


def make_later(export, name):
    """The export as one of the next round, and of another model."""
    manifest = copy.deepcopy(export.manifest)
    manifest["files"]["weights.safetensors"]["sha256"] = name
    manifest["federation"]["round"] += 1
    return export._replace(manifest=manifest, weights={path: x * 1.5 for path, x in export.weights.items()})


def test_a_model_that_comes_again_is_not_trained_on_another_history(made, tmp_path):
    """A, B, and A again: the round of A is over for the device."""
    _, _, export = made("mf")
    train_on_device(export, tmp_path / "a", [1, 2, 3], client=2)
    train_on_device(make_later(export, "later"), tmp_path / "a", [1, 2, 3, 4], client=2)
    for history in ([1, 2, 3], [1, 2, 3, 4, 5]):
        with pytest.raises(ValueError, match="is over for this client|another history already"):
            train_on_device(export, tmp_path / "a", history, client=2)


def test_a_folder_is_of_one_device(made, tmp_path):
    _, _, export = made("mf")
    train_on_device(export, tmp_path / "a", [1, 2, 3], client=2)
    with pytest.raises(ValueError, match="pass --client 2"):
        train_on_device(make_later(export, "later"), tmp_path / "a", [1, 2, 3], client=3)


def test_what_cannot_be_trained_is_not_noted(made, tmp_path):
    """So that the device can train on the export that was meant."""
    _, _, export = made("mf")
    broken = make_later(export, "broken")
    broken.manifest["configuration"]["server"] = {"edges": 2}
    with pytest.raises(ValueError, match="server.edges"):
        train_on_device(broken, tmp_path / "a", [1, 2, 3], client=2)
    assert not (tmp_path / "a" / TRAINED).exists()
    assert train_on_device(export, tmp_path / "a", [1, 2, 3], client=2).client == 2


def test_a_device_keeps_the_number_that_it_was_given(made, tmp_path):
    _, _, export = made("mf")
    given = train_on_device(export, tmp_path / "a", [1, 2, 3, 4], client=17)
    assert given.client == 17
    assert train_on_device(export, tmp_path / "a", [1, 2, 3, 4]) == given
    with pytest.raises(ValueError, match="that of client 17"):
        train_on_device(export, tmp_path / "a", [1, 2, 3, 4], client=16)
    for number in (-1, export.manifest["federation"]["num_clients"]):
        with pytest.raises(ValueError, match="has clients 0 to"):
            train_on_device(export, tmp_path / "b", [1, 2, 3, 4], client=number)
    assert not (tmp_path / "b" / "client").exists()


# --- bad input ----------------------------------------


@pytest.fixture(scope="module")
def one_file(made, tmp_path_factory):
    _, folder, export = made("mf")
    return write_messages(tmp_path_factory.mktemp("one"), open_run(str(folder)).parts, export, [5])[0]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_no_message_that_was_changed_is_counted(made, one_file, tmp_path, place, bit, cut):
    config, folder, _ = made("mf")
    data = bytearray(one_file.read_bytes())
    at = int(place * len(data))
    if cut:
        del data[at:]
    else:
        data[at] ^= 1 << bit
    changed = tmp_path / "changed"
    changed.write_bytes(bytes(data))
    folded = fold(config, open_run_once(folder), [changed])
    assert not folded.counted
    assert list(folded.refused) == [str(changed)]
    assert "\n" not in folded.refused[str(changed)]


OPENED = {}


def open_run_once(folder):
    """Nothing changes it."""
    if folder not in OPENED:
        OPENED[folder] = open_run(str(folder))
    return OPENED[folder]


def test_what_is_wrong_is_refused_and_the_rest_goes_on(made, one_file, tmp_path):
    config, folder, export = made("mf")
    run = open_run_once(folder)
    again = tmp_path / "again"
    shutil.copyfile(one_file, again)
    (tmp_path / "words").write_text("not a message")
    other_run = tmp_path / "other"
    make_run(other_run, **SGD, seed=6)
    export_run(str(other_run), tmp_path / "other_export")
    (stranger,) = write_messages(
        tmp_path / "s", open_run(str(other_run)).parts, load_export(tmp_path / "other_export"), [2]
    )
    good = write_messages(tmp_path / "m", run.parts, export, [9, 11])
    folded = fold(config, run, [one_file, again, tmp_path / "words", tmp_path / "none", stranger, *good])
    assert len(folded.counted) == 3
    said = {Path(name).name: why for name, why in folded.refused.items()}
    assert "was counted already" in said.pop("again" if str(again) in folded.refused else one_file.name)
    assert "cut" in said.pop("words")
    assert "no such file" in said.pop("none")
    assert "does not know" in said.pop(stranger.name)
    assert not said


def test_of_two_devices_with_one_number_the_first_file_is_counted_and_the_second_named(made, tmp_path):
    """And what the first one did is what it does alone; with numbers of their own both are counted."""
    config, folder, export = made("mf")
    run = open_run_once(folder)
    messages = {
        name: train_on_device(export, tmp_path / name, history, client)
        for name, history, client in (("a", [1, 2, 3], 5), ("b", [4, 6, 7, 9], 5), ("c", [4, 6, 7, 9], 6))
    }
    files = {name: tmp_path / f"{name}.message" for name in messages}
    for name, message in messages.items():
        files[name].write_bytes(message.data)
    both = fold(config, run, [files["b"], files["a"]])
    assert list(both.counted) == [str(files["a"])]
    why = both.refused[str(files["b"])]
    assert all(word in why for word in ("client 5 was counted already", str(files["a"]), "--client"))
    alone = fold(config, run, [files["a"]])
    for one, other in zip(first_leaves(both.state), first_leaves(alone.state), strict=True):
        np.testing.assert_array_equal(one, other)
    assert not fold(config, run, [files["a"], files["c"]]).refused
    fold_into_run(str(folder), [files["a"]], tmp_path / "more")
    later = fold_into_run(str(tmp_path / "more"), [files["b"]], tmp_path / "none")
    assert "when this run was made" in later.refused[str(files["b"])]


def test_messages_of_an_older_export_are_known_for_what_they_are(made, tmp_path):
    """A run into which messages were folded still knows the models before; who lags behind is not lost."""
    _, folder, export = made("mf")
    parts = open_run_once(folder).parts
    files = write_messages(tmp_path / "m", parts, export, [3, 4])
    fold_into_run(str(folder), files[:1], tmp_path / "first")
    late = fold_into_run(str(tmp_path / "first"), files[1:], tmp_path / "second")
    assert list(late.counted.values()) == [1]
    assert read_models(tmp_path / "second").models.keys() > read_models(tmp_path / "first").models.keys()
    again = fold_into_run(str(tmp_path / "second"), files, tmp_path / "x")
    assert all("counted already" in why for why in again.refused.values())
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match="--least is 3"):
        fold_into_run(str(folder), files, tmp_path / "x", least=3)
    export_run(str(tmp_path / "second"), tmp_path / "out")
    fresh = load_export(tmp_path / "out")
    assert fresh.manifest["federation"]["round"] == 5
    newest = write_messages(tmp_path / "n", parts, fresh, [3])
    assert list(fold_into_run(str(tmp_path / "second"), newest, tmp_path / "third").counted.values()) == [0]
    (tmp_path / "third" / MODELS).write_text("[]")
    with pytest.raises(ValueError, match="damaged"):
        fold_into_run(str(tmp_path / "third"), newest, tmp_path / "fourth")


@pytest.mark.parametrize("exponent", [-1.0, float("nan"), float("inf")])
def test_weights_that_would_grow_or_are_none(exponent, made, one_file):
    config, folder, _ = made("mf")
    with pytest.raises(ValueError, match="--exponent"):
        fold(config, open_run_once(folder), [one_file], exponent=exponent)


def test_messages_with_noise_of_their_own_are_accounted_for(tmp_path):
    noise = {"name": "local_gaussian", "multiplier": 2.0}
    channel = [{"name": "mean", "count": 12}, {"name": "clip", "bound": 0.5}, {"name": "densify"}, noise]
    config = make_run(tmp_path / "run", channel=channel, server={"name": "sgd", "lazy": False})
    export_run(str(tmp_path / "run"), tmp_path / "out")
    run = open_run(str(tmp_path / "run"))
    files = write_messages(tmp_path / "m", run.parts, load_export(tmp_path / "out"), [5], keys="own")
    assert fold(config, run, files).epsilon == pytest.approx(run.parts.epsilon(4))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (RING, "hides messages in a sum"),
        ({"channel": [{"name": "mean", "count": 12}, {"name": "clip", "bound": 0.5}, {"name": "gaussian"}]}, "epsilon"),
    ],
)
def test_runs_into_which_nothing_can_be_folded(changes, says, tmp_path, one_file):
    config = make_run(tmp_path / "run", **changes)
    with pytest.raises(ValueError, match=says):
        fold(config, open_run(str(tmp_path / "run")), [one_file])


def test_a_device_of_a_run_whose_server_sends_more(tmp_path):
    channel = [{"name": "mean", "count": 12}, {"name": "adaptive_clip"}]
    make_run(tmp_path / "run", channel=channel)
    export_run(str(tmp_path / "run"), tmp_path / "out")
    with pytest.raises(ValueError, match="sends more than the model"):
        train_on_device(load_export(tmp_path / "out"), tmp_path / "device", [1, 2, 3])


def test_the_commands(made, tmp_path, monkeypatch, capsys):
    _, folder, _ = made("mf")
    monkeypatch.chdir(tmp_path)
    export_run(str(folder), Path("out"))
    Path("history").write_text("1\n5\n7\n\n9\n")

    run = partial(run_program, monkeypatch, capsys)
    code, out, said = run("device", "out", "--history", "history", "-k", "3", "--save", "message", "--client", 7)
    assert code == 0
    assert "of client 7" in said
    assert len(out.splitlines()) == 3
    assert run("device", "out", "--history", "history", "--save", "message")[0] == 2  # nothing is overwritten
    code, _, said = run("device", "out", "--history", "history", "--save", "other", "--client", 8)
    assert (code, "that of client 7" in said, Path("other").exists()) == (2, True, False)
    Path("bad").write_text("no message")
    code, out, said = run("aggregate", str(folder), "message", "bad", "--out", "more")
    assert code == 0
    assert "counted, 0 rounds old" in out
    assert "bad: refused: " in said
    summary = json.loads(Path("more/summary.json").read_text())
    assert summary["rounds"] == 4
    assert summary["folded"] == [0]
    assert run("evaluate", "more")[0] == 0
    assert run("aggregate", str(folder), "message", "--out", "more")[0] == 2
    code, _, said = run("aggregate", str(folder), "bad", "--out", "none")
    assert (code, Path("none").exists()) == (2, False)
    Path("history").write_text("1\nnobody\n")
    code, _, said = run("device", "out", "--history", "history")
    assert (code, "no item 'nobody'" in said) == (2, True)
