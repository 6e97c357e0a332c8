"""Links: what happens to an update on its way to the server. `jaxfed.chain` joins them, from the model to the wire."""

from jaxfed.channels.average import cluster_mean, coordinate_mean, mean, per_row_mean, weighted_mean
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

__all__ = [
    "adaptive_clip",
    "clip",
    "clip_per_row",
    "cluster_mean",
    "coordinate_mean",
    "correlated",
    "densify",
    "difference",
    "discrete_gaussian",
    "drive",
    "gaussian",
    "geometric_median",
    "krum",
    "local_gaussian",
    "low_rank",
    "mean",
    "median",
    "mixing",
    "pads",
    "per_row_mean",
    "quantize",
    "random_k",
    "ring",
    "rotate",
    "sign",
    "skellam",
    "staleness",
    "top_k",
    "trimmed_mean",
    "weighted_mean",
    "zero_out",
]
