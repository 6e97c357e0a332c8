"""Answers questions of many users at once from an export: what runs below the HTTP server, and knows nothing of it."""

import difflib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.core.excerpt import shorten
from jaxfed.export.index import open_index
from jaxfed.export.loader import Export, load_export, next_size, pad_lists, read_users_file

BATCHES = (1, 8, 64)  # questions that are answered at once: each number is compiled when an export is opened
WIDTHS = (64, 1024, 8192)  # excluded items of a question: likewise
SCORES = 1 << 25  # of a batch: what a large catalogue has in memory at once
NEAREST = 3  # items of a history that say why an item is recommended


class ExportedUsers(NamedTuple):
    """The users of an export that has any; see `collect_users`."""

    numbers: dict[str, int]
    start: np.ndarray
    history: np.ndarray
    client: np.ndarray
    user: np.ndarray
    features: np.ndarray
    times: np.ndarray | None
    private: dict[str, Any]  # {path: array [clients, ...]}, on the device

    def history_of(self, number: int) -> list[int]:
        """The items of a user, earliest first."""
        return self.history[self.start[number] : self.start[number + 1]].tolist()

    def times_of(self, number: int) -> list[int]:
        """When the user met them; empty where that is unknown."""
        return [] if self.times is None else self.times[self.start[number] : self.start[number + 1]].tolist()


class ServedExport(NamedTuple):
    """An export, ready to answer."""

    export: Export
    digest: str  # SHA-256 of its manifest
    users: ExportedUsers | None
    vectors: np.ndarray | None  # float32 [N, d]: item vectors of length 1
    programs: dict[str, Callable[..., Any]]  # {"history", "user", "private": program}
    index: Any = None  # approximate, of the item vectors; None: they are all compared


class Question(NamedTuple):
    """What a user may be recommended, in numbers of an export."""

    history: list[int]
    excluded: list[int]  # beside the history
    times: list[int] = []  # of the history
    features: list[int] = []
    number: int = -1  # of a user of the export, by whose client's private part items are scored; -1: none
    private: dict[str, np.ndarray] | None = None  # a device's own private part

    @property
    def kind(self) -> str:
        """Which program answers it."""
        return "private" if self.private is not None else "user" if self.number >= 0 else "history"


class RefusedQuestionError(ValueError):
    """A question that an export cannot answer. Its first argument is the reason, its second "unknown", "wrong" or
    "busy"."""


def open_served(folder: str | Path) -> ServedExport:
    """Opens an export, verifies it, and compiles its programs. Raises ValueError where it is missing or damaged."""
    export = load_export(folder)
    users = read_exported_users(export) if "users.npz" in export.files else None
    index = open_index(export.files["items.usearch"]) if "items.usearch" in export.files else None
    programs = make_serving_programs(export, users)
    vectors = normalize_item_vectors(export)
    served = ServedExport(export._replace(files={}), export.digest, users, vectors, programs, index)
    warm_up(served)
    return served


def read_exported_users(export: Export) -> ExportedUsers:
    """The users of an export."""
    arrays = read_users_file(export)
    private = {name.partition(":")[2]: jnp.asarray(x) for name, x in arrays.items() if name.startswith("private:")}
    numbers = {str(name): number for number, name in enumerate(arrays["ids"])}
    known = {name: arrays[name] for name in ("start", "history", "client", "user", "features")}
    return ExportedUsers(numbers, **known, times=arrays.get("times"), private=private)


def normalize_item_vectors(export: Export) -> np.ndarray | None:
    """float32 [N, d]: item vectors of length 1, as an export names them; None: it has none."""
    if not (name := export.manifest["item_vectors"]):
        return None
    table = np.asarray(export.weights[name][: export.manifest["num_items"]], np.float32)
    return table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)


def make_serving_programs(export: Export, users: ExportedUsers | None) -> dict[str, Callable[..., Any]]:
    """{kind of a question: program from its arrays to the best items and their scores}."""
    functions = export.functions
    programs: dict[str, Callable[..., Any]] = {}

    def rank(scores, asked):
        return functions["top_items"](scores, asked["excluded"])

    def by_history(weights, asked):
        known = {name: asked[name] for name in ("history", "times", "features") if name in asked}
        return rank(functions["score_histories"](weights, known), asked)

    def by_private(weights, own, asked):
        known = {name: asked[name] for name in ("user", "features") if name in asked}
        return rank(functions["score_private"](weights, own, known), asked)

    def by_user(weights, private, asked):
        return by_private(weights, {path: leaf[asked["client"]] for path, leaf in private.items()}, asked)

    if "score_histories" in functions:
        programs["history"] = partial(jax.jit(by_history), export.weights)
    if "score_private" in functions:
        programs["private"] = partial(jax.jit(by_private), export.weights)
        if users and users.private:
            programs["user"] = partial(jax.jit(by_user), export.weights, users.private)
    return programs


def batch_sizes(export: Export) -> list[int]:
    """The numbers of questions that are answered at once: fewer of a large catalogue."""
    return [size for size in BATCHES if size == 1 or size * export.manifest["num_items"] <= SCORES]


def warm_up(served: ServedExport) -> None:
    """Compiles the programs for all usual shapes."""
    for kind in served.programs:
        example = Question([], [], number=0 if kind == "user" else -1)
        if kind == "private":
            shapes = served.export.manifest["functions"]["score_private"]["inputs"][1]
            example = example._replace(private={path: np.zeros(parse_user_shape(x)) for path, x in shapes.items()})
        for size in batch_sizes(served.export):
            for width in WIDTHS:
                answer_batch(served, [example._replace(excluded=[-1] * width)] * size)


def parse_user_shape(described: str) -> tuple[int, ...]:
    """The shape of one user's part of an array that a manifest describes, such as "float32[b,1,64]"."""
    return tuple(int(word) for word in described.partition("[")[2].rstrip("]").split(",")[1:] if word)


def answer_questions(served: ServedExport, questions: Sequence[Question]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(numbers of the best items, their scores) for each question, those of a kind at once."""
    answers: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    most = batch_sizes(served.export)[-1]
    for kind in served.programs:
        places = [place for place, question in enumerate(questions) if question.kind == kind]
        for low in range(0, len(places), most):
            some = places[low : low + most]
            items, scores = answer_batch(served, [questions[place] for place in some])
            answers |= {place: (items[i], scores[i]) for i, place in enumerate(some)}
    return [answers[place] for place in range(len(questions))]


def answer_batch(served: ServedExport, questions: Sequence[Question]) -> tuple[np.ndarray, np.ndarray]:
    """(int32 [questions, most], float32 [questions, most]): the best items, of questions of a kind."""
    kind, manifest = questions[0].kind, served.export.manifest
    size = next_size(len(questions), batch_sizes(served.export))
    excluded = [list(dict.fromkeys((*question.history, *question.excluded))) for question in questions]
    asked: dict[str, Any] = {
        "excluded": pad_lists(excluded, size, next_size(max(map(len, excluded), default=1), WIDTHS)),
    }
    inputs = manifest["functions"]["score_histories" if kind == "history" else "score_private"]["inputs"][-1]
    if "features" in inputs:
        asked["features"] = pad_lists(
            [question.features for question in questions], size, *parse_user_shape(inputs["features"])
        )
    if kind == "history":
        asked["history"] = pad_lists([question.history for question in questions], size, manifest["history_length"])
        if "times" in inputs:
            asked["times"] = pad_times(questions, size, manifest["history_length"])
        found = served.programs[kind](asked)
    else:
        asked["user"] = np.zeros(size, np.int32)
        if kind == "user":
            assert served.users
            numbers = [question.number for question in questions] + [0] * (size - len(questions))
            asked["user"], asked["client"] = served.users.user[numbers], served.users.client[numbers]
            found = served.programs[kind](asked)
        else:
            every = [question.private or {} for question in questions]
            every += [every[0]] * (size - len(every))
            own = {path: np.stack([np.asarray(each[path], np.float32) for each in every]) for path in every[0]}
            found = served.programs[kind](own, asked)
    items, scores = jax.device_get(found)
    return items[: len(questions)], scores[: len(questions)]


def pad_times(questions: Sequence[Question], size: int, length: int) -> np.ndarray:
    """int32 [size, length + 1]: the times of the latest items of each, and of the request: that of the last of them."""
    out = np.zeros((size, length + 1), np.int32)
    for row, question in zip(out, questions, strict=False):
        latest = question.times[-length:]
        row[: len(latest)] = latest
        row[len(latest) :] = latest[-1] if latest else 0
    return out


def number_items(served: ServedExport, ids: Sequence[str]) -> list[int]:
    """The numbers of items. Raises RefusedQuestionError where one is unknown."""
    known = served.export.item_numbers
    if missing := [item for item in ids if item not in known]:
        raise RefusedQuestionError(f"no item {shorten(missing[0])!r} here{suggest_near(missing[0], known)}", "unknown")
    return [known[item] for item in ids]


def suggest_near(word: str, known: dict[str, int]) -> str:
    """A hint at a known word that is near; "": there is none, or there are too many to look through."""
    near = difflib.get_close_matches(word[:80], list(known)[:20_000], 1) if len(known) <= 20_000 else []
    return f": did you mean {near[0]!r}?" if near else ""


def ask_for_user(served: ServedExport, name: str, excluded: list[int]) -> Question:
    """The question of a user of the export. Raises RefusedQuestionError where there is no such user."""
    users = served.users
    if users is None:
        raise RefusedQuestionError("this export holds no users (jaxfed export --users): send a history", "unknown")
    if name not in users.numbers:
        raise RefusedQuestionError(f"no user {shorten(name)!r} here: this export has {len(users.numbers):,}", "unknown")
    number = users.numbers[name]
    known = users.history_of(number), excluded, users.times_of(number), users.features[number].tolist()
    by_private = "user" in served.programs
    return Question(*known, number=number if by_private else -1)


def explain_items(served: ServedExport, history: Sequence[int], items: Sequence[int]) -> list[list[tuple[int, float]]]:
    """For each item the nearest items of the history, by the cosine of their vectors: [(number, cosine)]. Empty where
    the model has no item vectors."""
    if served.vectors is None or not history:
        return [[] for _ in items]
    past = np.array(list(dict.fromkeys(history)))
    cosines = served.vectors[np.array(items, int)] @ served.vectors[past].T
    nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :NEAREST]
    return [[(int(past[j]), float(row[j])) for j in best] for row, best in zip(cosines, nearest, strict=True)]


def find_similar(served: ServedExport, item: int, number: int) -> tuple[list[int], list[float]]:
    """The items most like one: by the cosine of their vectors, or as an index finds them. Without vectors: what is
    recommended after this item alone."""
    if served.vectors is None:
        items, scores = answer_questions(served, [Question([item], [])])[0]
        return items[:number].tolist(), scores[:number].tolist()
    if served.index is not None:
        found = served.index.search(served.vectors[item], number + 1)
        near = [(int(key), 1 - float(distance)) for key, distance in zip(found.keys, found.distances, strict=True)]
        others = [each for each in near if each[0] != item][:number]
        return [each[0] for each in others], [each[1] for each in others]
    cosines = served.vectors @ served.vectors[item]
    cosines[item] = -np.inf
    best = np.argpartition(-cosines, min(number, len(cosines) - 1))[:number]
    best = best[np.argsort(-cosines[best], kind="stable")]
    best = best[np.isfinite(cosines[best])]
    return best.tolist(), cosines[best].tolist()
