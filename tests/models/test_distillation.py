"""A student that learns a teacher's scores at the server, of histories that nobody has."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfed as jf
from jaxfed.config.build import build_from_config, load_data
from jaxfed.config.distilled_start import find_teacher
from jaxfed.config.schema import make_config
from jaxfed.config.start import SavedModel
from jaxfed.core.client_work import identity
from jaxfed.models import distillation
from jaxfed.models.distillation import (
    distil_scores,
    draw_histories,
    mask_history,
    mean_divergence,
    score_by_history,
    score_divergence,
)
from jaxfed.training.rounds import initial_arrays
from tests.small import close

ITEMS, KEY = 24, jax.random.key(0)
RUN = {
    "data": {"name": "synthetic", "users": 40, "items": ITEMS, "mean_length": 8.0},
    "model": {"name": "sasrec", "dim": 8, "length": 6, "blocks": 1, "dropout": 0.0},
    "work": {"name": "gradient", "negatives": 4},
    "channel": [{"name": "weighted_mean"}],
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in (("HISTORIES", 512), ("LENGTH", 6), ("BATCH", 16), ("RATE", 0.02)):
        monkeypatch.setattr(distillation, name, value)


def test_a_student_whose_rows_are_codes_learns_every_item():
    """Its shared part has no rows of items; the first item is one like others, and the teacher's favourite."""
    codes = np.stack([np.arange(ITEMS) // 5, np.arange(ITEMS) % 5], 1)
    model = jf.models.code_rows(jf.models.sasrec(ITEMS, dim=8, length=6, blocks=1, dropout=0.0), codes)

    def teach(history):
        return jnp.where(jnp.arange(ITEMS) == 0, 4.0, 0.0)

    params, losses = distil_scores(model, model.init(KEY), teach, KEY, 300)
    assert losses[-1] < 0.3 * losses[0]
    scores = score_by_history(model, params, jnp.array([3, 9, 14]))
    assert scores[:ITEMS].argmax() == 0


def test_a_student_that_can_hold_the_teachers_scores_approaches_them():
    """The teacher is a model of the student's sizes. A third of its catalogue is unknown, which nobody draws."""
    model = jf.models.sasrec(ITEMS, dim=8, length=6, blocks=1, dropout=0.0)
    taught = jax.tree.map(lambda x: 3 * x, model.init(jax.random.key(5)))
    known = np.arange(ITEMS) % 3 > 0

    def teach(history):
        return jnp.where(known, 20 * score_by_history(model, taught, history), -jnp.inf)

    drawn = np.asarray(draw_histories(teach, KEY))
    assert drawn.shape == (512, 6)
    assert all(len({*row}) == 6 and known[row].all() for row in drawn.tolist())
    params, losses = distil_scores(model, model.init(KEY), teach, KEY, 300)
    assert losses[0] > 0.05
    assert losses[-1] < 0.5 * losses[0]
    fresh = np.asarray(draw_histories(teach, jax.random.key(9)))[:, :4]
    gaps = [mean_divergence(model, teach, identity, each, fresh) for each in (model.init(KEY), params)]
    assert gaps[1] < 0.6 * gaps[0]  # on histories that it was not taught


def test_the_divergence_is_that_of_the_softmax_over_known_items():
    teacher, student = np.array([0.3, -np.inf, 2.0, -1.0]), np.array([1.0, 5.0, 0.5, 0.0])
    p, q = (np.exp(x[[0, 2, 3]]) / np.exp(x[[0, 2, 3]]).sum() for x in (teacher, student))
    assert score_divergence(jnp.array(teacher), jnp.array(student)) == pytest.approx(
        np.sum(p * np.log(p / q)), rel=1e-5
    )
    assert score_divergence(jnp.array(teacher), jnp.array(teacher) + 7) == pytest.approx(0, abs=1e-6)
    slope = jax.grad(partial(score_divergence, jnp.array(teacher)))(jnp.array(student))
    assert np.isfinite(slope).all()


def test_a_run_starts_with_what_its_model_has_learnt(caplog):
    """Of a teacher with other items, in another order. Clients send and receive what they do without it."""
    config = make_config(RUN | {"start": {"run": "other", "distil_steps": 120, "distil_temperature": 0.5}})
    data = load_data(config.data)
    items = np.append(np.random.default_rng(0).permutation(data.source.items)[2:], "new")
    liked, like = jax.random.normal(KEY, (len(items),)), jax.random.normal(KEY, (len(items), len(items)))

    def score(history):
        return liked + 0.01 * like.at[history].get(mode="fill", fill_value=0).sum(0)

    saved = SavedModel("other", {}, None, items, items, (), items, score)
    rows = np.array([np.flatnonzero(items == name)[0] if name in items else -1 for name in data.source.items])
    history = jnp.array([*np.flatnonzero(rows >= 0)[[3, 7, 1]], len(rows)], jnp.int32)
    want = np.where(rows >= 0, score(jnp.asarray(rows)[history[:3]])[rows] / 0.5, -np.inf)
    close(find_teacher(config.start, saved, data)(history), want, atol=1e-5)
    with caplog.at_level("INFO", logger="jaxfed"):
        parts = build_from_config(config, data, saved=saved)
        taught = initial_arrays(parts, 0)["best"][0]
    assert "start: the scores of other learnt in 120 steps: divergence" in caplog.text
    alone = build_from_config(make_config(RUN), data)
    wanted, gaps = mask_history(jnp.asarray(want), history), []
    for shared in (taught, initial_arrays(alone, 0)["best"][0]):
        gaps.append(float(score_divergence(wanted, score_by_history(parts.model, shared, history))))
    assert gaps[0] < 0.6 * gaps[1]
    sizes = np.array([0, 5])
    assert (parts.wire.up(sizes) == alone.wire.up(sizes)).all()


@pytest.mark.parametrize(
    ("score", "more", "words"),
    [
        (
            len,
            {"model": {"name": "mf"}, "work": {}},
            "does not score users by their histories: take a model of sequences",
        ),
        (None, {}, "the model in other does not score histories alone"),
        (len, {"start": {"run": "other", "distil_steps": 1, "distil_temperature": 0.0}}, "distil_temperature is 0"),
        (len, {}, "no item of other is in these data"),
    ],
)
def test_what_cannot_be_taught_is_refused(score, more, words):
    config = make_config(RUN | {"start": {"run": "other", "distil_steps": 1}} | more)
    saved = SavedModel("other", {}, None, np.array(["x"]), np.array([""]), (), np.array([]), score)
    with pytest.raises(ValueError, match=words):
        build_from_config(config, load_data(config.data), saved=saved)
