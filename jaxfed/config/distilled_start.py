"""A run whose model learns the scores of another run's model before the first round."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.config.settings import Start
from jaxfed.config.start import LOGGER, SavedModel, match_items
from jaxfed.core.client_work import identity
from jaxfed.core.model import Model
from jaxfed.core.parametrization import Parametrization, frozen_arguments
from jaxfed.core.types import Tree
from jaxfed.data.clients import Clients
from jaxfed.models.distillation import check_student, distil_scores


def find_teacher(settings: Start, saved: SavedModel, data: Clients) -> Callable[[jax.Array], jax.Array]:
    """teach(history int [L]) -> float [items]: the other model's scores for the items of these data, over the
    temperature; -inf for items that it did not have. Raises ValueError where it cannot."""
    if saved.score is None:
        raise ValueError(
            f"start.distil_steps: the model in {saved.run} does not score histories alone: take a run of a closed "
            "form, such as ease, or of a model of sequences that reads no times"
        )
    if not settings.distil_temperature > 0:
        raise ValueError(f"start.distil_temperature is {settings.distil_temperature:g}: it must be above 0")
    score, places = saved.score, match_items(settings, saved, data, data.num_items)
    if not (places >= 0).any():
        raise ValueError(f"start.run: no item of {saved.run} is in these data: set start.match")
    end, rows = len(saved.items), np.where(places < 0, len(saved.items), places)

    def teach(history):
        own = jnp.asarray(rows).at[history].get(mode="fill", fill_value=end)
        found = score(own.astype(jnp.int32)) / settings.distil_temperature
        return found.at[jnp.asarray(rows)].get(mode="fill", fill_value=-jnp.inf)

    return teach


def forward_all_rows(parametrization: Parametrization, theta: Tree) -> Tree:
    """The model's shared parameters, with all rows of their tables."""
    return parametrization.forward(theta, None, *frozen_arguments(parametrization.frozen))


def with_distilled(
    settings: Start, saved: SavedModel, data: Clients, model: Model, parametrization: Parametrization | None
) -> tuple[Model, Parametrization | None]:
    """A model and its parametrization, whose first parameters have learnt the other model's scores. Raises ValueError
    where the one cannot learn, or the other cannot teach."""
    check_student(model)
    teach, held = find_teacher(settings, saved, data), parametrization or model
    forward = partial(forward_all_rows, parametrization) if parametrization else identity

    def init(key):
        model_key, own = jax.random.split(key)
        params, losses = distil_scores(model, held.init(model_key), teach, own, settings.distil_steps, forward)
        if not isinstance(losses, jax.core.Tracer):
            LOGGER.info(
                "start: the scores of %s learnt in %s steps: divergence %.3f at the first, %.3f at the last",
                *(saved.run, len(losses), losses[0], losses[-1]),
            )
        return params

    if parametrization:
        return model, parametrization._replace(init=init)
    return model._replace(init=init), None
