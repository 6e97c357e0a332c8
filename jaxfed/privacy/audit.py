"""Searches for what an accountant does not cover: audits of a mechanism, and probes of a chain."""

from typing import Any

import numpy as np


def audit_lower_bound(members: Any, non_members: Any, delta: float, confidence: float = 0.95) -> float:
    """An epsilon that a mechanism has at least, with this confidence: from scores of an attack, higher for members.

    One score for each run of the mechanism, runs independent. Clopper-Pearson intervals of the rates of error, over all
    thresholds at once (Jagielski, Ullman and Oprea 2020; Nasr et al. 2021; Bonferroni's correction is jax-privacy's).
    n runs of each kind show no more than about log(n) - 2.5. Raises ValueError without scores.
    """
    from jax_privacy.auditing import CanaryScoreAuditor

    auditor = CanaryScoreAuditor(np.asarray(members), np.asarray(non_members))
    return float(auditor.epsilon_clopper_pearson(1 - confidence, delta, one_sided=False))


def probe_channel(channel: Any, example: Any, draws: int = 64, rounds: int = 4, seed: int = 0) -> float:
    """The most that one client was found to move what a private chain noises, over what its noise is made for.

    Above 1 the chain is not private as it says; at most 1 proves nothing, as it searches at random (see `sensitivity`).
    example: an update, its tables marked. Raises ValueError for a chain without noise.
    """
    from jaxfed.core.channel_checks import check_order
    from jaxfed.core.link import list_links
    from jaxfed.privacy.sensitivity import search_largest_gain

    if not channel.claims.mechanisms:
        raise ValueError(f"{channel.claims.name}: no link of it is private: there is nothing to probe")
    return search_largest_gain(list_links(channel), check_order(list_links(channel)), example, draws, rounds, seed)
