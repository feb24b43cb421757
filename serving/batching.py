"""Dynamic batching: questions of several requests are answered together, in one thread beside the event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from serving.failures import Failure, Overloaded, TooLate
from serving.metrics import BATCH, WAITED, WAITING

log = logging.getLogger("coterie.serving")

Answer = Callable[[Any, Sequence[Any]], list[Any]]


@dataclass(eq=False)
class _Waiting:
    scorer: Any
    question: Any
    texts: int
    request: object
    since: float
    answer: asyncio.Future[Any]


class Batches:
    """Answers questions in batches.

    A batch starts when the thread is free, and either it is full, or as many requests wait as the last one served, or the
    oldest has waited its time: one asker alone never waits, and many who ask again as soon as they are answered are
    served together. The encoder sorts a batch by length.

    Args:
        answer: a scorer and questions to their answers; runs in the thread.
        most: texts of a batch; a question with more is a batch of its own.
        patience: seconds that a question waits for others at most.
        queue: texts that may wait.
    """

    def __init__(self, answer: Answer, most: int, patience: float, queue: int) -> None:
        self._answer, self._most, self._patience, self._queue = answer, most, patience, queue
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="scorer")
        self._waiting: deque[_Waiting] = deque()
        self._texts = 0
        self._together = 1  # requests of the last batch
        self._rate = float(most)  # texts a second, as measured
        self._requests = 0  # that wait
        self._arrived = asyncio.Event()
        self._working: asyncio.Task[None] | None = None

    async def ask(self, scorer: Any, questions: Sequence[Any], deadline: float) -> list[Any]:
        """Answers of one request's questions, all by `scorer`, in their order.

        Args:
            scorer: for all of them, so that no answer mixes two.
            questions: each with `texts`.
            deadline: seconds.

        Raises:
            Overloaded: too many texts wait already. TooLate: the deadline passed.
            Whatever `answer` raises for a question.
        """
        texts = sum(question.texts for question in questions)
        if self._texts and self._texts + texts > self._queue:
            raise Overloaded(
                f"{self._texts} texts wait already, and no more than {self._queue} may. Try again later, or start more "
                "predictors.",
                retry_after=self._texts / self._rate,
            )
        loop, request = asyncio.get_running_loop(), object()
        asked = [_Waiting(scorer, q, q.texts, request, time.monotonic(), loop.create_future()) for q in questions]
        self._waiting.extend(asked)
        self._count(texts)
        self._requests += 1
        self._arrived.set()
        if self._working is None or self._working.done():
            self._working = loop.create_task(self._work())
        answers = asyncio.gather(*(one.answer for one in asked))
        try:
            return await asyncio.wait_for(answers, deadline)
        except TimeoutError:
            raise TooLate(f"The answer took longer than {deadline:g} s. Ask fewer or shorter texts at once.") from None
        finally:
            left = [one for one in self._waiting if one.request is request]
            if left:  # of a request that is over
                self._waiting = deque(one for one in self._waiting if one.request is not request)
                self._count(-sum(one.texts for one in left))

    async def _work(self) -> None:
        while self._waiting:
            left = self._waiting[0].since + self._patience - time.monotonic()
            if left > 0 and self._requests < self._together and self._texts < self._most:
                self._arrived = asyncio.Event()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._arrived.wait(), left)
            else:
                await self._serve(self._take())

    def _take(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        texts = 0
        while self._waiting:
            first = self._waiting[0]
            if batch and (first.scorer is not batch[0].scorer or texts + first.texts > self._most):
                break
            batch.append(self._waiting.popleft())
            texts += first.texts
            WAITED.observe(time.monotonic() - first.since)
        self._count(-texts)
        self._together = len({id(one.request) for one in batch})
        self._requests = len({id(one.request) for one in self._waiting})
        return batch

    async def _serve(self, batch: list[_Waiting]) -> None:
        loop, started = asyncio.get_running_loop(), time.monotonic()
        texts = sum(one.texts for one in batch)
        BATCH.observe(texts)
        try:
            answers = await loop.run_in_executor(
                self._thread, self._answer, batch[0].scorer, [one.question for one in batch]
            )
        except Exception as error:
            if len(batch) > 1:  # one question must not fail the others
                for one in batch:
                    await self._serve([one])
                return
            if not isinstance(error, Failure):
                log.exception("a question could not be answered")
                error = Failure("The scores could not be computed. The server's log says why.")
            if not batch[0].answer.done():
                batch[0].answer.set_exception(error)
            return
        self._rate = 0.7 * self._rate + 0.3 * texts / max(time.monotonic() - started, 1e-6)
        for one, answer in zip(batch, answers, strict=True):
            if not one.answer.done():
                one.answer.set_result(answer)

    def _count(self, texts: int) -> None:
        self._texts += texts
        WAITING.set(self._texts)
