"""Checkpoints: whole or not at all, and back to the newest that is whole."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxfed import checkpoint
from jaxfed.channels.weigh import per_row_mean
from tests.small import KEY, MARKED, factorisation, row_cohort, run, same

ALGORITHM = factorisation(per_row_mean(), server=optax.adam(0.1))


def template():
    return {"state": ALGORITHM.init(MARKED, KEY)}


def saved(folder, steps=(1, 2, 3)):
    """Checkpoints of a run after some rounds; returns {round: state on the host}."""
    states = {}
    with checkpoint.manager(folder, keep=5) as checkpoints:
        for step in steps:
            state = run(ALGORITHM, row_cohort(), rounds=step)[0]
            states[step] = jax.tree.map(np.asarray, state)
            checkpoint.save(checkpoints, step, {"state": state}, {"round": step})
            checkpoints.wait_until_finished()
    return states


def restored(folder):
    said = []
    with checkpoint.manager(folder, keep=5) as checkpoints:
        found = checkpoint.restore(checkpoints, template(), said.append)
        return found, said


def largest(folder, step):
    """The largest file of arrays: what a small state is called takes more room than what is in it."""
    return max((folder / str(step) / "state" / "d").iterdir(), key=lambda f: f.stat().st_size)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a flipped bit": lambda folder: flip(largest(folder, 3)),
    "cut short": lambda folder: largest(folder, 3).open("r+b").truncate(100),
    "no metadata": lambda folder: (folder / "3" / "state" / "_METADATA").unlink(),
    "no arrays": lambda folder: [f.unlink() for f in (folder / "3" / "state").rglob("*") if f.is_file()],
    "no JSON": lambda folder: [f.unlink() for f in (folder / "3" / "meta").rglob("*") if f.is_file()],
    "an empty folder": lambda folder: (folder / "9").mkdir(),
}


def test_what_is_saved_comes_back_bit_by_bit(tmp_path):
    states = saved(tmp_path / "c")
    (found, meta, damaged), said = restored(tmp_path / "c")
    assert (meta["round"], said, damaged) == (3, [], [])
    same(found["state"], states[3])
    assert isinstance(found["state"], type(template()["state"]))


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_one_is_passed_over_said_and_cleared(tmp_path, how):
    states = saved(tmp_path / "c")
    DAMAGE[how](tmp_path / "c")
    (found, meta, damaged), said = restored(tmp_path / "c")
    good = 3 if how == "an empty folder" else 2
    assert meta["round"] == good
    same(found["state"], states[good])
    assert len(said) == 1
    assert "is damaged" in said[0]
    assert damaged == [max(3, good + 1) if good == 2 else 9]  # for the run to clear, which comes to those rounds again


def test_none_whole_is_an_error_that_loses_nothing(tmp_path):
    saved(tmp_path / "c", (1,))
    flip(largest(tmp_path / "c", 1))
    with pytest.raises(ValueError, match=r"none of the checkpoints \[1\] is whole"):
        restored(tmp_path / "c")
    assert (tmp_path / "c" / "1").is_dir()


def test_no_checkpoint_yet(tmp_path):
    assert restored(tmp_path / "c")[0] is None


def test_the_reader_of_a_run_that_is_writing_changes_nothing(tmp_path):
    saved(tmp_path / "c", (1, 2))
    (tmp_path / "c" / "3.orbax-checkpoint-tmp").mkdir()
    flip(largest(tmp_path / "c", 2))
    before = sorted(tmp_path.rglob("*"))
    with checkpoint.manager(tmp_path / "c") as checkpoints:
        _, meta, damaged = checkpoint.restore(checkpoints, template(), lambda text: None)
    assert (meta["round"], damaged) == (1, [2])
    assert sorted(tmp_path.rglob("*")) == before


def test_other_data_are_told_before_arrays_are_read(tmp_path):
    saved(tmp_path / "c", (1,))
    flip(largest(tmp_path / "c", 1))

    def refuse(meta):
        raise ValueError("other data")

    with checkpoint.manager(tmp_path / "c") as checkpoints, pytest.raises(ValueError, match="other data"):
        checkpoint.restore(checkpoints, template(), lambda text: None, refuse)


def test_another_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    saved(tmp_path / "c", (1,))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="has format 99"):
        restored(tmp_path / "c")


def test_another_shape_is_not_taken_for_this_run(tmp_path):
    saved(tmp_path / "c", (1,))
    params = jax.tree.map(lambda x: jnp.concatenate([x, x]) if x.ndim else x, MARKED)
    with (
        checkpoint.manager(tmp_path / "c", keep=5) as checkpoints,
        pytest.raises(ValueError, match="none of the checkpoints"),
    ):
        checkpoint.restore(checkpoints, {"state": ALGORITHM.init(params, KEY)}, lambda text: None)


def test_a_save_in_the_background_keeps_what_the_next_step_consumes(tmp_path):
    """The state is donated, and overwritten, while it is being written."""
    state, states = ALGORITHM.init(MARKED, KEY), {}
    with (
        checkpoint.manager(tmp_path / "c", keep=9) as checkpoints,
        checkpoint.background(checkpoints) as save,
    ):
        for step in (1, 2, 3):
            state, _ = ALGORITHM.step(state, row_cohort(), KEY)
            states[step] = jax.tree.map(np.array, state)
            save(step, {"state": state}, {"round": step})
    (found, meta, _), said = restored(tmp_path / "c")
    assert (meta["round"], said) == (3, [])
    same(found["state"], states[3])
    with checkpoint.manager(tmp_path / "c") as checkpoints:
        assert checkpoints.all_steps() == [1, 2, 3]


def test_a_save_that_fails_in_the_background_is_told(tmp_path, monkeypatch):
    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "save", full)
    with (
        checkpoint.manager(tmp_path / "c", keep=9) as checkpoints,
        pytest.raises(OSError, match="no space"),
        checkpoint.background(checkpoints) as save,
    ):
        save(1, {"state": template()}, {})
