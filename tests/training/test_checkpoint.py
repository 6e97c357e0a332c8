"""Checkpoints: whole or not at all, and back to the newest that is whole."""

import dataclasses
import errno
import json
import logging
import os
import shutil
import sys
from contextlib import ExitStack
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxfed.channels.average import per_row_mean
from jaxfed.config.schema import make_config
from jaxfed.training import checkpoint
from jaxfed.training.resume import describe_run, record_problem
from jaxfed.training.rounds import Progress
from tests.small import KEY, MARKED, TABLE, factorisation, row_cohort, run, same

ALGORITHM = factorisation(per_row_mean(), server=optax.adam(0.1))


def template():
    return {"state": ALGORITHM.init(MARKED, KEY)}


def saved(folder, steps=(1, 2, 3)):
    """Checkpoints of a run after some rounds; returns {round: state on the host}."""
    states = {}
    with checkpoint.open_checkpoints(folder, keep=5) as checkpoints:
        for step in steps:
            state = run(ALGORITHM, row_cohort(), rounds=step)[0]
            states[step] = jax.tree.map(np.asarray, state)
            checkpoint.save_checkpoint(checkpoints, step, {"state": state}, {"round": step})
            checkpoints.wait_until_finished()
    return states


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Where checkpoints of three rounds lie, to be copied; and their states."""
    folder = tmp_path_factory.mktemp("three") / "c"
    return folder, saved(folder)


def restored(folder):
    said = []
    with checkpoint.open_checkpoints(folder, keep=5) as checkpoints:
        found = checkpoint.restore_newest(checkpoints, template(), said.append)
        return found, said


def largest(folder, step):
    """The largest file of arrays: what a small state is called takes more room than what is in it."""
    return max((folder / str(step) / "state" / "d").iterdir(), key=lambda f: f.stat().st_size)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def record_file(folder, step):
    return folder / str(step) / "meta" / "metadata"


def edit(folder, number, **changes):
    """A record with other values and a digest of its own: what another version would write."""
    record = json.loads(record_file(folder, number).read_text()) | changes
    record["sha256"] = checkpoint.record_digest(record)
    record_file(folder, number).write_text(json.dumps(record))


def put(folder, number, into):
    """The arrays of one round in the checkpoint of another, whose record has their digest."""
    shutil.rmtree(folder / str(into) / "state")
    shutil.copytree(folder / str(number) / "state", folder / str(into) / "state")
    edit(folder, into, arrays=json.loads(record_file(folder, number).read_text())["arrays"])


DAMAGE = {
    "a flipped bit": lambda folder: flip(largest(folder, 3)),
    "cut short": lambda folder: largest(folder, 3).open("r+b").truncate(100),
    "no metadata": lambda folder: (folder / "3" / "state" / "_METADATA").unlink(),
    "no arrays": lambda folder: [f.unlink() for f in (folder / "3" / "state").rglob("*") if f.is_file()],
    "no JSON": lambda folder: [f.unlink() for f in (folder / "3" / "meta").rglob("*") if f.is_file()],
    "another JSON": lambda folder: record_file(folder, 3).write_text("[1, 2]"),
    "a flipped bit in the record": lambda folder: flip(record_file(folder, 3)),
    "another round": lambda folder: edit(folder, 3, round=2, step=2),
    "another format": lambda folder: edit(folder, 3, format=99),
    "the arrays of another round": lambda folder: put(folder, 1, 3),
    "an empty folder": lambda folder: (folder / "9").mkdir(),
    "another name": lambda folder: (folder / "3").rename(folder / "99"),
}
GONE_BACK = {"an empty folder": (3, [9]), "another name": (2, [99])}


def test_what_is_saved_comes_back_bit_by_bit(three):
    folder, states = three
    (found, meta, damaged), said = restored(folder)
    assert (meta["round"], said, damaged) == (3, [], [])
    same(found["state"], states[3])
    assert isinstance(found["state"], type(template()["state"]))


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_one_is_passed_over_said_and_cleared(three, tmp_path, how):
    states = three[1]
    shutil.copytree(three[0], tmp_path / "c")
    DAMAGE[how](tmp_path / "c")
    (found, record, damaged), said = restored(tmp_path / "c")
    good, passed = GONE_BACK.get(how, (2, [3]))
    assert record["round"] == good
    same(found["state"], states[good])
    assert len(said) == len(passed)
    assert all("is damaged" in line for line in said)
    assert damaged == passed  # for the run to clear, which comes to those rounds again


def test_what_orbax_and_asyncio_say_of_damage_is_not_heard(three, tmp_path, caplog, monkeypatch):
    shutil.copytree(three[0], tmp_path / "c")
    flip(largest(tmp_path / "c", 3))
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", heard.append)
    with caplog.at_level(logging.ERROR):
        restored(tmp_path / "c")
    assert not heard
    assert not [entry for entry in caplog.records if entry.levelno >= logging.ERROR]
    sys.unraisablehook(SimpleNamespace(exc_value=ValueError("of others"), object=None))
    assert len(heard) == 1


def sound_record():
    standing = Progress(round=41, best_round=40, best_value=0.25, seconds=1.5, position=2817, stages={"compute": 0.125})
    record = {"standing": dataclasses.asdict(standing), "privacy": {"epsilon": None, "delta": None}}
    return checkpoint.seal_record(describe_run(make_config(TABLE), "d" * 64) | record, 41, "a" * 64)


def test_every_flipped_bit_of_a_record_is_noticed_or_changes_nothing():
    """Once 1,110 of 6,264 were taken as they were, and 1,093 ended in tracebacks."""
    record = sound_record()
    text, taken = json.dumps(record).encode(), 0
    for place in range(8 * len(text)):
        wrong = bytearray(text)
        wrong[place // 8] ^= 1 << place % 8
        try:
            found = json.loads(wrong.decode())
        except ValueError:
            continue
        if not checkpoint.find_damage(found, 41) and not record_problem(found):
            assert found == record
            taken += 1
    assert taken < 10  # an E for an e in a number


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"format": 1}, "format 1, this version reads format 3"),
        ({"standing": {"round": 41}}, "written by another version"),
        ({"standing": None}, "written by another version"),
        ({"standing": dataclasses.asdict(Progress(round=51))}, "belongs to round 51"),
        ({"step": 40}, "its record belongs to round 40"),
    ],
)
def test_records_of_other_versions_and_rounds_say_what_is_wrong(changes, what):
    record = sound_record() | changes
    record["sha256"] = checkpoint.record_digest(record)
    assert what in (checkpoint.find_damage(record, 41) or record_problem(record))


@pytest.mark.parametrize("document", [None, 3, "x", [], {}, {"sha256": 3}, {"format": 3}])
def test_other_documents_are_no_records(document):
    assert checkpoint.find_damage(document, 3)


def test_none_whole_is_an_error_that_loses_nothing(tmp_path):
    saved(tmp_path / "c", (1,))
    flip(largest(tmp_path / "c", 1))
    with pytest.raises(ValueError, match=r"none of the checkpoints \[1\] is whole \(the oldest: its arrays"):
        restored(tmp_path / "c")
    assert (tmp_path / "c" / "1").is_dir()


def test_no_checkpoint_yet(tmp_path):
    assert restored(tmp_path / "c")[0] is None


def test_the_reader_of_a_run_that_is_writing_changes_nothing(tmp_path):
    saved(tmp_path / "c", (1, 2))
    (tmp_path / "c" / "3.orbax-checkpoint-tmp").mkdir()
    flip(largest(tmp_path / "c", 2))
    before = sorted(tmp_path.rglob("*"))
    with checkpoint.open_checkpoints(tmp_path / "c") as checkpoints:
        _, meta, damaged = checkpoint.restore_newest(checkpoints, template(), lambda text: None)
    assert (meta["round"], damaged) == (1, [2])
    assert sorted(tmp_path.rglob("*")) == before


def test_other_data_are_told_before_arrays_are_read(tmp_path):
    saved(tmp_path / "c", (1,))
    flip(largest(tmp_path / "c", 1))

    def refuse(meta):
        raise ValueError("other data")

    with checkpoint.open_checkpoints(tmp_path / "c") as checkpoints, pytest.raises(ValueError, match="other data"):
        checkpoint.restore_newest(checkpoints, template(), lambda text: None, refuse)


def test_another_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    saved(tmp_path / "c", (1,))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="none .* its record has format 99, this version reads format 3"):
        restored(tmp_path / "c")
    assert (tmp_path / "c" / "1").is_dir()


def test_a_file_in_the_place_of_checkpoints(tmp_path):
    (tmp_path / "c").write_text("mine")
    with pytest.raises(ValueError, match="is a file, checkpoints belong there"):
        restored(tmp_path / "c")


def test_what_the_system_says_of_a_write_is_an_error_of_the_system(tmp_path):
    """TensorStore says it in a ValueError of two thousand characters."""
    words = "RESOURCE_EXHAUSTED: Error writing: No space left on device [os_error_code='28'] [tensorstore_spec='{}']"
    with pytest.raises(OSError, match="No space left") as told, checkpoint.disk_errors(tmp_path):
        raise ValueError(words)
    assert (told.value.errno, told.value.filename) == (errno.ENOSPC, str(tmp_path))
    assert told.value.strerror == os.strerror(errno.ENOSPC)
    with pytest.raises(ValueError, match="else"), checkpoint.disk_errors(tmp_path):
        raise ValueError("something else")


def test_another_shape_is_not_taken_for_this_run(tmp_path):
    saved(tmp_path / "c", (1,))
    params = jax.tree.map(lambda x: jnp.concatenate([x, x]) if x.ndim else x, MARKED)
    with (
        checkpoint.open_checkpoints(tmp_path / "c", keep=5) as checkpoints,
        pytest.raises(ValueError, match="none of the checkpoints"),
    ):
        checkpoint.restore_newest(checkpoints, {"state": ALGORITHM.init(params, KEY)}, lambda text: None)


def test_a_save_in_the_background_keeps_what_the_next_step_consumes(tmp_path):
    """The state is donated, and overwritten, while it is being written."""
    state, states = ALGORITHM.init(MARKED, KEY), {}
    with (
        checkpoint.open_checkpoints(tmp_path / "c", keep=9) as checkpoints,
        checkpoint.background_saver(checkpoints) as save,
    ):
        for step in (1, 2, 3):
            state, _ = ALGORITHM.step(state, row_cohort(), KEY)
            states[step] = jax.tree.map(np.array, state)
            save(step, {"state": state}, {"round": step})
    (found, meta, _), said = restored(tmp_path / "c")
    assert (meta["round"], said) == (3, [])
    same(found["state"], states[3])
    with checkpoint.open_checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.all_steps() == [1, 2, 3]


def test_several_runs_of_a_process_save_side_by_side(tmp_path):
    """As seeds in one program do. Orbax alone fails here: a folder for what it writes first exists already."""
    state, folders = ALGORITHM.init(MARKED, KEY), [tmp_path / name for name in "abcd"]
    with ExitStack() as held:
        checkpoints = [held.enter_context(checkpoint.open_checkpoints(folder, keep=9)) for folder in folders]
        saves = [held.enter_context(checkpoint.background_saver(each)) for each in checkpoints]
        for step in range(1, 7):
            state, _ = ALGORITHM.step(state, row_cohort(), KEY)
            for save in saves:
                save(step, {"state": state}, {"round": step})
    for folder in folders:
        (found, meta, _), said = restored(folder)
        assert (meta["round"], said) == (6, [])
        same(found["state"], state)


def test_a_save_that_fails_in_the_background_is_told(tmp_path, monkeypatch):
    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "save_checkpoint", full)
    with (
        checkpoint.open_checkpoints(tmp_path / "c", keep=9) as checkpoints,
        pytest.raises(OSError, match="no space"),
        checkpoint.background_saver(checkpoints) as save,
    ):
        save(1, {"state": template()}, {})
