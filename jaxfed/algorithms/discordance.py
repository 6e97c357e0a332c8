"""How far the product of mean low-rank factors is from the mean of their products, measured in every round."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.core.leaf_paths import list_leaves
from jaxfed.core.method import Method
from jaxfed.core.model import Model
from jaxfed.core.types import Mean, Tree

PROBES = 16  # random directions of the output in which a product is measured
PREFIX = "lora/layer"


def flatten_product(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(A [in, r], B [r, out]) of factors with more axes."""
    return a.reshape(-1, a.shape[-1]), b.reshape(b.shape[0], -1)


def list_products(params: Tree) -> list[tuple[jax.Array, jax.Array]]:
    """(A [in, r], B [r, out]) of each layer that has adapters."""
    pairs = zip(jax.tree.leaves(params["lora_a"]), jax.tree.leaves(params["lora_b"]), strict=True)
    return [flatten_product(a, b) for a, b in pairs]


def draw_probes(width: int, number: int) -> np.ndarray:
    """float32 [width, p]: p random orthonormal columns, p = min(width, `PROBES`). number: the seed."""
    drawn = np.random.default_rng(number).normal(size=(width, min(width, PROBES)))
    return np.linalg.qr(drawn)[0].astype(np.float32)


def probe_products(params: Tree, update: Tree) -> dict[str, jax.Array]:
    """{name: array} of one client, of each layer; `summarize_discordance` reads their means over clients."""
    found: dict[str, jax.Array] = {}
    for i, ((a, b), (da, db)) in enumerate(zip(list_products(params), list_products(update), strict=True)):
        probes = draw_probes(b.shape[1], i)
        after = (a - da) @ ((b - db) @ probes)
        parts = {"update": after - a @ (b @ probes), "product": da @ (db @ probes), "a": da, "b": db @ probes}
        found |= {f"{PREFIX}{i}/{name}": x for name, x in parts.items()}
    return found


def summarize_discordance(figures: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The figures of a round, with `lora/discordance` instead of the means that it is computed from."""
    parts = {name: x for name, x in figures.items() if name.startswith(PREFIX)}
    rest = {name: x for name, x in figures.items() if name not in parts}
    layers = {name.rsplit("/", 1)[0] for name in parts}
    gap = sum(jnp.square(parts[f"{x}/product"] - parts[f"{x}/a"] @ parts[f"{x}/b"]).sum() for x in sorted(layers))
    moved = sum(jnp.square(parts[f"{x}/update"]).sum() for x in sorted(layers))
    return rest | {"lora/discordance": jnp.sqrt(gap / jnp.where(moved > 0, moved, 1))}


def measure_discordance(method: Method) -> Method:
    """The same method, whose rounds report `lora/discordance`: the error of averaging factors instead of products.

    It is |mean(A_i B_i) - mean(A) mean(B)| / |mean(A_i B_i) - A B|. A and B are the factors of low-rank adapters (LoRA,
    Hu et al. 2022) that are sent, A_i and B_i those of a client after training. The difference is the covariance
    (1/m) sum (A_i - mean(A)) (B_i - mean(B)). Norms are over all layers, and all clients have the same weight. For a
    product wider than 16 numbers it is an estimate, from 16 fixed random directions.

    It is a figure of the simulator, as the training loss is: no server learns it. It is computed from what clients
    train, before any link, so secure sums, noise and quantization do not change it.

    Args:
        method: A method whose update is the shared part at the start less the shared part at the end.

    Returns:
        The method.

    Example:
        >>> import jaxfed as jf, jax.numpy as jnp, optax
        >>> method = jf.algorithms.fedavg(jf.models.mf(num_items=100), optax.sgd(0.1))
        >>> made = jf.algorithms.measure_discordance(method)
        >>> means = {"update": jnp.ones((4, 2)), "product": jnp.ones((4, 2))}
        >>> means |= {"a": jnp.ones((4, 1)), "b": jnp.zeros((1, 2))}
        >>> made.summarize_metrics({f"lora/layer0/{name}": x for name, x in means.items()})["lora/discordance"].item()
        1.0
    """
    work = method.work

    def update(shared, client_state, steps, key):
        report = work.update(shared, client_state, steps, key)
        parts = probe_products(shared.params["params"], report.update.params["params"])
        means = {name: Mean(x, 1.0) for name, x in parts.items()}
        return report._replace(metrics=report.metrics | means)

    def summarize(figures):
        return summarize_discordance(method.summarize_metrics(figures))

    return method._replace(work=work._replace(update=update), summarize_metrics=summarize)


def has_factors(params: Tree) -> bool:
    """Whether both factors of low-rank adapters are among shared parameters, for the same layers."""
    dense = params.get("params") if isinstance(params, dict) else None
    if not isinstance(dense, dict) or not {"lora_a", "lora_b"} <= dense.keys():
        return False
    paths = [list_leaves(dense[name]).keys() for name in ("lora_a", "lora_b")]
    return len(paths[0]) > 0 and paths[0] == paths[1]


def add_discordance(method: Method, model: Model) -> Method:
    """The method, with `lora/discordance` where clients train both factors of adapters and send differences."""
    if not method.sends_difference or method.is_central:
        return method
    return measure_discordance(method) if has_factors(jax.eval_shape(model.init, jax.random.key(0))) else method


def check_factors(rule: str, params: Tree) -> None:
    """Raises ValueError where not both factors of adapters are among shared parameters."""
    if not has_factors(params):
        raise ValueError(
            f"{rule}: the model does not share both factors of low-rank adapters: take text_lora with the rule fedit"
        )
