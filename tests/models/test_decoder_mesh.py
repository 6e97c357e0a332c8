"""A decoder's parameters over a mesh by name: rules, bytes of a device, and a round that is that of one device."""

import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxfed.models.decoder import PARTITION_RULES
from jaxfed.models.tensor_names import path_shapes

SCRIPT = Path(__file__).parents[2] / "scripts/abstract_memory.py"
spec = importlib.util.spec_from_file_location("abstract_memory", SCRIPT)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

AXES = ("clients", "model")
TYPES = {"axis_types": (AxisType.Auto, AxisType.Auto)}
SIZES = {"vocabulary": 32, "positions": 64, "width": 16, "layers": 2, "heads": 4, "key_value_heads": 2}
CONFIG = {
    "decoder": SIZES | {"head_width": 4, "hidden": 24},
    "base": {"param_dtype": "float32"},
    "lora": {"rank": 2, "pattern": "q_proj|v_proj"},
    "round": {"clients": 4, "steps": 2, "items": 30, "pieces": 4, "length": 5},
}


@pytest.fixture(scope="module")
def model():
    return script.make_abstract_model(CONFIG)[0]


def round_on(clients, devices, model):
    mesh = Mesh(np.array(jax.devices()[: clients * devices]).reshape(clients, devices), AXES, **TYPES)
    return script.make_round(mesh, CONFIG, model)


def test_rules_split_every_matrix_and_nothing_else(model):
    """Half of each on two devices: all but the norms, of which each device has all."""
    _, arguments = round_on(1, 2, model)
    base = arguments.frozen["text"]["base"]
    split = path_shapes(jax.tree.map(lambda x: jnp.zeros(x.sharding.shard_shape(x.shape)), base))
    for path, shape in path_shapes(base).items():
        assert np.prod(shape) == np.prod(split[path]) * (1 if "norm" in path else 2), path
    for pattern, _ in PARTITION_RULES:
        assert any(re.search(pattern, path) for path in split), pattern


def test_the_compiled_arguments_are_those_that_are_counted(model):
    """To the alignment of buffers, 64 bytes each; and temporaries hold no copy of the base for each client."""
    program, arguments = round_on(2, 2, model)
    memory = program.lower(*arguments).compile().memory_analysis()
    counted, leaves = script.device_bytes(arguments), len(jax.tree.leaves(arguments))
    assert memory.argument_size_in_bytes == pytest.approx(counted, abs=64 * leaves)


def test_a_mesh_without_devices_lowers(model):
    config = CONFIG | {"round": CONFIG["round"] | {"clients": 128}}
    program, arguments = script.make_round(AbstractMesh((128, 2), AXES, **TYPES), config, model)
    text = program.trace(*arguments).lower(lowering_platforms=("tpu", "cuda")).as_text()
    assert "num_partitions = 256" in text


@pytest.mark.parametrize(
    ("mesh", "said"),
    [
        ((1, 16), "has an axis of .*, which does not divide among 16 devices"),
        ((3, 1), "4 clients do not divide among the 3"),
    ],
)
def test_a_mesh_that_does_not_divide_is_refused(model, mesh, said):
    with pytest.raises(ValueError, match=said) as error:
        script.make_round(AbstractMesh(mesh, AXES, **TYPES), CONFIG, model)
    assert "\n" not in str(error.value)


def fill(arguments):
    """Arguments with numbers in them: parameters of size .3, moments of Adam not negative."""
    keys = iter(jax.random.split(jax.random.key(5), 500))

    def draw(x):
        if jnp.issubdtype(x.dtype, jnp.floating):
            return 0.3 * jnp.abs(jax.random.normal(next(keys), x.shape)).astype(x.dtype)
        return jax.random.randint(next(keys), x.shape, 0, 30).astype(x.dtype)

    frozen, cohort = jax.tree.map(draw, arguments.frozen), arguments.cohort
    state = jax.tree.map(lambda x: draw(x) if x.shape else jnp.zeros(x.shape, x.dtype), arguments.state)
    block = cohort.blocks[0]
    data = block.data._replace(
        rows=jnp.broadcast_to(jnp.arange(5), block.data.rows.shape),
        live=jnp.ones(block.data.live.shape, bool),
        batch={"sequence": jnp.broadcast_to(jnp.arange(5), block.data.rows.shape)},
        examples=jnp.array([1.0, 2, 3, 4]),
    )
    rows = jax.random.randint(next(keys), block.rows.shape, 0, 30)
    block = block._replace(slots=jnp.arange(4), rows=rows, num_train=data.examples, data=data)
    cohort = cohort._replace(ids=jnp.arange(4), present=jnp.ones(4, bool), blocks=(block,))
    return script.Arguments(frozen, state, cohort, jax.random.key(3))


def test_a_round_over_a_mesh_is_that_of_one_device(model):
    """Adapters after a round of Adam; products in bfloat16, sums over devices in another order."""
    found = []
    for clients, devices in ((1, 1), (2, 2)):
        program, arguments = round_on(clients, devices, model)
        given = jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), fill(arguments), arguments)
        before = jax.tree.map(np.asarray, given.state.shared.params)
        state, _ = program(*given)
        found.append(jax.tree.map(lambda a, b: np.asarray(a) - b, state.shared.params, before))
    for one, many in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(many, one, atol=0.05 * np.abs(one).max())
        assert np.abs(one).max() > 1e-5
