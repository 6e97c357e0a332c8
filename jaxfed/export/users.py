"""Users in an export, where they are asked for: what they did, and what their clients keep of the model."""

from typing import Any

import numpy as np

from jaxfed.config.build import RunParts
from jaxfed.core.types import Tree
from jaxfed.evaluation.split import concatenate_ragged, user_feature_rows
from jaxfed.export.functions import name_leaves


def collect_users(parts: RunParts, private: Tree) -> dict[str, Any]:
    """Arrays about all users who are evaluated, none of them of Python objects.

    Args:
        parts: what the run is made of.
        private: what clients keep of the model [clients, ...].

    Returns:
        {"ids": str [U], "start": int64 [U + 1] and "history": int32 [...]: the items of each, earliest first; "client"
        int32 [U] and "user" int32 [U]: which entry of the private parts, and which of its users; "features" int32 [U,
        F]; "times" int32 [...], where the model reads them: of each item; "private:PATH": what clients keep}.

    Raises:
        ValueError: a user is at several clients.
    """
    people = parts.data.population.asked
    names, count = np.unique(people.user_names, return_counts=True)
    if (count > 1).any():
        raise ValueError(
            f"--users: user {names[count > 1][0]} is at several clients: leave --users out, and send histories"
        )
    users = np.arange(len(people.user_names))
    past = concatenate_ragged(people.train, people.valid, people.test)
    client = people.client_of
    found = {
        "ids": people.user_names.astype(str),
        "start": np.asarray(past.start, np.int64),
        "history": np.asarray(past.values, np.int32),
        "client": np.asarray(parts.data.population.homes[client], np.int32),
        "user": np.asarray(users - people.client_offsets[client], np.int32),
        "features": np.asarray(user_feature_rows(people, parts.model.features, users), np.int32),
    }
    if parts.model.sequence and parts.model.sequence.times != "none":
        found["times"] = np.asarray(concatenate_ragged(*people.time_lists).values, np.int32)
    return found | {f"private:{path}": np.asarray(leaf) for path, leaf in name_leaves(private).leaves.items()}
