"""Federated methods and their optimisers: what clients compute, and how the server moves the model."""

from jaxfed.algorithms.adaptive import fedadagrad, fedadam, fedyogi
from jaxfed.algorithms.agnostic import agnostic
from jaxfed.algorithms.apfl import apfl
from jaxfed.algorithms.central import central
from jaxfed.algorithms.closed_form import closed_form
from jaxfed.algorithms.discordance import measure_discordance
from jaxfed.algorithms.ditto import ditto
from jaxfed.algorithms.fedask import fedask
from jaxfed.algorithms.fedavg import fedavg, fedprox
from jaxfed.algorithms.fedbuff import fedasync, fedbuff
from jaxfed.algorithms.feddyn import feddyn
from jaxfed.algorithms.fednova import fednova
from jaxfed.algorithms.fedrecon import fedrecon
from jaxfed.algorithms.fedrep import fedrep
from jaxfed.algorithms.fedrolex import fedrolex
from jaxfed.algorithms.fedsgd import fedsgd
from jaxfed.algorithms.gpfedrec import gpfedrec
from jaxfed.algorithms.group_rates import Layers, Rates, group_rates
from jaxfed.algorithms.hetefedrec import hetefedrec
from jaxfed.algorithms.heterofl import heterofl
from jaxfed.algorithms.ifca import ifca
from jaxfed.algorithms.layerdrop import layerdrop
from jaxfed.algorithms.lora_products import fedex_lora, flexlora, flora
from jaxfed.algorithms.mime import mime
from jaxfed.algorithms.own_model import keep_own_copy
from jaxfed.algorithms.ptf_fedrec import ptf_fedrec
from jaxfed.algorithms.qfedavg import qfedavg
from jaxfed.algorithms.raflora import raflora
from jaxfed.algorithms.rolora import rolora
from jaxfed.algorithms.scaffold import scaffold

__all__ = [
    "Layers",
    "Rates",
    "agnostic",
    "apfl",
    "central",
    "closed_form",
    "ditto",
    "fedadagrad",
    "fedadam",
    "fedask",
    "fedasync",
    "fedavg",
    "fedbuff",
    "feddyn",
    "fedex_lora",
    "fednova",
    "fedprox",
    "fedrecon",
    "fedrep",
    "fedrolex",
    "fedsgd",
    "fedyogi",
    "flexlora",
    "flora",
    "gpfedrec",
    "group_rates",
    "hetefedrec",
    "heterofl",
    "ifca",
    "keep_own_copy",
    "layerdrop",
    "measure_discordance",
    "mime",
    "ptf_fedrec",
    "qfedavg",
    "raflora",
    "rolora",
    "scaffold",
]
