"""The three functions of a textbook on federated learning, on pictures of digits: training on a device, aggregation at
the server, evaluation. jaxfed makes rounds of the first two; the model is a small network that has nothing to do with
recommendation.

python scripts/digits.py [--images mnist] [--rounds 30] [--clients 20] [--classes 2]

`digits` are the 1,797 pictures of scikit-learn, of 8 x 8 pixels. `mnist` is fetched by tensorflow-datasets.
"""

import argparse
import sys
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxfed as jf
from jaxfed.core.types import Block

BATCH = 20  # pictures of a step


class Images(NamedTuple):
    """Pictures and what they show."""

    pixels: np.ndarray  # float32 [n, pixels]: from 0 to 1
    labels: np.ndarray  # int32 [n]: from 0 to 9


class Network(nn.Module):
    """Pixels [..., p] -> logits [..., 10], by one hidden layer."""

    width: int = 64

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """The logits of some pictures."""
        return nn.Dense(10)(nn.relu(nn.Dense(self.width)(pixels)))


NETWORK = Network()


def compute_loss(params: dict, batch: dict) -> jf.Mean:
    """The cross-entropy of a batch: its sum over the pictures, and how many there are."""
    logits = NETWORK.apply(params, batch["pixels"])
    each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    return jf.Mean(jnp.sum(each * batch["weight"]), jnp.sum(batch["weight"]))


def train_on_device(broadcast: jf.Broadcast, kept: tuple, batches: jf.Batches, key: jax.Array) -> jf.ClientOutput:
    """The first function: one device takes steps from the model that it was sent. A pure function of that device; what
    it sends is where it began less where it ended."""
    params, _, loss = jf.local_sgd(compute_loss, optax.sgd(0.1), broadcast.params, batches)
    update = jax.tree.map(jnp.subtract, broadcast.params, params)
    return jf.ClientOutput(jf.Broadcast(update), kept, jnp.asarray(batches.examples), metrics={"train/loss": loss})


def aggregate_updates() -> jf.Channel:
    """The second function: the mean of the updates, weighted by examples (McMahan et al. 2017, algorithm 1). A link has
    two ends: what a device sends, and what the server makes of the sum."""

    def encode(update, sent, client):
        return (jax.tree.map(lambda x: client.weight * x, update), client.weight), client.link_state

    def decode(total, state, round):
        update, weight = total
        return jax.tree.map(lambda x: x / jnp.maximum(weight, 1), update), state, {}

    return jf.link(encode, decode, is_average=True, name="aggregate_updates")


def evaluate_model(params: dict, images: Images) -> float:
    """The third function: the share of pictures that the model names right."""
    logits = jnp.asarray(NETWORK.apply(params, images.pixels))
    return float((logits.argmax(-1) == images.labels).mean())


def load_images(name: str) -> Images:
    """Pictures in random order. Raises ValueError where they cannot be had."""
    if name == "digits":
        from sklearn.datasets import load_digits  # scikit-learn is in the extra `dev`

        found = load_digits()
        pixels, labels = found.data / 16, found.target
    else:
        import tensorflow_datasets as tfds

        try:
            source = tfds.data_source("mnist", split="train")
        except OSError as error:  # of the network or the disk
            raise ValueError(
                f"--images mnist: cannot be fetched ({type(error).__name__}): take digits, which need no network"
            ) from None
        rows = [source[i] for i in range(len(source))]
        pixels = np.stack([row["image"].ravel() for row in rows]) / 255
        labels = np.array([row["label"] for row in rows])
    order = np.random.default_rng(0).permutation(len(labels))
    return Images(pixels[order].astype(np.float32), labels[order].astype(np.int32))


def divide_among_clients(images: Images, clients: int, classes: int) -> list[Images]:
    """Pictures sorted by what they show and cut into pieces, of which each client has `classes`: it sees few digits, as
    in the paper."""
    order = np.argsort(images.labels, kind="stable")
    pieces = np.array_split(order, clients * classes)
    dealt = np.random.default_rng(1).permutation(len(pieces)).reshape(clients, classes)
    return [Images(*(x[np.concatenate([pieces[i] for i in own])] for x in images)) for own in dealt]


def pack_cohort(ids: np.ndarray, divided: list[Images], epochs: int, seed: int, round: int) -> jf.Cohort:
    """The cohort of a round: the shuffled pictures of each client in batches, all clients of one static shape."""
    most = -(-max(len(each.labels) for each in divided) // BATCH) * BATCH
    batch = {
        "pixels": np.zeros((len(ids), epochs, most, divided[0].pixels.shape[1]), np.float32),
        "labels": np.zeros((len(ids), epochs, most), np.int32),
        "weight": np.zeros((len(ids), epochs, most), np.float32),
    }
    for lane, client in enumerate(ids):
        for epoch in range(epochs):
            images, random = divided[client], np.random.default_rng((seed, round, client, epoch))
            order = random.permutation(len(images.labels))
            batch["pixels"][lane, epoch, : len(order)] = images.pixels[order]
            batch["labels"][lane, epoch, : len(order)] = images.labels[order]
            batch["weight"][lane, epoch, : len(order)] = 1
    batch = {name: x.reshape(len(ids), -1, BATCH, *x.shape[3:]) for name, x in batch.items()}
    live: np.ndarray = np.any(batch["weight"] > 0, -1)
    examples = batch["weight"].sum((1, 2))
    data = jf.Batches(np.zeros((*live.shape, 0), np.int32), live, batch, examples)  # no tables, so no rows
    block = Block(np.arange(len(ids), dtype=np.int32), np.zeros((len(ids), 0), np.int32), examples / epochs, data)
    return jf.Cohort(ids.astype(np.int32), np.ones(len(ids), bool), (block,))


def make_algorithm(clients: int) -> jf.Algorithm:
    """Rounds of the first two functions, for so many clients."""
    work = jf.ClientWork(lambda params, key: (jf.Broadcast(params), ()), train_on_device)
    return jf.federate(jf.Method(work), aggregate_updates(), clients)


def train_federated(
    train: Images, test: Images, rounds: int = 30, clients: int = 20, classes: int = 2, asked: int = 10, seed: int = 0
) -> list[float]:
    """The accuracy on the test pictures before the first round and after each."""
    divided = divide_among_clients(train, clients, classes)
    algorithm, key = make_algorithm(clients), jax.random.key(seed)
    state = algorithm.init(NETWORK.init(key, train.pixels[:1]), key)
    found = [evaluate_model(state.shared.params, test)]
    for round in range(rounds):
        ids = np.random.default_rng((seed, round)).choice(clients, asked, replace=False)
        state, _ = algorithm.step(state, pack_cohort(ids, divided, 2, seed, round), key)
        found.append(evaluate_model(state.shared.params, test))
    return found


def main() -> None:
    """Trains, and prints the accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--images", choices=["digits", "mnist"], default="digits")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--classes", type=int, default=2, help="pieces that a client has, each of one digit or two")
    args = parser.parse_args()
    try:
        if min(args.clients, args.classes) < 1 or args.rounds < 0:
            raise ValueError("--clients and --classes must be at least 1, --rounds at least 0")
        images = load_images(args.images)
    except ValueError as error:
        print(f"digits: {error}", file=sys.stderr)
        sys.exit(2)
    cut = len(images.labels) * 4 // 5
    train, test = (Images(*(x[part] for x in images)) for part in (slice(cut), slice(cut, None)))
    found = train_federated(train, test, args.rounds, args.clients, args.classes, asked=max(args.clients // 2, 1))
    for round, accuracy in enumerate(found):
        if round % 5 == 0 or round == args.rounds:
            print(f"round {round:>3}  accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
