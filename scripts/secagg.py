"""Measures one session of secure aggregation in this process: time and bytes of a party and of the server.

python scripts/secagg.py [--parties 100] [--length 100000] [--silent 10] [--at mask] [--neighbours K] [--threshold T]
"""

import argparse
import json
import secrets
import statistics
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from jaxfed.secagg.protocol import ROUNDS, Party, Server, run_session
from jaxfed.secagg.terms import SessionTerms
from jaxfed.training.timing import peak_megabytes


def measure(terms: SessionTerms, identities: list[Ed25519PrivateKey], silent: dict[int, str]) -> dict[str, float]:
    """Seconds of one core and bytes, medians over parties that stayed; their keys and vectors are there before."""
    vectors = np.random.default_rng(0).integers(0, 1 << 32, (len(identities), terms.length), np.uint32)
    parties = {id: Party(terms, id, key, vectors[id]) for id, key in enumerate(identities)}
    server, sent, received = Server(terms), Counter[int](), Counter[int]()
    seconds: dict[int, float] = defaultdict(float)

    def call(who, step, message):
        begin = time.process_time()
        answer = getattr(who, step)(message)
        id = who.id if isinstance(who, Party) else -1
        seconds[id] += time.process_time() - begin
        if id >= 0:
            sent[id] += len(answer)
            received[id] += len(message)
        return answer

    total = run_session(parties, server, silent, call)
    stayed = parties.keys() - silent.keys()
    return {
        "seconds_party": statistics.median(seconds[id] for id in stayed),
        "seconds_server": seconds[-1],
        "sent_party": statistics.median_high(sent[id] for id in stayed),
        "received_party": statistics.median_high(received[id] for id in stayed),
        "in_the_sum": len(server.survivors),
        "exact": bool((total == vectors[server.survivors].sum(0, dtype=np.uint32)).all()),
        "peak_megabytes": round(peak_megabytes()),
    }


def main() -> None:
    """One session, whose last parties fall silent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parties", type=int, default=100)
    parser.add_argument("--length", type=int, default=100_000, help="entries of a vector")
    parser.add_argument("--silent", type=int, default=10, help="parties that drop out")
    parser.add_argument("--at", choices=ROUNDS, default="mask", help="the step they do not answer any more")
    parser.add_argument("--neighbours", type=int, help="peers to share masks with; default all")
    parser.add_argument("--threshold", type=int, help="parties that must stay; default more than two thirds")
    parser.add_argument("--json", metavar="FILE", type=Path)
    args = parser.parse_args()
    identities = [Ed25519PrivateKey.generate() for _ in range(args.parties)]
    roster = tuple(key.public_key().public_bytes_raw() for key in identities)
    threshold = args.threshold or 2 * args.parties // 3 + 1
    silent = dict.fromkeys(range(args.parties - args.silent, args.parties), args.at)
    try:
        terms = SessionTerms(secrets.token_bytes(32), roster, threshold, args.length, args.neighbours)
        figures = measure(terms, identities, silent)
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    for name, value in figures.items():
        print(f"{name:>15}  " + (f"{value:,.3f}" if isinstance(value, float) else str(value)))
    if args.json:
        asked = {**vars(args), "threshold": threshold}
        del asked["json"]
        args.json.write_text(json.dumps({**asked, **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
