"""Sends changed messages to a node, to a server and to `jaxfed aggregate`, in this process and without Flower.

python scripts/fuzz_messages.py [--messages 100000] [--seed 0] [--json FILE]

Half of the messages are damaged on the way: some bytes are others, missing, twice or new. None may be accepted with
changed content; one that is cut exactly between two envelopes is accepted, since what is left is as it was sent. The
other half is forged: what is changed has a new checksum, as a dishonest peer can make it. These may be
well formed; they must be answered, and never end a process. Prints how many were refused, accepted as they were sent
(a message may be cut between two envelopes), accepted though they were changed, and how many raised an error.
"""

import argparse
import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxfed.config.build import RunParts, build_from_config, load_data
from jaxfed.config.schema import make_config
from jaxfed.config.settings import Config
from jaxfed.deployment.collected_run import lay_out_federation
from jaxfed.deployment.coordinator import ask_missing_rows, make_requests
from jaxfed.deployment.envelope import CHECKSUM, EnvelopeKind, pack_envelopes, read_envelopes
from jaxfed.deployment.hearing import read_replies
from jaxfed.deployment.message_files import KnownModels, fold_messages
from jaxfed.deployment.node import make_reply
from jaxfed.deployment.opened_node import Node, open_node
from jaxfed.deployment.opened_server import FederationServer, RoundRequest, open_server
from jaxfed.sampling.cohort import sample_cohort
from jaxfed.training.rounds import initial_arrays

TABLE = {
    "data": {"name": "synthetic", "users": 40, "items": 60, "mean_length": 9.0},
    "model": {"name": "mf", "dim": 4},
    "work": {"batch_size": 64, "negatives": 4, "optimizer": {"name": "sgd", "learning_rate": 0.5}},
    "channel": [{"name": "per_row_mean"}],
    "cohort": {"name": "uniform", "size": 12},
}
FILES = 2000  # that are folded at a time


class SmallFederation(NamedTuple):
    """One node that holds all clients, a server, and what they say to each other in the first round."""

    config: Config
    parts: RunParts
    node: Node
    server: FederationServer
    request: RoundRequest
    words: bytes  # the server's request
    reply: bytes  # the node's


def make_federation(folder: Path) -> SmallFederation:
    """A federation in a folder, after the node has answered in the first round."""
    config = make_config(TABLE)
    parts = build_from_config(config, load_data(config.data))
    facts = lay_out_federation(folder, config, parts, 1)
    node = open_node(folder / "nodes" / "0", config, facts, "reproducible")
    server = open_server(config, facts, config.seed, lambda line: None)
    members, ids = {0: node.ids}, sample_cohort(server.party.sampler, server.seed, 0)[0]

    def exchange(requests: dict[int, bytes]) -> dict[int, bytes]:
        return {0: make_reply(node, requests[0])}

    asked = ask_missing_rows(server, 0, {0: np.intersect1d(ids, node.ids).astype(np.int32)}, members, exchange)
    requests, request = make_requests(server, 0, ids, asked, members)
    return SmallFederation(config, parts, node, server, request, requests[0], make_reply(node, requests[0]))


def damage(random: np.random.Generator, data: bytes) -> bytes:
    """The bytes, of which some are others, are missing, come twice or are put in."""
    changed, how, at = bytearray(data), random.integers(5), int(random.integers(len(data)))
    if how == 0:
        changed[at] ^= int(random.integers(1, 256))
    elif how == 1:
        del changed[at : at + int(random.integers(1, 9))]
    elif how == 2:
        changed[at:at] = random.bytes(int(random.integers(1, 9)))
    elif how == 3:
        del changed[at:]
    else:
        changed[at:at] = changed[at : at + 64]
    return bytes(changed)


def forge(random: np.random.Generator, data: bytes) -> bytes:
    """The envelopes, of which one is damaged and has a new checksum, or has other numbers in its head."""
    envelopes = read_envelopes(data)
    at = int(random.integers(len(envelopes)))
    if random.integers(2):
        name = ("kind", "round", "client", "rows")[random.integers(4)]
        value: Any = EnvelopeKind(random.choice([*EnvelopeKind])) if name == "kind" else int(random.integers(1 << 32))
        envelopes[at] = envelopes[at]._replace(**{name: value})
        return pack_envelopes(envelopes)
    before, after = pack_envelopes(envelopes[:at]), pack_envelopes(envelopes[at + 1 :])
    body = damage(random, pack_envelopes([envelopes[at]])[:-CHECKSUM])
    return before + body + hashlib.sha256(body).digest() + after


def ask_changed(made: SmallFederation, changed: bytes, sent: bytes) -> str:
    """What a node makes of a request."""
    found = read_envelopes(make_reply(made.node, changed))
    if found and found[0].kind == EnvelopeKind.REFUSED:
        return "refused"
    return "as sent" if sent.startswith(changed) else "changed"


def hear_changed(made: SmallFederation, changed: bytes, sent: bytes) -> str:
    """What a server makes of a reply: as sent, where each message that it takes is one that was sent."""
    heard = read_replies(made.server, made.request, {0: made.node.ids}, {0: changed})
    if not heard.messages:
        return "refused"
    known = {each.client: each for each in read_envelopes(sent) if each.kind == EnvelopeKind.MESSAGE}
    taken = {each.client: each for each in read_envelopes(changed) if each.client in heard.messages}
    return "as sent" if all(taken[client] == known.get(client) for client in heard.messages) else "changed"


def fold_changed(made: SmallFederation, folder: Path, every: list[bytes]) -> Counter:
    """What `jaxfed aggregate` makes of files, of which the first is as it was sent."""
    for number, data in enumerate(every):
        (folder / f"{number:06}.message").write_bytes(data)
    state = initial_arrays(made.parts, made.config.seed)["state"]
    files = sorted(folder.glob("*.message"))
    best = state.shared.params, 0
    folded = fold_messages(made.config, made.parts, state, best, files, KnownModels())
    assert str(files[0]) in folded.counted, "the message that nobody changed was refused"
    for file in files:
        file.unlink()
    return +Counter({"refused": len(folded.refused), "changed": len(folded.counted) - 1})


def count_outcomes(
    look: Callable[[SmallFederation, bytes, bytes], str],
    change: Callable[[np.random.Generator, bytes], bytes],
    made: SmallFederation,
    sent: bytes,
    number: int,
    random: np.random.Generator,
) -> Counter:
    """How often each thing became of so many changed messages."""
    found: Counter = Counter()
    for _ in range(number):
        if (changed := change(random, sent)) == sent:
            continue
        try:
            found[look(made, changed, sent)] += 1
        except Exception as error:  # whatever it is: that is what is looked for
            found[f"error: {type(error).__name__}"] += 1
    return found


def main() -> None:
    """Sends messages of each kind to each receiver."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    random, results, failed = np.random.default_rng(args.seed), dict[str, Any](), False
    with tempfile.TemporaryDirectory() as name:
        made, files = make_federation(Path(name) / "run"), Path(name) / "files"
        files.mkdir()
        share = args.messages // 6
        for kind, change in (("damaged", damage), ("forged", forge)):
            for receiver, look, sent in (("node", ask_changed, made.words), ("server", hear_changed, made.reply)):
                results[f"{receiver}, {kind}"] = count_outcomes(look, change, made, sent, share, random)
            one = next(each for each in read_envelopes(made.reply) if each.kind == EnvelopeKind.MESSAGE)
            sent, found = pack_envelopes([one]), Counter[str]()
            for low in range(0, share, FILES):
                every = [change(random, sent) for _ in range(min(FILES, share - low))]
                found += fold_changed(made, files, [sent, *(each for each in every if each != sent)])
            results[f"aggregate, {kind}"] = found
    for name, outcomes in results.items():
        if "forged" in name and "changed" in outcomes:
            outcomes["well formed"] = outcomes.pop("changed")
        wrong = [what for what in outcomes if what.startswith("error") or (what == "changed" and "damaged" in name)]
        failed |= bool(wrong)
        print(f"{name}: " + ", ".join(f"{count:,} {what}" for what, count in sorted(outcomes.items())))
    if args.json:
        Path(args.json).write_text(json.dumps(results))
    if failed:
        raise SystemExit("a message ended a process, or was accepted though it was damaged")


if __name__ == "__main__":
    main()
