"""What a configuration can name: functions by section and name. Adding one is adding a line here.

A section of a configuration holds `name` and that function's keyword arguments with a default. Arguments without one
(`num_items`, `num_clients`, ...) are given by the program.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from jaxfed.algorithms.adaptive import fedadagrad, fedadam, fedyogi
from jaxfed.algorithms.agnostic import agnostic, agnostic_mean
from jaxfed.algorithms.apfl import apfl
from jaxfed.algorithms.central import central
from jaxfed.algorithms.closed_form import closed_form, move_to_solution
from jaxfed.algorithms.ditto import ditto
from jaxfed.algorithms.fedask import fedask
from jaxfed.algorithms.fedavg import fedavg, fedprox
from jaxfed.algorithms.fedbuff import fedasync, fedbuff
from jaxfed.algorithms.feddyn import add_server_memory, feddyn
from jaxfed.algorithms.fednova import fednova, normalize_steps
from jaxfed.algorithms.fedrecon import fedrecon
from jaxfed.algorithms.fedrep import fedrep
from jaxfed.algorithms.fedrolex import fedrolex
from jaxfed.algorithms.fedsgd import fedsgd
from jaxfed.algorithms.gpfedrec import gpfedrec
from jaxfed.algorithms.hetefedrec import hetefedrec
from jaxfed.algorithms.heterofl import heterofl
from jaxfed.algorithms.ifca import ifca
from jaxfed.algorithms.layerdrop import layerdrop
from jaxfed.algorithms.local_training import train_locally
from jaxfed.algorithms.lora_products import fedex_lora, flexlora, flora
from jaxfed.algorithms.mime import mime
from jaxfed.algorithms.ptf_fedrec import ptf_fedrec
from jaxfed.algorithms.qfedavg import fair_mean, qfedavg
from jaxfed.algorithms.raflora import raflora
from jaxfed.algorithms.rolora import rolora
from jaxfed.algorithms.scaffold import scaffold
from jaxfed.attacks.updates import promote_items, random_update, scale_update, sign_flip
from jaxfed.channels.average import cluster_mean, mean, per_row_mean, weighted_mean
from jaxfed.channels.clip import adaptive_clip, clip, clip_per_row, zero_out
from jaxfed.channels.compress import drive, quantize, sign
from jaxfed.channels.correlated import correlated
from jaxfed.channels.difference import difference
from jaxfed.channels.discrete import discrete_gaussian
from jaxfed.channels.integer_noise import skellam
from jaxfed.channels.krum import krum
from jaxfed.channels.linear_maps import low_rank, rotate
from jaxfed.channels.noise import densify, gaussian, local_gaussian
from jaxfed.channels.robust import geometric_median, median, trimmed_mean
from jaxfed.channels.secure_sum import pads, ring
from jaxfed.channels.sparse import random_k, top_k
from jaxfed.channels.staleness import mixing, staleness
from jaxfed.config.generative_models import read_code_decoder, read_code_rows, read_decoder_lora
from jaxfed.config.optax_functions import OPTIMIZERS, optax_at_client, optax_at_server
from jaxfed.config.text_parametrizations import read_text_encoder, read_text_lora, read_text_vectors
from jaxfed.core.method import Method
from jaxfed.core.recipe import P, Piece, named
from jaxfed.data.sources.files import read_interactions
from jaxfed.data.sources.movielens import ml_100k
from jaxfed.data.sources.shaped import shaped_data
from jaxfed.data.sources.synthetic import synthetic_data
from jaxfed.models.baselines import counter, popularity
from jaxfed.models.closed_form import ease, item_knn, transitions
from jaxfed.models.features import fm, two_tower
from jaxfed.models.gru4rec import gru4rec
from jaxfed.models.hstu import hstu
from jaxfed.models.ials import ials
from jaxfed.models.metamf import metamf
from jaxfed.models.mf import mf
from jaxfed.models.neural import fedrap, neumf, pfedrec
from jaxfed.models.parametrizations import hashed_tables, identity_parametrization, low_rank_tables
from jaxfed.models.pruned import pruned_weights
from jaxfed.models.sasrec import bert4rec, sasrec
from jaxfed.sampling import asynchronous, clock, cohort


def without_links(make_method: Callable[..., Method]) -> Callable[..., Method]:
    """The function of a method, without the method's own links."""

    @wraps(make_method)
    def make(*args: Any, **named: Any) -> Method:
        return make_method(*args, **named)._replace(links=())

    return make


def custom(spelled_out: Method) -> Method:
    """The method that [work] names. Its links stand in [[channel]], its server in [server]."""
    return spelled_out


CLOSED: dict[str, Callable] = {"ease": ease, "item_knn": item_knn, "transitions": transitions, "ials": ials}

REGISTRY: dict[str, dict[str, Callable]] = {
    "data": {
        "ml-100k": ml_100k,
        "synthetic": synthetic_data,
        "shape": shaped_data,
        **{kind: partial(read_interactions, kind=kind) for kind in ("csv", "tsv", "parquet", "inter")},
    },
    "model": {
        **CLOSED,
        "mf": mf,
        "neumf": neumf,
        "pfedrec": pfedrec,
        "fedrap": fedrap,
        "metamf": metamf,
        "fm": fm,
        "two_tower": two_tower,
        "sasrec": sasrec,
        "gru4rec": gru4rec,
        "hstu": hstu,
        "bert4rec": bert4rec,
        "text_lora": read_text_lora,
        "decoder_lora": read_decoder_lora,
        "code_decoder": read_code_decoder,
        "popularity": popularity,
        "counter": counter,
    },
    # whole methods; "custom" is what [work], [[channel]] and [server] spell out
    "algorithm": {
        "custom": custom,
        "fedavg": fedavg,
        "fedsgd": fedsgd,
        "fedprox": fedprox,
        "scaffold": scaffold,
        "feddyn": feddyn,
        "fednova": fednova,
        "mime": mime,
        "qfedavg": qfedavg,
        "agnostic": agnostic,
        "fedbuff": fedbuff,
        "fedasync": fedasync,
        "fedrecon": fedrecon,
        "fedrep": fedrep,
        "ditto": ditto,
        "apfl": apfl,
        "ifca": ifca,
        "gpfedrec": gpfedrec,
        "heterofl": heterofl,
        "fedrolex": fedrolex,
        "rolora": rolora,
        "fedask": fedask,
        "raflora": raflora,
        "flora": flora,
        "fedex_lora": fedex_lora,
        "flexlora": flexlora,
        "hetefedrec": hetefedrec,
        "layerdrop": layerdrop,
        "ptf_fedrec": ptf_fedrec,
        "closed_form": closed_form,
        "central": central,
    },
    # methods without their own links, which a configuration spells out
    "work": {
        "local_steps": train_locally,
        "gradient": fedsgd,
        "scaffold": scaffold,
        "dynamic": without_links(feddyn),
        "mime": mime,
        "reconstruct": fedrecon,
        "alternate": fedrep,
        "ditto": ditto,
        "apfl": apfl,
        "clustered": without_links(ifca),
        "graph_guided": gpfedrec,
        "statistics": closed_form,
    },
    "optimizer": OPTIMIZERS,
    "channel": {
        "mean": mean,
        "weighted_mean": weighted_mean,
        "per_row_mean": per_row_mean,
        "cluster_mean": cluster_mean,
        "fair": fair_mean,
        "agnostic": agnostic_mean,
        "fednova": normalize_steps,
        "feddyn": add_server_memory,
        "difference": difference,
        "staleness": staleness,
        "mixing": mixing,
        "at_client": optax_at_client,
        "at_server": optax_at_server,
        "clip": clip,
        "clip_per_row": clip_per_row,
        "adaptive_clip": adaptive_clip,
        "zero_out": zero_out,
        "gaussian": gaussian,
        "local_gaussian": local_gaussian,
        "correlated": correlated,
        "skellam": skellam,
        "discrete_gaussian": discrete_gaussian,
        "densify": densify,
        "quantize": quantize,
        "sign": sign,
        "drive": drive,
        "rotate": rotate,
        "top_k": top_k,
        "random_k": random_k,
        "low_rank": low_rank,
        "ring": ring,
        "pads": pads,
        "median": median,
        "trimmed_mean": trimmed_mean,
        "geometric_median": geometric_median,
        "krum": krum,
        "sign_flip": sign_flip,
        "scaled": scale_update,
        "noise": random_update,
        "promote": promote_items,
    },
    "server": {
        **OPTIMIZERS,
        "fedadam": fedadam,
        "fedyogi": fedyogi,
        "fedadagrad": fedadagrad,
        "solve": move_to_solution,
    },
    "cohort": {
        "uniform": cohort.uniform_cohort,
        "poisson": cohort.poisson_cohort,
        "cyclic": cohort.cyclic_cohort,
        "everyone": cohort.everyone_cohort,
        "deadline": asynchronous.deadline_cohort,
        "buffered": asynchronous.buffered_cohort,
    },
    "clock": {
        "none": clock.no_clock,
        "constant": clock.constant_times,
        "lognormal": clock.lognormal_times,
        "trace": clock.trace_times,
    },
    # what the server holds of the model's tables
    "parametrization": {
        "identity": identity_parametrization,
        "low_rank": low_rank_tables,
        "hashed": hashed_tables,
        "pruned": pruned_weights,
        "text_vectors": read_text_vectors,
        "text_encoder": read_text_encoder,
        "codes": read_code_rows,
    },
}

# of rows of figures, of one's own; those that come with jaxfed are in `training.writers`
WRITERS: dict[str, Callable[..., Any]] = {}

# names that configurations may use as well
ALIASES = {("channel", "quantise"): "quantize"}


def register(section: str, name: str, function: Callable[P, Piece]) -> Callable[P, Piece]:
    """Adds a function of one's own to what configurations can name; see `plugins`.

    Args:
        section: A section of a configuration: "model", "algorithm", "channel", "cohort", "data", ...; or "writer", for
            a name of `run.writers`.
        name: What a configuration calls the function.
        function: The function. Its arguments with a default are the keys of that section.

    Returns:
        The function, which leaves its name in what it makes: `Experiment.save` writes it down.

    Raises:
        ValueError: there is no such section, or another function has that name.

    Example:
        >>> import jaxfed as jf, optax
        >>> def scaled_update(factor: float = 0.5):
        ...     return jf.at_client(optax.scale(factor))
        >>> scaled_update = jf.register("channel", "scaled_update", scaled_update)
    """
    if section not in REGISTRY and section != "writer":
        raise ValueError(f"register: no section {section!r}: choose one of {', '.join(REGISTRY)} or writer")
    there = WRITERS if section == "writer" else REGISTRY[section]
    taken, new = (
        [getattr(each, key, each) for key in ("__module__", "__qualname__")]
        for each in (there.get(name, function), function)
    )  # a module may be imported anew
    if taken != new:
        raise ValueError(f"register: the {section} {name!r} is there already: choose another name")
    if section == "writer":
        WRITERS[name] = function
        return function
    if REGISTRY[section].get(name) is not function:
        REGISTRY[section][name] = named(section, name)(function)
    return REGISTRY[section][name]
