"""Membership inference on MovieLens-100K: the AUC of telling a client's items from those it never met, by defence.

python scripts/membership.py [--rounds 50] [--clients 128] [--seed 0] [--page docs/results/membership.md]

Trains a factorisation by configs/ml100k_fedavg.toml, then asks a cohort for one round more under each defence, from the
same model, by the compiled round itself: what is attacked is what its server receives. See `jaxfed.attacks.membership`
for the attacks; the last column weighs them and the popularity of items as suits the other half of the clients, whose
truth that attacker knows. Means over clients with their standard errors; items held out for evaluation are not asked
for.
"""

import argparse
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxfed.attacks import membership
from jaxfed.bench.pages import write_page
from jaxfed.cli.main import set_up_process
from jaxfed.config.build import RunParts, build_from_config, load_data
from jaxfed.config.config_files import read_config
from jaxfed.config.registry import REGISTRY
from jaxfed.config.schema import make_config
from jaxfed.core.aggregate import gather_then, sum_messages
from jaxfed.core.link import Channel, link
from jaxfed.core.types import Messages, Tree
from jaxfed.data.population import Population
from jaxfed.training.rounds import initial_arrays, run_rounds

BOUND = 10.0  # of clips; most updates are longer
PARTS: list[Messages] = []  # what a server that reads messages received


class Defence(NamedTuple):
    """What stands between a client and who looks."""

    name: str
    links: list[dict[str, Any]]
    at: str = "messages"  # messages: each is seen; sum: the sum as it arrives; released: what is made of it
    beside: dict[str, dict[str, Any]] = {}  # other sections of the configuration
    size: int = 0  # of a cohort; 0: all the clients asked


def named(name: str, **values: Any) -> dict[str, Any]:
    """A link's section."""
    return {"name": name, **values}


def defences(clients: int, small: int = 16) -> list[Defence]:
    """The rows of the table."""
    clip, mean = named("clip", bound=BOUND), named("mean", count=clients)
    dense = [mean, clip, named("densify")]
    return [
        Defence("none", [mean]),
        Defence("none, 16 negatives a positive", [mean], beside={"work": {"negatives": 16}}),
        Defence("quantize, 4 bits", [mean, named("quantize", bits=4)]),
        Defence("sign", [mean, named("sign", keep_error=False)]),
        Defence("top_k, 10 %", [mean, named("top_k", share=0.1, keep_error=False)]),
        Defence("clip: also the trusted server of noise", [mean, clip]),
        Defence("densify", [mean, named("densify")]),
        *(
            Defence(f"clip, densify, local_gaussian {x:g}", [*dense, named("local_gaussian", multiplier=x)])
            for x in (0.01, 0.03, 0.1)
        ),
        Defence("clip, gaussian 1: who sees the noised sum", [mean, clip, named("gaussian")], "released"),
        Defence("clip, ring", [mean, clip, named("ring")], "sum"),
        Defence(f"clip, ring, {small} a round", [mean, clip, named("ring")], "sum", size=small),
    ]


def listen() -> Channel:
    """Writes down the messages of a round as its server has them, opened, before it adds them up."""

    def record(messages: Messages, rows: int) -> Tree:
        jax.debug.callback(
            lambda seen: PARTS.append(jax.tree.map(np.asarray, seen)), messages._replace(client_states=(), metrics={})
        )
        return sum_messages(messages, rows)

    return link(aggregator=gather_then(record))


def look() -> Channel:
    """Shows the sum as it is at this place of the chain."""
    return link(
        decode=lambda total, state, round: (total, state, {"seen": total}),
        is_average=False,
        l2_gain=lambda bound: bound,
    )


def configuration(table: dict[str, Any], defence: Defence, clients: int) -> Any:
    """The configuration of one round under a defence, for a cohort of so many."""
    spy = {"messages": [*defence.links, named("listen")], "sum": [*defence.links, named("look")]}
    changed = {
        **{name: table[name] | values for name, values in defence.beside.items()},
        "channel": spy.get(defence.at, [named("look"), *defence.links]),
        "cohort": {"name": "cyclic", "size": defence.size or clients},
        "server": table["server"] | {"lazy": False},  # sums of whole tables
    }
    return make_config(table | changed)


def seen(
    experiment: RunParts, arrays: Tree, defence: Defence, seed: int, first: int, clients: int
) -> Iterator[tuple[int, membership.ItemEvidence]]:
    """(client, what is seen of it) of one round, or of as many as it takes to ask so many clients: always the same, who
    stand side by side in the circle of all."""
    size, times = experiment.data.population.num_items, -(-clients // experiment.sampler.slots)
    for number in range(times * first, times * first + times):
        state = initial_arrays(experiment, seed)["state"]
        shared, private = jax.tree.map(jax.numpy.asarray, arrays)
        PARTS.clear()
        state = state._replace(shared=shared, client_states=state.client_states._replace(work=private))
        (done,) = run_rounds(experiment, state, seed, number, number + 1)
        jax.effects_barrier()  # until the round has been listened to
        if defence.at == "messages":
            yield from (
                (x.id, membership.collect_evidence(x.message, x.held, size))
                for x in membership.split_messages(PARTS[0], size)
            )
        else:
            sum = membership.collect_evidence(membership.evidence_of_sum(done.info["seen"]), np.zeros(0, int), size)
            yield from ((int(id), sum) for id in done.ready.cohort.ids)


def truth(population: Population, client: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(members, who is asked for, popularity) [N]: items it trained on, all but those held out, and how many other
    clients trained on each."""
    member, asked = np.zeros(population.num_items, bool), np.ones(population.num_items, bool)
    member[population.train.of(client)] = True
    asked[population.valid.of(client)] = asked[population.test.of(client)] = False
    return member, asked, np.bincount(population.train.values, minlength=len(member)) - member


def informed(scores: list[np.ndarray], members: list[np.ndarray]) -> list[float]:
    """The AUC of every client by all scores together, weighed as suits the clients of the other half."""
    halves = [(np.concatenate(scores[i::2]), np.concatenate(members[i::2])) for i in (1, 0)]
    weights = [membership.fit_discriminant(*half) for half in halves]
    each = enumerate(zip(scores, members, strict=True))
    return [membership.area_under_curve(score @ weights[i % 2], member) for i, (score, member) in each]


def aucs(
    population: Population, arrays: Tree, found: Iterator[tuple[int, membership.ItemEvidence]]
) -> dict[str, list[float]]:
    """{attack: the AUC of each client}."""
    size = population.num_items
    public = membership.item_matrix(arrays[0], np.arange(size), size)
    out: dict[str, list[float]] = {"popularity": []}
    scores, members = [], []
    for client, what in found:
        member, asked, popularity = truth(population, client)
        by = membership.score_membership(what, public)._asdict()
        for name, score in {"popularity": popularity, **by}.items():
            out.setdefault(name, []).append(membership.area_under_curve(score[asked], member[asked]))
        scores.append(membership.standardize([score[asked] for score in (*by.values(), np.log1p(popularity))]))
        members.append(member[asked])
    return out | {"all": informed(scores, members)}


def text(values: list[float]) -> str:
    """mean ± standard error."""
    mean, error = membership.mean_and_error(values)
    return f"{mean:.3f} ± {error:.3f}"


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--clients", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--page", metavar="FILE", help="page of docs/results whose table is written, too")
    args = parser.parse_args()
    set_up_process()
    REGISTRY["channel"] |= {"listen": listen, "look": look}
    table = read_config("configs/ml100k_fedavg.toml")
    config = make_config(table)
    data = load_data(config.data)
    trained = build_from_config(config, data)
    state = initial_arrays(trained, args.seed)["state"]
    for done in run_rounds(trained, state, args.seed, 0, args.rounds):
        state = done.state
    arrays = jax.tree.map(np.asarray, (state.shared, state.client_states.work))
    lines = ["| defence | seen | row set | update | taste | all, with popularity |", "|---|---|---|---|---|---|"]
    print(*lines, sep="\n")
    floor: list[float] = []
    for defence in defences(args.clients):
        experiment = build_from_config(configuration(table, defence, args.clients), data)
        found = seen(experiment, arrays, defence, args.seed, args.rounds, args.clients)
        by = aucs(data.population, arrays, found)
        if not floor:  # the same for all
            floor = by["popularity"]
            lines.append(f"| no message: popularity alone | | | | | {text(floor)} |")
            print(lines[-1])
        cells = [text(by[name]) for name in ("rows", "update", "taste", "all")]
        what = "released sum" if defence.at == "released" else experiment.wire.sees
        lines.append(f"| {' | '.join([defence.name, what, *cells])} |")
        print(lines[-1], flush=True)
    write_page(args.page, "membership", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
