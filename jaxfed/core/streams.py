"""Which random numbers are whose: every purpose has a stream of its own, and no two share numbers.

Four kinds: counter-based ones of the host (`Stream`: Philox, a function of seed, round and client), numbers drawn once
when data are prepared (`SetupStream`: a function of a seed and sizes), keys of JAX, folded from a round's key, and keys
of `data.bijections`, which begin with two words of a `Stream` and are folded with clients and epochs.
Numbers here are part of what a run computes: a change of one changes the runs that use it.
"""

from enum import Enum, IntEnum

import numpy as np

WORD = 16  # a stream is WORD * (second word of Philox's key) + (a word of its counter)
ROUND_LIMIT = 1 << 32

# JAX. Keys folded from a round's key by the number of a link (0, 1, ...), or by one of these:
STORE, DOWN, CLIENTS = ((1 << 31) - n for n in (1, 2, 3))  # rounding of stored tables; the download; the clients' keys
# and from the key of a link at one client by the number of a leaf (0, 1, ...), or by this one. It may equal STORE, as
# the keys it is folded into are others; it stays, so that runs stay as they were.
WEIGHTS = (1 << 31) - 1  # rounding of a message's weights


class Stream(IntEnum):
    """Streams of Philox, by seed and round; those of clients have a range for each (client, visit)."""

    EVALUATION_NEGATIVES = 2 * WORD  # of clients: which candidates a ranking is among
    COHORT = 3 * WORD  # who is asked
    DROPOUT = 3 * WORD + 1  # who drops out
    CYCLE = 3 * WORD + 2  # the fixed order of cyclic cohorts
    ARRIVALS = 3 * WORD + 3  # who is asked next in asynchronous rounds
    SHARED_NEGATIVES = 3 * WORD + 4  # of the sequences of a round's clients
    DEVICE_DRAWS = 3 * WORD + 5  # the key of a round whose batches are drawn on devices
    AWAKE = 4 * WORD  # of clients: who can be asked in an hour
    TRIPS = 5 * WORD  # of clients: how long a visit takes
    EXAMPLES = ROUND_LIMIT * WORD  # of clients: shuffles and negatives of training, a key for each round


class SetupStream(Enum):
    """What is drawn once: (how many sizes come with the seed, the number that follows them; None: none)."""

    EVALUATED_CLIENTS = (0, 3)
    COLD_CLIENTS = (0, 5)
    SYNTHETIC_DATA = (0, 7)
    SHAPED_DATA = (0, 19)
    SHAPE_ESTIMATES = (0, 23)
    DEVICES = (1, 7)
    EDGES = (1, 13)
    SILOS = (1, None)
    DEVICE_CLASSES = (0, None)  # slowness of the clock's classes; the same for every seed of a run
    SUBMODELS = (1, 31)  # which part of the model a client trains
    PROBE = (2, 17)  # who takes the place of a client in `jaxfed privacy probe`
    SPLIT = (1, 19)  # which rows are held out, where chance decides
    COLD_ITEMS = (1, 29)  # which items nobody trains on
    BOOTSTRAP = (0, 37)  # which users are drawn to compare two models
    SEARCH = (1, 41)  # what the sampler of a trial draws


def philox_key(seed: int, stream: Stream, round: int = 0) -> list[int]:
    """The key of Philox for a stream.

    Args:
        seed: of the run; a whole number below 2^64.
        stream: which one.
        round: for `Stream.EXAMPLES`, which has a key for each round below 2^32.
    """
    return [seed, stream // WORD + round]


def host_rng(seed: int, stream: Stream, round: int = 0) -> np.random.Generator:
    """NumPy's generator of one purpose in one round.

    Args:
        seed: of the run; a whole number below 2^64.
        stream: the purpose; one of those that are not clients'.
        round: whose.

    Returns:
        A generator that no other (seed, stream, round) shares numbers with.
    """
    counter = [0, stream % WORD, round, 0]
    return np.random.Generator(np.random.Philox(key=philox_key(seed, stream), counter=counter))


def setup_rng(seed: int, deal: SetupStream, *sizes: int) -> np.random.Generator:
    """NumPy's generator of what is drawn once.

    Args:
        seed: a whole number, for example `data.deal`.
        deal: the purpose.
        sizes: what it is drawn for: for example the number of silos.
    """
    count, number = deal.value
    assert len(sizes) == count, f"{deal.name} takes {count} sizes"
    words = [seed, *sizes]
    if deal is SetupStream.SILOS and words[1] in {each.value[1] for each in SetupStream if each.value[0] == 0}:
        words.append(11)  # as many silos as another purpose's number: without this the two would share numbers
    return np.random.default_rng(words if number is None else [*words, number])
