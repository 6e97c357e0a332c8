"""scripts/digits.py: the three functions of the textbook are what the textbook says, and learn."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

SPEC = importlib.util.spec_from_file_location("digits", Path(__file__).parents[1] / "scripts" / "digits.py")
digits = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(digits)


@pytest.fixture(scope="module")
def images():
    return digits.load_images("digits")


def test_clients_share_all_pictures_and_see_few_digits(images):
    divided = digits.divide_among_clients(images, 20, 2)
    pixels = np.concatenate([each.pixels for each in divided])
    assert sorted(map(bytes, pixels)) == sorted(map(bytes, images.pixels))
    assert max(len(set(each.labels.tolist())) for each in divided) <= 4, "a piece lies across two digits at most"


def test_one_step_of_all_clients_is_a_step_on_all_pictures(images):
    """The gradient of the mean loss, however unevenly the pictures lie: federated averaging with one batch a client."""
    some = digits.Images(*(x[:98] for x in images))
    divided = [digits.Images(*(x[low:high] for x in some)) for low, high in ((0, 20), (20, 23), (23, 41), (41, 60))]
    divided += [digits.Images(*(x[low : low + 19] for x in some)) for low in (60, 79)]
    algorithm, key = digits.make_algorithm(6), jax.random.key(0)
    params = digits.NETWORK.init(key, some.pixels[:1])

    def mean_loss(params):
        logits = digits.NETWORK.apply(params, some.pixels)
        return optax.softmax_cross_entropy_with_integer_labels(logits, some.labels).mean()

    want = jax.tree.map(lambda x, g: x - 0.1 * g, params, jax.grad(mean_loss)(params))
    cohort = digits.pack_cohort(np.arange(6), divided, 1, 0, 0)
    state, info = algorithm.step(algorithm.init(params, key), cohort, key)
    for one, other in zip(*map(jax.tree.leaves, (state.shared.params, want)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    assert float(info["train/loss"]) == pytest.approx(float(mean_loss(params)), rel=1e-5)


def test_a_client_that_does_not_report_is_left_out(images):
    divided = [digits.Images(*(x[low : low + 20] for x in images)) for low in (0, 20)]
    algorithm, key = digits.make_algorithm(2), jax.random.key(0)
    params = digits.NETWORK.init(key, images.pixels[:1])
    both = digits.pack_cohort(np.arange(2), divided, 1, 0, 0)
    one = digits.pack_cohort(np.arange(1), divided, 1, 0, 0)
    missing = both._replace(present=np.array([True, False]))
    ends = [algorithm.step(algorithm.init(params, key), each, key)[0].shared.params for each in (missing, one)]
    for a, b in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert not all(jnp.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (ends[0], params)), strict=True))


def test_it_learns(images):
    cut = 1437
    train, test = (digits.Images(*(x[part] for x in images)) for part in (slice(cut), slice(cut, None)))
    found = digits.train_federated(train, test, rounds=30)
    assert found[0] < 0.3
    assert max(found[-5:]) > 0.8
