"""`Experiment`: a run in the hands of a program. The command line does the same from a configuration."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from jaxfed.config.build import RunParts, build_parts, load_data
from jaxfed.config.config_files import set_draw_place
from jaxfed.config.program_pieces import coerce_setting, join_pieces
from jaxfed.config.recipes import Originals, describe_config, planned_rounds
from jaxfed.config.schema import config_to_table
from jaxfed.config.sections import make_pieces
from jaxfed.config.settings import Config, Evaluation, Privacy, Run
from jaxfed.config.stages import Edges
from jaxfed.core.link import Channel
from jaxfed.core.method import Method
from jaxfed.core.model import Model
from jaxfed.core.parametrization import Parametrization
from jaxfed.core.types import Sampler, Tree
from jaxfed.data.batching import Batching
from jaxfed.data.clients import Clients
from jaxfed.sampling.choices import MakeClock, MakeSampler
from jaxfed.training.best_model import read_start
from jaxfed.training.log import Logger
from jaxfed.training.rounds import Progress, initial_arrays, make_run_keys, scored_model
from jaxfed.training.saved_session import RunTables, restore_session, save_session
from jaxfed.training.session import Hooks, Session, Settings, check_select, round_seed, train_until_evaluated
from jaxfed.training.summary import bytes_per_client, params_digest, privacy_record
from jaxfed.training.trained_model import TrainedModel


class Experiment:
    """A federated run: clients, a model and a method, and what lies between client and server.

    Args:
        clients: The clients and their data, see `jaxfed.data.partition`.
        model: The model, see `jaxfed.models` and `jaxfed.from_module`.
        method: What clients and the server compute, see `jaxfed.algorithms`.
        channel: What happens to updates on their way, see `jaxfed.chain` and `jaxfed.channels`. Left out: rows are
            averaged over the clients that hold them, unless the method averages by itself or needs the plain mean.
        cohort: Who takes part in a round, see `jaxfed.sampling`; or a `Sampler`. Left out: 128 drawn uniformly.
        clock: How long clients take, see `jaxfed.sampling`. Left out: rounds are counted, not timed.
        seed: The seed of the model's first values, cohorts, batches and noise.
        batching: How clients cut their data into batches.
        download: A channel of codes for what clients download. Left out: they download the model as it is.
        parametrization: What the server holds in place of the model's parameters.
        evaluation: What is measured, and by which figure the best model is chosen.
        evaluation_channel: What the clients' figures go through, where clients evaluate.
        privacy: How noise is accounted for.
        run: Devices, memory and checkpoints.
        edges: Edge servers between clients and server.
        lazy: The server optimiser moves only the table rows that a round touched.

    Raises:
        ValueError: pieces do not go together or do not fit: one line that says what to do.

    Example:
        >>> import jaxfed as jf, optax
        >>> clients = jf.data.partition(jf.data.load("synthetic", users=60, items=50))
        >>> model = jf.models.mf(clients.num_items, dim=4)
        >>> method = jf.algorithms.fedavg(model, client_optimizer=optax.sgd(0.5))
        >>> run = jf.Experiment(clients, model, method, cohort=jf.sampling.uniform(16))
        >>> [row["round"] for row in run.train(rounds=4, evaluate_every=2)]
        [2, 4]
    """

    _originals: Originals | None  # None: a configuration names the pieces
    _config: Config | None  # None: a program made the pieces

    def __init__(
        self,
        clients: Clients,
        model: Model,
        method: Method,
        channel: Channel | None = None,
        cohort: Sampler | MakeSampler | None = None,
        clock: MakeClock | None = None,
        seed: int = 0,
        *,
        batching: Batching = Batching(),
        download: Channel | None = None,
        parametrization: Parametrization | None = None,
        evaluation: Evaluation = Evaluation(),
        evaluation_channel: Channel | None = None,
        privacy: Privacy = Privacy(),
        run: Run = Run(),
        edges: Edges = Edges(),
        lazy: bool = True,
    ):
        settings: dict[str, Any] = {
            "batching": batching,
            "parametrization": parametrization,
            "download": download,
            "evaluation": evaluation,
            "evaluation_channel": evaluation_channel,
            "privacy": privacy,
            "run": run,
            "edges": edges,
            "lazy": lazy,
        }
        self._pieces, self._originals = join_pieces(clients, model, method, channel, cohort, clock, **settings)
        self._config, pieces = None, self._pieces
        self._begin(build_parts(pieces), Settings(seed, 0, pieces.evaluation, pieces.privacy, pieces.run))

    @classmethod
    def _from_config(cls, config: Config, begins: bool = True) -> "Experiment":
        """The experiment of a configuration, which stays its own; begins: see `read_start`."""
        experiment, settings = cls.__new__(cls), (getattr(config, name) for name in Settings._fields)
        experiment._originals, experiment._config = None, config
        experiment._pieces = make_pieces(config, load_data(config.data), read_start(config, begins))
        experiment._begin(build_parts(experiment._pieces), Settings(*settings))
        return experiment

    def _begin(self, parts: RunParts, settings: Settings) -> None:
        """Puts the experiment before its first round."""
        settings = settings._replace(seed=coerce_setting(int, settings.seed, "seed"))
        self._pieces = self._pieces._replace(batching=self._pieces.batching._replace(draw_on=parts.batching.draw_on))
        arrays = initial_arrays(parts, settings.seed)
        check_select(parts, arrays["best"], settings.evaluation.select)
        seed = round_seed(settings, parts.processes)
        self._session = Session(settings, parts, arrays["state"], arrays["best"], Progress(), seed)
        self.rows: list[dict[str, Any]] = []
        self._folder: Path | None = None  # where it was saved
        self._planned = planned_rounds(self._pieces, self._config)

    def train(
        self,
        rounds: int = 0,
        evaluate_every: int = 0,
        callbacks: Sequence[Callable[[dict[str, Any]], None]] = (),
        loggers: Sequence[Logger] = (),
    ) -> Iterator[dict[str, Any]]:
        """Trains until so many rounds are done in all, and yields a row of figures at every evaluation.

        Leaving the loop pauses the run between two rounds: train goes on from there.

        Args:
            rounds: Number of rounds after which to stop, those included that are done already. 0: as many as were asked
                for before, or as the configuration says.
            evaluate_every: Number of rounds between evaluations on validation. 0: as `evaluation.every` says.
            callbacks: Functions that are called with each row.
            loggers: Objects that are told each row, see `Logger`, and closed when the loop ends or is left.

        Returns:
            An iterator of rows: {name: number or word}, as in a run's metrics.jsonl; see `jaxfed.training.records`.

        Raises:
            ValueError: the number of rounds is not positive; raised when the first row is asked for.
        """
        session, settings = self._session, self._session.settings
        rounds = rounds or settings.rounds
        if rounds < 1:
            raise ValueError(f"train: rounds is {rounds}: say after how many rounds to stop")
        if self._planned and rounds > self._planned:
            raise ValueError(f"train: a piece was made for {self._planned} rounds, not {rounds}: make it anew for more")
        if rounds > session.progress.round:
            session.progress.finished = False
        evaluation = replace(settings.evaluation, every=evaluate_every or settings.evaluation.every)
        session.settings = settings._replace(rounds=rounds, evaluation=evaluation)

        def tell(row):
            self.rows.append(row)
            for callback in (*callbacks, *(logger.log_row for logger in loggers)):
                callback(row)

        try:
            yield from train_until_evaluated(session, Hooks(log_row=tell))
        finally:
            for logger in loggers:
                logger.close()

    @property
    def latest(self) -> TrainedModel:
        """The model as it stands."""
        model = scored_model(self._session.parts, self._session.state)
        return self._trained(*jax.tree.map(lambda x: x.copy(), model))  # the next round consumes the state

    @property
    def best(self) -> TrainedModel:
        """The model of the best evaluation so far; where there was none, as it stands."""
        return self._trained(*self._session.best) if self.best_round else self.latest

    def _trained(self, shared: Tree, private: Tree) -> TrainedModel:
        settings, parts = self._session.settings, self._session.parts
        return TrainedModel(parts, shared, private, settings.evaluation.select, make_run_keys(settings.seed).evaluation)

    def evaluate(self, part: str = "test") -> dict[str, Any]:
        """Figures of the best model on the held-out items, part "val" or "test"; see `TrainedModel.evaluate`."""
        return self.best.evaluate(part)

    def recommend(self, user: str | int, k: int = 10) -> list[tuple[str, str, float]]:
        """[(id, title, score)] of the k best items for a user, by the best model; see `TrainedModel.recommend`."""
        return self.best.recommend(user, k)

    @property
    def params(self) -> Any:
        """The server's model as it stands, as NumPy arrays, see `TrainedModel.params`."""
        return self.latest.params

    @property
    def round(self) -> int:
        """Rounds that are done."""
        return self._session.progress.round

    @property
    def best_round(self) -> int:
        """The round of the best evaluation so far; 0: there was none."""
        return self._session.progress.best_round

    @property
    def bytes_up_per_client(self) -> int:
        """Bytes that a client sent in a round, on average."""
        return bytes_per_client(self._session.progress)["bytes_up_per_client"]

    @property
    def bytes_down_per_client(self) -> int:
        """Bytes that a client was sent in a round, on average."""
        return bytes_per_client(self._session.progress)["bytes_down_per_client"]

    @property
    def privacy(self) -> dict[str, Any]:
        """{"epsilon", "delta", "privacy"} of the rounds done, the last their record; None where there is no noise."""
        return privacy_record(self._session.settings, self._session.parts.account, self.round)

    @property
    def params_sha256(self) -> str:
        """SHA-256 of the model and of what clients keep of it, as `summary.json` has it."""
        return params_digest(self._session)

    def with_seed(self, seed: int) -> "Experiment":
        """The same experiment with another seed, before its first round. It shares what was compiled.

        Args:
            seed: The seed of the model's first values, cohorts, batches and noise.

        Returns:
            Another experiment.
        """
        other = Experiment.__new__(Experiment)
        other._originals, other._pieces = self._originals, self._pieces
        other._config = self._config and replace(self._config, seed=seed)
        other._begin(self._session.parts, self._session.settings._replace(seed=seed))
        other._session.compiled = self._session.compiled
        return other

    def to_table(self, folder: str | Path = ".") -> dict[str, Any]:
        """The configuration of this experiment, as a table that TOML can hold.

        Args:
            folder: Where the tables of a data set in memory are written.

        Returns:
            The table.

        Raises:
            ValueError: a configuration cannot name a piece: the message says which.
        """
        settings = self._session.settings
        if self._config is not None:
            rounds = self._planned or settings.rounds or self._config.rounds
            changed = replace(self._config, seed=settings.seed, rounds=rounds, evaluation=settings.evaluation)
            return config_to_table(set_draw_place(changed, self._pieces.batching.draw_on))
        pieces, rounds = self._pieces._replace(evaluation=settings.evaluation), self._planned or max(settings.rounds, 1)
        assert self._originals  # a program made the pieces
        return describe_config(pieces, self._originals, settings.seed, rounds, Path(folder))

    def _make_tables(self) -> RunTables:
        pieces, seed = self._pieces, self._session.settings.seed
        settings = pieces.batching, pieces.edges, pieces.evaluation, pieces.privacy, pieces.lazy
        return RunTables(self.to_table, {"seed": seed, "settings": str(settings)})

    def save(self, folder: str | Path) -> None:
        """Writes the run to a folder, as `jaxfed train` does: its configuration, rows and a checkpoint.

        Where all pieces have names, config.toml reproduces the run, and `jaxfed train FOLDER/config.toml --resume` goes
        on with it, to the same `params_sha256`. Otherwise a line says which piece has no name, and `restore` reads it.

        Args:
            folder: A new folder, or the one that this run was saved to before.

        Raises:
            ValueError: the folder holds something else.
        """
        save_session(self._session, self.rows, self._make_tables(), Path(folder), self._folder)
        self._folder = Path(folder).absolute()

    def restore(self, folder: str | Path) -> None:
        """Goes on from where a run of the same pieces was saved.

        Args:
            folder: The folder of `save`.

        Raises:
            ValueError: there is no sound checkpoint, or it is of other pieces or data.
        """
        self.rows = restore_session(self._session, self._make_tables(), Path(folder))
        self._folder = Path(folder).absolute()
