"""What lies where on a mesh: rules by name, and rounds that are the same wherever arrays lie."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import jaxfed as jf
from jaxfed.config.mesh import count_devices, make_rules
from jaxfed.config.registry import REGISTRY
from jaxfed.core.partition import check_rules, make_shardings
from jaxfed.core.placement import make_mesh, make_placement
from jaxfed.models.lora import LoraSettings
from jaxfed.models.text_lora import text_lora
from tests.composed import pack_small_run
from tests.core.test_lowering import check_round
from tests.models.test_text_lora import DIM, ENCODER, texts
from tests.small import KEY, close

KERNELS = {"pattern": "(query|intermediate).*kernel", "axes": ["", "model"]}
FACTORS = {"pattern": "lora_a/.*", "axes": ["model"]}
TABLES = {"pattern": "tables/bias", "axes": ["model"]}
QUERY = "['layer_0']['query']['kernel']"
MESHES = {"2 x 2": {"clients": 2, "model": 2}, "1 x 4": {"clients": 1, "model": 4}}


ON_ONE: list = []  # the parameters after the same rounds on one device


def mesh_of(devices, model):
    return make_mesh(jax.devices()[:devices], model)


def test_the_first_rule_that_matches_counts():
    rules = [("query/kernel$", PartitionSpec(None, "model")), ("kernel$", PartitionSpec("clients"))]
    tree = {
        "query": {"kernel": np.zeros((4, 8)), "bias": np.zeros(8)},
        "dense": {"kernel": np.zeros((6, 8))},
        "scale": {"kernel": np.zeros(())},  # as the step count of an optimiser: fewer axes than the rule
        "item": jf.Table(np.zeros((16, 3))),
    }
    found = make_shardings(mesh_of(4, 2), rules, tree, PartitionSpec(("clients", "model")))
    specs = jax.tree.map(lambda x: x.spec, found)
    assert specs["query"] == {"kernel": PartitionSpec(None, "model"), "bias": PartitionSpec()}
    assert specs["dense"]["kernel"] == PartitionSpec("clients")
    assert specs["scale"]["kernel"] == PartitionSpec()
    assert specs["item"].rows == PartitionSpec(("clients", "model"))
    laid = jax.device_put(tree, found)
    assert laid["query"]["kernel"].addressable_shards[0].data.shape == (4, 4)
    assert laid["item"].rows.addressable_shards[0].data.shape == (4, 3)


def test_rules_that_do_not_fit():
    rules = [("kernel$", PartitionSpec(None, "model"))]
    with pytest.raises(ValueError, match=r"run.partition: a/kernel has an axis of 7, which does not divide among 2"):
        make_shardings(mesh_of(2, 2), rules, {"a": {"kernel": np.zeros((3, 7))}})
    with pytest.raises(ValueError, match=r'"kernel\$" is in the name of no array with 2 or more axes: .* are b$'):
        check_rules(rules, {"a": {"kernel": np.zeros(3)}, "b": np.zeros((2, 2))})
    with pytest.raises(ValueError, match=r'"\^a/kernel" is in the name of no array'):
        check_rules([("^a/kernel", PartitionSpec("model"))], {"a": {"kernel": np.zeros((2, 2))}})
    for axes, pattern, words in (
        (("rows",), "x", 'no axis "rows" of the mesh: there are clients and model'),
        (("",), "x", "at least one of them named"),
        (("model",), "(", "is no regular expression"),
    ):
        with pytest.raises(ValueError, match=words):
            make_rules((jf.Partition(pattern, axes),))


def test_meshes_that_do_not_fit():
    with pytest.raises(ValueError, match="3 devices do not divide among 2 of the model axis"):
        make_placement(devices=3, model=2)
    with pytest.raises(ValueError, match="run.mesh has 4 devices and run.devices is 8"):
        count_devices(jf.MeshAxes(2, 2), 8)
    with pytest.raises(ValueError, match="devices asked for, 8 are there"):
        make_placement(devices=count_devices(jf.MeshAxes(8, 2), 1), model=2)
    with pytest.raises(ValueError, match="copies its model to every device: choose jit"):
        make_placement("pmap", 4, model=2)


@pytest.fixture
def adapted(monkeypatch):
    """A run with an encoder as the frozen base: what the clients adapt, and what they read."""

    def build(num_items, num_users):
        ids = np.resize(texts(), (num_items, texts().shape[1]))
        return text_lora(num_items, ENCODER, ids, num_users, DIM, LoraSettings(2, alpha=4.0), "fedit")

    monkeypatch.setitem(REGISTRY["model"], "adapted", build)

    def run(rounds=2, **placing):
        made, cohort = pack_small_run(
            model={"name": "adapted"},
            work={"batch_size": 8, "optimizer": {"name": "sgd", "learning_rate": 0.3}},
            channel=[{"name": "weighted_mean"}],
            server={"name": "sgd", "momentum": 0.9, "lazy": False},
            run={"area": 64, **placing},
        )
        cohort = cohort._replace(blocks=tuple(map(made.placement.block, cohort.blocks)))
        state = made.algorithm.init(made.model.init(KEY), KEY)
        for _ in range(rounds):
            state, _ = made.algorithm.step(state, cohort, KEY)
        return made, state

    return run


@pytest.mark.parametrize("name", MESHES)
def test_rounds_are_the_same_on_any_mesh(name, adapted):
    """Clients of very different lengths, one of which drops out; the frozen base, adapters, a table and the optimiser's
    memory split by rules. Sums are taken in another order, so they are equal to float32."""
    if not ON_ONE:
        ON_ONE.append(adapted(shard_tables=True)[1].shared.params)  # padded, on one device
    made, got = adapted(mesh=MESHES[name], partition=[KERNELS, FACTORS, TABLES])
    model = MESHES[name]["model"]
    close(got.shared.params, ON_ONE[0], atol=2e-5)
    base = made.algorithm.step.args[2].clients
    (kernel,) = [x for path, x in jax.tree_util.tree_flatten_with_path(base)[0] if QUERY in jax.tree_util.keystr(path)]
    assert kernel.addressable_shards[0].data.shape == (kernel.shape[0], kernel.shape[1] // model)
    for tree in (got.shared.params, got.opt):
        for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
            if "lora_a" in jax.tree_util.keystr(path) and x.ndim == 2:
                assert x.addressable_shards[0].data.shape[0] == x.shape[0] // model
    table = got.shared.params["tables"]["bias"].rows
    assert table.addressable_shards[0].data.shape[0] == table.shape[0] // model


def test_it_lowers_for_accelerators(adapted):
    """With its shardings: the factors [in, r] that the server keeps lie over the model axis in the program."""
    made, _ = adapted(rounds=0, mesh=MESHES["2 x 2"], partition=[KERNELS, FACTORS, TABLES])
    text = check_round(made)
    assert made.placement.devices == 4
    assert "model" in text
    assert re.search(r'<@mesh, \[\{"model"\}, \{\}\]> : tensor<\d+x2xf32>', text)
