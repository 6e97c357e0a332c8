"""What requests ask, in JSON, and what they are answered: between the HTTP server and the engine."""

from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from jaxfed.serving.engine import (
    Question,
    RefusedQuestionError,
    ServedExport,
    ask_for_user,
    number_items,
    parse_user_shape,
)

LONGEST = 4096  # items of a history or a list of exclusions
FOUND = 20  # items that a search by title gives

Id = Annotated[str, Field(max_length=200)]
Number = Annotated[int, Field(ge=-(2**31), lt=2**31)]


class RecommendBody(BaseModel):
    """What a user may be recommended. One of `user`, `history` and `private` says who that is."""

    model_config = ConfigDict(extra="forbid")
    user: Id | None = Field(None, description="a user of the export, where it holds users")
    history: list[Id] | None = Field(None, max_length=LONGEST, description="ids of items, earliest first")
    times: list[Number] | None = Field(None, max_length=LONGEST, description="seconds, of a model that reads times")
    private: dict[Id, Any] | None = Field(None, description="{path: numbers}: what the user's own device keeps")
    k: int = Field(10, ge=1, description="how many items, at most as many as the export was made for")
    exclude: list[Id] = Field([], max_length=LONGEST, description="items that are not wanted")
    explain: bool = Field(False, description="with the nearest items of the history")


class SimilarBody(BaseModel):
    """An item whose like are wanted."""

    model_config = ConfigDict(extra="forbid")
    item: Id
    k: int = Field(10, ge=1)


def make_question(served: ServedExport, body: RecommendBody) -> Question:
    """The question of a request. Raises RefusedQuestionError for one that this export cannot answer."""
    check_length(served, body.k)
    given = [name for name in ("user", "history", "private") if getattr(body, name) is not None]
    if given not in (["user"], ["history"], ["private"], ["history", "private"]):
        raise RefusedQuestionError("say who it is for: user, or history, or private (and history)", "wrong")
    excluded = number_items(served, body.exclude)
    if body.user is not None:
        return ask_for_user(served, body.user, excluded)
    history, times = number_items(served, body.history or []), body.times or []
    if body.private is not None:
        return Question(history, excluded, private=read_private(served, body.private))
    if "history" not in served.programs:
        raise RefusedQuestionError("this model scores by what a client keeps: send user or private", "wrong")
    if times and len(times) != len(history):
        raise RefusedQuestionError("times: one is needed for each item of the history", "wrong")
    return Question(history, excluded, times)


def check_length(served: ServedExport, number: int) -> None:
    """Raises RefusedQuestionError where more items are asked for than an export gives."""
    if number > (most := served.export.manifest["most_items"]):
        raise RefusedQuestionError(f"k is {min(number, 10**9)}: this export gives at most {most} items", "wrong")


def read_private(served: ServedExport, given: dict[str, Any]) -> dict[str, np.ndarray]:
    """A device's own private part. Raises RefusedQuestionError where it is not of the model's shapes."""
    if "private" not in served.programs:
        raise RefusedQuestionError("private: clients keep nothing of this model", "wrong")
    shapes = served.export.manifest["functions"]["score_private"]["inputs"][1]
    if given.keys() != shapes.keys():
        raise RefusedQuestionError(f"private: its parts are {', '.join(shapes)}", "wrong")
    found = {}
    for path, described in shapes.items():
        try:
            with np.errstate(over="ignore"):  # what overflows is refused below
                found[path] = np.asarray(given[path], np.float32)
        except (ValueError, TypeError, OverflowError):
            raise RefusedQuestionError(f"private: {path} is no array of numbers", "wrong") from None
        if found[path].shape != parse_user_shape(described) or not np.isfinite(found[path]).all():
            raise RefusedQuestionError(f"private: {path} must be finite numbers of {described}", "wrong")
    return found


def list_items(served: ServedExport, numbers: Any, scores: Any) -> list[dict[str, Any]]:
    """Items as they are answered."""
    export = served.export
    return [
        {"id": export.items[number], "title": export.titles[number], "score": round(float(score), 6)}
        for number, score in zip(numbers, scores, strict=True)
        if number >= 0
    ]


def search_titles(served: ServedExport, words: str) -> list[dict[str, str]]:
    """Items whose title or id holds some words, whatever their case."""
    wanted, export, found = words.casefold().split(), served.export, []
    for item, title in zip(export.items, export.titles, strict=True):
        text = f"{title} {item}".casefold()
        if all(word in text for word in wanted):
            found.append({"id": item, "title": title})
            if len(found) == FOUND:
                break
    return found
