"""Dynamic batching: who is answered together, what is refused, and that one question fails alone."""

import asyncio
import threading
import time
from typing import NamedTuple

import pytest

from serving.batching import Batches
from serving.failures import Failure, Overloaded, TooLate


class Question(NamedTuple):
    text: str
    texts: int = 1


class Scoring:
    """Answers with the scorer and the text; records batches; hangs until it may run."""

    def __init__(self, running=True):
        self.batches, self.may = [], threading.Event()
        if running:
            self.may.set()

    def __call__(self, scorer, questions):
        self.batches.append([question.text for question in questions])
        self.may.wait(10)
        if any(question.text == "bad" for question in questions):
            raise RuntimeError("the secret is 42")
        return [f"{scorer}:{question.text}" for question in questions]


def batches(scoring, most=8, patience=0.0, queue=100):
    return Batches(scoring, most, patience, queue)


def ask(source, *texts, scorer="s", deadline=10.0, size=1):
    return source.ask(scorer, [Question(text, size) for text in texts], deadline)


async def backlog(source, scoring, *requests):
    """Tasks of requests that all wait behind one that hangs."""
    first = asyncio.create_task(ask(source, "first"))
    await asyncio.sleep(0.05)
    waiting = [asyncio.create_task(request) for request in requests]
    await asyncio.sleep(0.05)
    scoring.may.set()
    assert await first == ["s:first"]
    return waiting


def test_what_waits_is_answered_together_up_to_a_batch_and_in_order():
    scoring = Scoring(running=False)

    async def run():
        source = batches(scoring, most=4)
        waiting = await backlog(source, scoring, *(ask(source, f"{i}a", f"{i}b", f"{i}c") for i in range(3)))
        assert [await one for one in waiting] == [[f"s:{i}{c}" for c in "abc"] for i in range(3)]
        assert scoring.batches == [["first"], ["0a", "0b", "0c", "1a"], ["1b", "1c", "2a", "2b"], ["2c"]]

    asyncio.run(run())


def test_no_batch_mixes_two_scorers():
    scoring = Scoring(running=False)

    async def run():
        source = batches(scoring)
        requests = [ask(source, "a", "b", scorer="old"), ask(source, "c", scorer="new"), ask(source, "d", scorer="new")]
        waiting = await backlog(source, scoring, *requests)
        assert [await one for one in waiting] == [["old:a", "old:b"], ["new:c"], ["new:d"]]
        assert scoring.batches == [["first"], ["a", "b"], ["c", "d"]]

    asyncio.run(run())


def test_one_asker_alone_never_waits_and_many_are_waited_for():
    scoring = Scoring(running=False)

    async def run():
        source = batches(scoring, patience=5.0)
        scoring.may.set()
        started = time.monotonic()
        for i in range(3):
            await ask(source, str(i))
        assert time.monotonic() - started < 1
        scoring.may.clear()
        waiting = await backlog(source, scoring, *(ask(source, f"x{i}") for i in range(3)))
        await asyncio.gather(*waiting)
        # The last batch had three askers: when they ask again one after another, they are answered together.
        again = []
        for i in range(3):
            again.append(asyncio.create_task(ask(source, f"y{i}")))
            await asyncio.sleep(0.05)
        await asyncio.gather(*again)
        assert scoring.batches[-1] == ["y0", "y1", "y2"]
        assert time.monotonic() - started < 4

    asyncio.run(run())


def test_a_queue_that_is_full_refuses_and_says_when_to_come_back():
    scoring = Scoring(running=False)

    async def run():
        source = batches(scoring, queue=10)
        first = asyncio.create_task(ask(source, "first"))
        await asyncio.sleep(0.05)
        large = asyncio.create_task(ask(source, *"abcdefghijkl"))  # more than may wait, but nothing waits yet
        await asyncio.sleep(0.05)
        with pytest.raises(Overloaded, match="12 texts wait already") as refused:
            await ask(source, "z")
        assert refused.value.retry_after > 0
        scoring.may.set()
        await asyncio.gather(first, large)
        assert await ask(source, "z") == ["s:z"]

    asyncio.run(run())


def test_a_request_whose_time_is_over_is_told_and_scored_no_more():
    scoring = Scoring(running=False)

    async def run():
        source = batches(scoring)
        first = asyncio.create_task(ask(source, "first"))
        await asyncio.sleep(0.05)
        with pytest.raises(TooLate, match=r"longer than 0\.1 s"):
            await ask(source, "late", deadline=0.1)
        scoring.may.set()
        await first
        assert await ask(source, "next") == ["s:next"]
        assert ["late"] not in scoring.batches

    asyncio.run(run())


def test_a_question_that_cannot_be_answered_fails_alone_and_leaks_nothing():
    scoring = Scoring(running=False)

    async def run():
        source = batches(scoring)
        good, bad, other = await backlog(source, scoring, ask(source, "a"), ask(source, "bad"), ask(source, "b"))
        assert (await good, await other) == (["s:a"], ["s:b"])
        with pytest.raises(Failure) as failed:
            await bad
        assert "secret" not in str(failed.value)

    asyncio.run(run())
