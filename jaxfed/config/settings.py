"""The types of a configuration, and of its sections: what an editor completes, and what a program hands over, too."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from jaxfed.config.mesh import MeshAxes, Partition
from jaxfed.core.excerpt import shorten, shorten_list

PATIENCE = 10  # evaluations without an improvement, where nobody says how many


@dataclass(frozen=True)
class Section:
    """A section that names a function of the registry. Its arguments are attributes: `config.model.dim`.

    Args:
        name: The name of the function.
        arguments: (argument, value) of all that a configuration may say, defaults included. That of the clients'
            optimiser, in [work], is a `Section`.

    Raises:
        AttributeError: An attribute is no argument; the message lists those there are.

    Example:
        >>> Section("sgd", (("learning_rate", 0.1), ("momentum", 0.9))).momentum
        0.9
    """

    name: str
    arguments: tuple[tuple[str, Any], ...] = ()

    def __getattr__(self, key: str) -> Any:
        """The value of an argument."""
        found = dict(self.__dict__.get("arguments", ()))  # while it is copied or unpickled there are none yet
        if key in found:
            return found[key]
        raise AttributeError(
            f'{self.__dict__.get("name")} has no argument "{shorten(key)}"; there are {shorten_list(["name", *found])}'
        )

    def __dir__(self) -> list[str]:
        """What an editor completes."""
        return ["name", "arguments", *dict(self.arguments)]


def replace_arguments(section: Section, **values: Any) -> Section:
    """A section with other values of some arguments; these are not checked again.

    Args:
        section: of a configuration.
        values: by the names of the arguments.

    Returns:
        The changed section.

    Raises:
        AttributeError: the section has no such argument.

    Example:
        >>> replace_arguments(Section("mf", (("dim", 32),)), dim=8).dim
        8
    """
    for key in values:
        getattr(section, key)
    return Section(section.name, tuple((dict(section.arguments) | values).items()))


@dataclass(frozen=True)
class GroupRates:
    """Learning rate and weight decay of one parameter group. `item`: all rows of tables, shared or private. `user`:
    the rest of the private part.

    Args:
        learning_rate: Left out: the value of [work.optimizer].
        weight_decay: Left out: the value of [work.optimizer].
        per_example: true: the weight decay is that of the sum of the losses of a batch's examples, and steps of `item`
            are of that sum, so that a number means the same for clients with few examples and with many. Left out: of
            their mean.
    """

    learning_rate: float | None = None
    weight_decay: float | None = None
    per_example: bool | None = None


@dataclass(frozen=True)
class Start:
    """The run whose parameters this one starts with, in place of random ones.

    Args:
        run: The folder of a finished run, on the same or another catalogue. Empty: there is none.
        parts: Regular expressions; only parameters with one of them in their path are taken, such as params/ or
            tables/item. Empty: all that both models have.
        match: How an item is found in the other catalogue: by its id, or by its text (title and features).
        new_rows: What rows of items that the other run did not have start with. random: as without a start. text: the
            mean of the rows of the ten items with the nearest texts, by the vectors of all-MiniLM-L6-v2.
        private: Clients that took part in the other run, found by their names, begin with the private part they kept.
        distil_steps: Number of steps in which this model learns the other model's scores at the server, before the
            first round. 0: it takes the other model's parameters instead.
        distil_temperature: What the other model's scores are divided by.

    Example:
        >>> Start(run="runs/other").match
        'id'
    """

    run: str = ""
    parts: tuple[str, ...] = ()
    match: Literal["id", "text"] = "id"
    new_rows: Literal["random", "text"] = "random"
    private: bool = False
    distil_steps: int = 0
    distil_temperature: float = 1.0


@dataclass(frozen=True)
class Run:
    """Where a run is stored and what it runs on. None of this changes what is computed, except for the order of sums.

    Args:
        out: The folder of the run.
        checkpoint_every: Number of rounds between checkpoints.
        keep: Number of checkpoints kept.
        placement: How clients are spread over devices: jit with sharding, or pmap.
        devices: Number of devices to use. 0: all there are.
        mesh: How the devices are arranged; by default all of them divide clients.
        partition: Rules that split the server's arrays, and frozen ones, over the axes of the mesh.
        shard_tables: Each device keeps a share of the rows of the server's tables.
        client_store: Where private parts and memories of clients are kept between rounds.
        area: Size of a block of clients, in local steps. 0: chosen automatically.
        chunk: Blocks whose messages are in memory at once. 0: as many as take 1 GB, or a quarter of the free memory.
        rounds_per_program: Rounds that run as one program, drawn on the device (work.draw_on). 1: the host starts each.
        profile: Rounds to trace by the JAX profiler into RUN/profile, after the first two or a first program. 0: none.
        imports: Modules to import before names are looked up, which add pieces of your own to the registry.
        writers: Where rows of figures go beside metrics.jsonl: tensorboard, csv, wandb, mlflow, or one of your own.
        client_memory_gb: Limit in GB (10^9 bytes) for what all clients keep; a run that needs more is refused.

    Example:
        >>> import jaxfed as jf
        >>> jf.Run(devices=0).checkpoint_every
        25
    """

    out: str = "runs/run"
    checkpoint_every: int = 25
    keep: int = 2
    placement: Literal["jit", "pmap"] = "jit"
    devices: int = 1
    mesh: MeshAxes = field(default_factory=MeshAxes)
    partition: tuple[Partition, ...] = ()
    shard_tables: bool = False
    client_store: Literal["device", "host"] = "device"
    area: int = 0
    chunk: int = 0
    rounds_per_program: int = 1
    profile: int = 0
    imports: tuple[str, ...] = ()
    writers: tuple[str, ...] = ("tensorboard",)
    client_memory_gb: float = 8.0


@dataclass(frozen=True)
class Privacy:
    """Accounting of differential privacy. The amount of noise is set on the links of [[channel]].

    Args:
        delta: delta of (epsilon, delta)-DP; should be below 1 / number of clients.
        accountant: Accountant of the final epsilon: pld (tighter) or rdp; the log during training always uses rdp.
        relation: What is compared: runs with and without a client, or with another in its place. Left out: what the
            sampler is accounted for.
        seed: What cohorts, batches and noise are drawn from. run: the seed of the run; whoever knows it can remove the
            noise. secret: a random number of the operating system that is not stored; such a run cannot be resumed.

    Example:
        >>> import jaxfed as jf
        >>> jf.Privacy(delta=1e-6).accountant
        'pld'
    """

    delta: float = 1e-5
    accountant: Literal["pld", "rdp"] = "pld"
    relation: Literal["", "add-or-remove", "replace-one"] = ""
    seed: Literal["run", "secret"] = "run"


@dataclass(frozen=True)
class Evaluation:
    """What is measured, when, and by which figure the best round is chosen.

    Args:
        every: Number of rounds between evaluations on validation.
        select: The metric of validation by which the best round is chosen.
        patience: Number of evaluations in a row without an improvement after which the run ends. 0: it never ends
            early. Left out: 10, or 20 with rates by rule; 0 where the channel adds noise, as the round of a stop would
            tell about the data.
        where: At the server, with exact sums; or at the clients, whose figures go through `evaluation.channel`.
        seed: Seed of the sampled negatives and of the choice of evaluated clients.
        history: Interactions that a test reads where the model computes a user's vector from a history (models of
            sequences, closed forms, fold_in): the training ones, or `all`, with validation ones too for the test.
        fold_in: true: compute each client's private part from its history, as for a new client, not the trained one.
        clients: Evaluate on at most this many clients, drawn once. 0: all.
        targets: Items, by the source's ids, whose exposure is measured (er@k).
        at: The cut-offs k of hr@k, ndcg@k, recall@k, precision@k, f1@k and er@k.
        negatives: Number of items that a held-out one is ranked among in `sampled` figures, where none are given
            (data.negatives). 0: there are no such figures.
        draws: Number of samples of these items; `sampled` figures are means over them.
        negative_sampling: uniform: all items that the user never interacted with are equally likely. popularity: in
            proportion to their train interactions, without repeats.
        channel: Links that the figures of clients go through, each an [[evaluation.channel]]. A program hands them to
            `Experiment` as `evaluation_channel` instead.

    Example:
        >>> import jaxfed as jf
        >>> jf.Evaluation(every=5, select="val/full/hr@10", patience=3).patience
        3
    """

    every: int = 10
    select: str = "val/full/ndcg@10"
    patience: int | None = None
    where: Literal["server", "clients"] = "server"
    seed: int = 0
    history: Literal["train", "all"] = "train"
    fold_in: bool = False
    clients: int = 10_000
    targets: tuple[str, ...] = ()
    at: tuple[int, ...] = (10, 20)
    negatives: int = 99
    draws: int = 5
    negative_sampling: Literal["uniform", "popularity"] = "uniform"
    channel: tuple[Section, ...] = ()


NOISE = ("gaussian", "local_gaussian", "correlated", "skellam", "discrete_gaussian")  # links that add some


def check_size_is_public(cohort: Mapping[str, Any]) -> None:
    """Raises ValueError where the number of clients in a round follows the data. cohort: the arguments of a cohort."""
    if cohort.get("holders") and not cohort.get("size"):
        raise ValueError(
            "cohort.holders: the size of a round would tell about the data that the channel's noise hides: set "
            "cohort.size"
        )


def with_patience(evaluation: Evaluation, noisy: bool) -> Evaluation:
    """The settings, with the patience that they leave out.

    noisy: whether the channel adds noise.
    """
    usual = 0 if noisy else PATIENCE
    return evaluation if evaluation.patience is not None else replace(evaluation, patience=usual)


@dataclass(frozen=True)
class Config:
    """A whole configuration, every default spelled out. `make_config` makes and checks it.

    Args:
        seed: Random seed of the run.
        rounds: Number of training rounds.
        data: The data set, and how it is divided among clients.
        model: The model.
        algorithm: The federated method; "custom" is what `work`, `channel` and `server` spell out.
        work: What clients compute, their batches, and their optimiser.
        server: The server's optimiser.
        cohort: Who takes part in a round.
        clock: How long clients take.
        parametrization: What the server holds in place of the model's tables.
        channel: The links that updates go through.
        download: The links that clients' downloads go through.
        privacy: How noise is accounted for.
        evaluation: What is measured, and when.
        start: The run whose parameters this one starts with.
        run: Where the run is stored and what it runs on.

    Example:
        >>> from jaxfed.config.schema import make_config
        >>> config = make_config({"model": {"name": "mf", "dim": 8}})
        >>> isinstance(config, Config), config.model.dim, config.rounds
        (True, 8, 400)
    """

    seed: int
    rounds: int
    data: Section
    model: Section
    algorithm: Section
    work: Section
    server: Section
    cohort: Section
    clock: Section
    parametrization: Section
    channel: tuple[Section, ...]
    download: tuple[Section, ...]
    privacy: Privacy
    evaluation: Evaluation
    start: Start
    run: Run
