"""Messages of models that are some rounds old: what a configuration must be for them, and what they weigh."""

from typing import Any

import jax

from jaxfed.config.settings import Config
from jaxfed.core.link import Channel, broadcast_state, list_links
from jaxfed.core.types import ClientView, Tree
from jaxfed.deployment.node_data import PublicFacts
from jaxfed.sampling.buffered_rounds import BufferedPlan, make_buffered_plan

PUBLIC_LINKS = ("rotate", "low_rank")  # both ends draw from one key
WEIGHTED = ("weighted_mean", "per_row_mean")  # whose messages are (update, weights ...)
OF_ONE_ROUND = (*PUBLIC_LINKS, "mixing", "cluster_mean")


def find_buffered_plan(config: Config, facts: PublicFacts, channel: Channel, state: Tree) -> BufferedPlan | None:
    """What buffered rounds are played by; None: the configuration has none. Raises ValueError for a channel whose
    messages the server cannot add to those of other rounds.

    state: shapes of what the links keep at the server.
    """
    if config.cohort.name != "buffered":
        return None
    broadcast = jax.eval_shape(lambda x: broadcast_state(channel, x), state)
    names = [each.claims.name for each in list_links(channel)]
    refused = {f"the link {name}": name in names for name in OF_ONE_ROUND}
    after_means = names[min([names.index(name) for name in WEIGHTED if name in names], default=len(names)) :]
    refused["the link staleness after a mean that weighs"] = "staleness" in after_means
    refused["a link with noise (epsilon counts rounds whose cohorts are drawn at once)"] = bool(
        channel.claims.mechanisms
    )
    refused["a channel that hides messages in a sum"] = channel.claims.reveals != "message"
    refused["a channel that broadcasts something beside the model"] = bool(jax.tree.leaves(broadcast))
    if found := [name for name, holds in refused.items() if holds]:
        raise ValueError(
            f'deploy: {found[0]} does not work with cohort.name = "buffered", whose messages belong to several rounds: '
            'leave it out, or set cohort.name to "uniform"'
        )
    cohort: Any = config.cohort
    return make_buffered_plan(facts.num_clients, cohort.size, cohort.concurrency, cohort.max_age)


def discount_update(channel: Channel, opened: Tree, sender: ClientView) -> Tree:
    """A message with its update multiplied by what the link `staleness` says of its age.

    In the simulator a client knows its age when it reports. A real one does not, sends its update as if nobody was
    faster, and the server does what the client would have done.

    Args:
        channel: With or without that link.
        opened: What the message means.
        sender: Its age is read.
    """
    links = list_links(channel)
    is_weighted = any(each.claims.name in WEIGHTED for each in links)
    for each in links:
        if each.claims.name == "staleness":
            assert each.encode
            update, *weights = opened if is_weighted else (opened,)
            update, _ = each.encode(update, (), sender)
            opened = (update, *weights) if is_weighted else update
    return opened
