"""One round of the library on small data, and the gradient of the model as a function of what its server holds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxfed.config.build import build_from_config, load_data
from jaxfed.config.schema import make_config
from jaxfed.core.federate import federate
from jaxfed.core.link import link
from jaxfed.core.parametrization import frozen_arguments
from jaxfed.core.tables import Table
from jaxfed.data.packing import pack_cohort
from tests.small import KEY

TABLE = {
    "rounds": 2,
    "data": {"name": "synthetic", "users": 30, "items": 80, "mean_length": 12.0},
    "model": {"dim": 5},
    "work": {"name": "gradient", "batch_size": 8, "optimizer": {"name": "sgd", "learning_rate": 0.1}},
    "channel": [],
    "cohort": {"name": "everyone"},
}


def pack_small_run(**more):
    """(experiment, cohort) of the real packer: clients of very different lengths, and one that drops out."""
    config = make_config(TABLE | more)
    made = build_from_config(config, load_data(config.data))
    ids, present = made.sampler.draw(0, 0)
    lengths = made.data.population.num_train
    assert lengths.max() > 4 * lengths.min()
    present = np.array(present)
    present[np.argsort(lengths)[-2]] = False
    assert len(made.shapes.kinds) > 1
    return made, pack_cohort(made.data.population, made.batching, made.shapes, ids, present, 0, 0)


def round_and_gradient(it, cohort, made, theta):
    """(what a round takes from theta, the gradient of the sum over clients of the mean loss over a client's examples,
    on whole tables and without any packing). made: the parametrization; None: there is none."""
    method = it.method._replace(parametrization=made, server=optax.sgd(1.0))
    algorithm = federate(method, link(), it.data.population.num_clients)
    state = algorithm.init(theta, KEY)
    private = jax.tree.map(np.asarray, state.client_states.work)
    after, _ = algorithm.step(state, cohort, KEY)
    beside, catalogue = frozen_arguments(made.frozen) if made else (), it.data.num_items

    def total_loss(theta):
        params, total = made.forward(theta, None, *beside) if made else theta, 0.0
        for block in cohort.blocks:
            for j, slot in enumerate(block.slots):
                if slot >= len(cohort.ids) or not cohort.present[slot]:
                    continue
                own = jax.tree.map(lambda x, i=cohort.ids[slot]: x[i], private)
                held = block.rows[j] if cohort.rows is None else np.append(cohort.rows, catalogue)[block.rows[j]]
                live, batch = block.data.live[j], jax.tree.map(lambda x, j=j: x[j], block.data.batch)
                items = np.append(held, catalogue)[np.minimum(block.data.rows[j], len(held))]
                sums = weights = 0.0
                for s in np.flatnonzero(live):
                    cut = jax.tree.map(
                        lambda x, at=items[s]: (
                            Table(x.rows.at[at].get(mode="fill", fill_value=0)) if isinstance(x, Table) else x
                        ),
                        params,
                        is_leaf=lambda x: isinstance(x, Table),
                    )
                    seen = it.model.loss(cut, own, jax.tree.map(lambda x, s=s: x[s], batch))
                    sums, weights = sums + seen.total, weights + seen.weight
                total = total + sums / weights
        return total

    return jax.tree.map(jnp.subtract, theta, after.shared.params), jax.grad(total_loss)(theta)
