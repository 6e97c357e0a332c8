"""Questions that arrive one by one, answered together: while a batch is computed, the next one gathers."""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from typing import Any, NamedTuple

import numpy as np

from jaxfed.serving.engine import Question, RefusedQuestionError, ServedExport, answer_questions

MOST_WAITING = 1024  # questions; more are refused until these are answered

Answer = tuple[np.ndarray, np.ndarray]  # numbers of the best items, their scores


class WaitingQuestion(NamedTuple):
    """A question that waits for its answer."""

    served: ServedExport  # whose numbers it is in: an export that was replaced still answers what was asked of it
    question: Question
    answer: "asyncio.Future[Answer]"


def make_batcher(executor: Executor, most: int = MOST_WAITING) -> tuple[Callable[..., Awaitable[Answer]], Any]:
    """Builds (ask(served, question) -> its answer, the task that answers), both of the running event loop.

    Args:
        executor: where answers are computed, outside of the event loop.
        most: number of questions that may wait.

    Returns:
        `ask` raises RefusedQuestionError with the problem "busy" where too many wait.
    """
    waiting: asyncio.Queue[WaitingQuestion] = asyncio.Queue(most)

    async def ask(served: ServedExport, question: Question) -> Answer:
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        try:
            waiting.put_nowait(WaitingQuestion(served, question, future))
        except asyncio.QueueFull:
            raise RefusedQuestionError("too many questions wait: ask again in a second", "busy") from None
        return await future

    async def answer_all() -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await waiting.get()]
            while not waiting.empty():
                batch.append(waiting.get_nowait())
            for served in {each.served.digest: each.served for each in batch}.values():
                some = [each for each in batch if each.served.digest == served.digest]
                try:
                    answers = await loop.run_in_executor(
                        executor, answer_questions, served, [each.question for each in some]
                    )
                except Exception as error:  # it belongs to those who asked: the server goes on
                    for each in some:
                        if not each.answer.done():
                            each.answer.set_exception(error)
                    continue
                for each, answer in zip(some, answers, strict=True):
                    if not each.answer.done():  # who asked may have gone
                        each.answer.set_result(answer)

    return ask, asyncio.get_running_loop().create_task(answer_all())
