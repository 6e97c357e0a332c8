"""Who is malicious: a function of (seed, client), so that what lies in the data and what lies in a message is one."""

from typing import Any

import numpy as np


def check_fraction(fraction: float, name: str = "fraction") -> None:
    """Raises ValueError for what is no share of the clients."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"{name} is {fraction}: a share of the clients, from 0 to 1")


def is_malicious(ids: Any, fraction: float, seed: int = 0) -> Any:
    """bool, shaped like the client ids (integers of NumPy or JAX): whether each is one of the malicious.

    Each client is by itself, with probability `fraction`: of n clients about fraction * n. The same in every round,
    whoever asks; the malicious of a smaller fraction are among those of a larger one. An integer hash (the finaliser
    of MurmurHash3) instead of `jax.random`, so that NumPy says the same.
    """
    mix = (seed * 0x9E3779B9 + 0x7F4A7C15) & 0xFFFFFFFF
    x = ids.astype(np.uint32)
    for salt in (np.uint32(mix), np.uint32(mix >> 7)):
        x = x ^ salt
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
        x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
        x = x ^ (x >> np.uint32(16))
    return (x >> np.uint32(1)) < np.uint32(round(fraction * 2**31))
