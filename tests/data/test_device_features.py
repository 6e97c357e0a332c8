"""Features and flipped labels of batches that are drawn on the device."""

import jax
import numpy as np
import pytest

from jaxfed.data.batching import Batching
from jaxfed.data.blocks import make_block_shapes
from jaxfed.data.device_cohorts import make_drawer
from jaxfed.data.packing import pack_cohort
from jaxfed.data.preparation import prepare_population
from jaxfed.data.sources.synthetic import synthetic_data

DATA = synthetic_data(60, 50, mean_length=12)
POPULATION = prepare_population(DATA)[1]
FLIPPED = prepare_population(DATA, malicious=0.3, label_flip=True)[1]
ITEMS, CLIENTS = POPULATION.num_items, POPULATION.num_clients
BATCHINGS = {"items": Batching(8, 4), "pairs": Batching(7, 3, 2, pairwise=True)}
SIDES = [("user", "item"), ("item",)]


def draw_both(batching, population, lazy=True):
    """The same clients drawn on the device and by the host, with other random numbers."""
    ids = np.array([*range(0, CLIENTS, 2), CLIENTS, CLIENTS])
    shapes = make_block_shapes(population, batching, len(ids), 1, 16, lazy)
    args = ids, ids < CLIENTS, 3, 0
    return (
        make_drawer(population, batching, shapes).draw(*args),
        pack_cohort(population, batching, shapes, *args),
        shapes,
    )


@pytest.mark.parametrize("name", BATCHINGS)
@pytest.mark.parametrize("sides", SIDES)
def test_features_are_those_of_a_steps_rows_and_user(name, sides):
    """Also where rounds run on all rows."""
    cohort, host, shapes = draw_both(BATCHINGS[name]._replace(features=sides), POPULATION, lazy=name == "items")
    assert jax.tree.structure(host) == jax.tree.structure(cohort)
    forms = [[(np.shape(x), np.asarray(x).dtype) for x in jax.tree.leaves(each)] for each in (host, cohort)]
    assert forms[0] == forms[1], "the same programs run both"
    assert not any(x.weak_type for x in jax.tree.leaves(cohort) if isinstance(x, jax.Array))
    cohort = jax.device_get(cohort)
    found = 0
    for block in cohort.blocks:
        rows = block.rows if cohort.rows is None else np.append(cohort.rows, shapes.end)[block.rows]
        held = np.concatenate([rows, np.full((len(rows), 1), ITEMS)], 1)
        at = np.minimum(block.data.rows, rows.shape[1]).reshape(len(rows), -1)
        item = np.take_along_axis(held, at, 1).reshape(block.data.rows.shape)
        user = np.append(cohort.ids, CLIENTS)[block.slots][:, None]
        batch = block.data.batch
        assert {"user_features", "item_features"} & {*batch} == {f"{side}_features" for side in sides}
        if "item" in sides:
            np.testing.assert_array_equal(batch["item_features"], POPULATION.item_features.rows(item))
        if "user" in sides:
            user = np.where(block.data.live, user, CLIENTS)
            np.testing.assert_array_equal(batch["user_features"], POPULATION.user_features.rows(user))
        found += (item < ITEMS).sum()
    assert found > 100


@pytest.mark.parametrize("name", BATCHINGS)
def test_attackers_have_positives_and_negatives_exchanged(name):
    """And everything else is as without them; as the host flips them, too."""
    cohort, host, _ = draw_both(BATCHINGS[name], FLIPPED)
    plain = draw_both(BATCHINGS[name], FLIPPED._replace(label_flipped=None))[0]
    forms = [[(np.shape(x), np.asarray(x).dtype) for x in jax.tree.leaves(each)] for each in (host, cohort)]
    assert forms[0] == forms[1]
    attackers = 0
    for block, honest, drawn in zip(cohort.blocks, plain.blocks, host.blocks, strict=True):
        is_flipped = np.append(FLIPPED.label_flipped, False)[np.append(cohort.ids, CLIENTS)[block.slots]]
        attackers += is_flipped.sum()
        np.testing.assert_array_equal(block.rows, honest.rows)
        np.testing.assert_array_equal(block.data.rows, honest.data.rows)
        batch, other = block.data.batch, honest.data.batch
        assert batch.keys() == other.keys()
        for key, lane in ((key, lane) for key in batch for lane in range(len(is_flipped))):
            exchanged = {"item": "other", "other": "item"}.get(key, key) if is_flipped[lane] else key
            want = np.asarray(other[exchanged][lane])
            if key == "label" and is_flipped[lane]:
                want = np.where(np.asarray(block.data.rows[lane]) < ITEMS, 1 - want, 0)
            np.testing.assert_array_equal(batch[key][lane], want)
        if "label" in batch:  # each lane has as many labels of 1 as on the host, where repeats count
            clicks = [np.sum(x.data.batch["label"] * x.data.batch["weight"], (1, 2)) for x in (block, drawn)]
            np.testing.assert_allclose(*clicks, rtol=1e-6)
    assert 0 < attackers < CLIENTS // 2
