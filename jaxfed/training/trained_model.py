"""`TrainedModel`: the parameters, recommendations and figures of a model of a run."""

from typing import Any, NamedTuple

import jax
import numpy as np

from jaxfed.config.build import RunParts
from jaxfed.core.excerpt import shorten
from jaxfed.core.tables import unwrap
from jaxfed.core.types import Key, Tree
from jaxfed.evaluation.evaluator import flatten_user_metrics
from jaxfed.training.recommend import locate_user, score_items, selected_view
from jaxfed.training.rounds import evaluate_model, mark_leaky


class TrainedModel(NamedTuple):
    """A model of a run: the shared parameters, and what the clients keep.

    In a simulation one can look at what clients keep; in a deployment nobody but the client can.
    """

    parts: RunParts
    shared: Tree
    private: Tree  # of all clients [clients, ...]
    select: str  # the figure by which models are chosen
    key: Key  # of evaluations

    @property
    def params(self) -> Any:
        """The server's model as NumPy arrays: {"params": ..., "tables": {name: [num_items, ...]}}, rows in the order of
        `item_ids`."""
        plain = jax.tree.map(np.asarray, unwrap(self.shared))
        if isinstance(plain, dict) and "tables" in plain:
            return {**plain, "tables": jax.tree.map(lambda x: x[: self.parts.data.num_items], plain["tables"])}
        return plain

    @property
    def item_ids(self) -> np.ndarray:
        """str [num_items]: the data's own ids, in the order of the rows of tables."""
        return self.parts.data.source.items

    @property
    def user_ids(self) -> np.ndarray:
        """str [users]: the data's own ids of all who are evaluated."""
        return self.parts.data.population.asked.user_names

    def user_params(self, user: str | int) -> Any:
        """What the client of a user keeps of the model, as NumPy arrays.

        Args:
            user: The user's id in the data.

        Returns:
            The private part: {"private": {name: [users of the client, ...]}, "private_tables": ...}.

        Raises:
            ValueError: there is no such user, the user is at several clients, or nothing is kept.
        """
        place = locate_user(self.parts.data.population, str(user), None)
        if place.home is None:
            raise ValueError(f"user {shorten(str(user))} never takes part (data.cold): nothing is kept")
        return jax.tree.map(lambda x: np.asarray(x[place.home]), unwrap(self.private))

    def evaluate(self, part: str = "test") -> dict[str, Any]:
        """Figures on held-out items.

        Args:
            part: The held-out items, "val" or "test".

        Returns:
            {name: figure}, such as "test/full/ndcg@10".

        Raises:
            ValueError: there is no such part.
        """
        check_part(part)
        values = evaluate_model(self.parts, (self.shared, self.private), part, self.key)
        return mark_leaky(self.parts, values)

    def evaluate_users(self, part: str = "test") -> dict[str, np.ndarray]:
        """Rankings of each user with held-out items, by the server's model and what the user's client keeps.

        Args:
            part: The held-out items, "val" or "test".

        Returns:
            {"user": str [users], name: float [users]}, with names such as "test/full/ndcg@10"; of sampled figures the
            means of the draws. The mean over users is the figure of `evaluate`. Runs on the same data have the users in
            the same order, so that two models can be compared user by user.

        Raises:
            ValueError: there is no such part, rows have labels and no ranks, or there are several processes.

        Example:
            >>> import jaxfed as jf
            >>> run = jf.from_config({"data": {"name": "synthetic", "users": 60, "items": 50}})
            >>> each = run.latest.evaluate_users("test")
            >>> bool(abs(each["test/full/mrr"].mean() - run.latest.evaluate("test")["test/full/mrr"]) < 1e-6)
            True
        """
        check_part(part)
        if self.parts.data.population.labels is not None:
            raise ValueError("evaluate_users: held-out rows have labels, and no ranks: take evaluate")
        if self.parts.processes.size > 1:
            raise ValueError("evaluate_users: each process knows its own clients alone: take one process")
        exam = self.parts.eval_splits[part]
        values = flatten_user_metrics(part, self.parts.user_evaluator(self.shared, self.private, exam))
        asked = exam.targets.counts > 0
        names = self.parts.data.population.asked.user_names[exam.user]
        return {"user": names[asked]} | {name: value[asked] for name, value in values.items()}

    def recommend(self, user: str | int, k: int = 10) -> list[tuple[str, str, float]]:
        """The items with the highest scores for a user, without those that the user had.

        Args:
            user: The user's id in the data.
            k: Number of items.

        Returns:
            [(id, title, score)], the highest first; the title is "" where the data have none.

        Raises:
            ValueError: there is no such user.
        """
        parts = self.parts
        place = locate_user(parts.data.population, str(user), None)
        scores = score_items(parts, (self.shared, self.private), place, selected_view(parts, self.select))
        top = [i for i in np.argsort(-scores, kind="stable")[:k] if np.isfinite(scores[i])]
        items, titles = parts.data.source.items, parts.data.source.titles
        return [(str(items[i]), "" if titles is None else str(titles[i]), float(scores[i])) for i in top]


def check_part(part: str) -> None:
    """Raises ValueError for a part that has no held-out items."""
    if part not in ("val", "test"):
        raise ValueError(f"evaluate: no part {shorten(part)!r}: choose val or test")
