"""The typed client: answers, retries within a deadline, errors in words."""

import asyncio
import inspect
import time

import httpx
import pytest

from coterie.client import AsyncClient, Client
from coterie.contracts import Example, Instance
from coterie.errors import BackendUnavailable, BadConfiguration, BadData, Conflict

PREDICTION = {
    "scores": [1.0, -1.0], "best": 0, "coterie": None, "posterior": None, "source": "global", "reason": "no-worker",
    "model_version": "v", "mixture_version": "m",
}  # fmt: skip
QUESTIONS = [Instance(prompt="p", responses=["a", "b"]), Instance(worker_id="w", prompt="p", responses=["a", "b"])]


class Server(httpx.MockTransport):
    """Answers with the statuses given, one after another, the last for ever; records requests."""

    def __init__(self, *statuses, **headers):
        self.statuses, self.headers, self.requests = list(statuses), headers, []
        super().__init__(self.answer)

    def answer(self, request):
        self.requests.append(request)
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        if isinstance(status, Exception):
            raise status
        if status != 200:
            headers = {name.replace("_", "-"): value for name, value in self.headers.items()}
            return httpx.Response(status, json={"error": "the words"}, headers=headers)
        if request.url.path == "/v1/feedback":
            import orjson

            return httpx.Response(200, json={"comparisons": orjson.loads(request.content)["comparisons"]})
        return httpx.Response(200, json={"predictions": [PREDICTION] * (2 if b"worker_id" in request.content else 1)})


@pytest.fixture(params=["sync", "async"])
def ask(request):
    """Calls a method of the client, or of the asynchronous one."""

    def call(server, method, *arguments, **settings):
        if request.param == "sync":
            with Client("http://router/", transport=server, **settings) as client:
                return getattr(client, method)(*arguments)

        async def awaited():
            async with AsyncClient("http://router/", transport=server, **settings) as client:
                return await getattr(client, method)(*arguments)

        return asyncio.run(awaited())

    return call


def test_questions_are_answered_in_types(ask):
    server = Server(200)
    first, second = ask(server, "predict", QUESTIONS, token="secret", model="mine")
    assert (first.scores, second.best, first.reason) == ([1.0, -1.0], 0, "no-worker")
    (sent,) = server.requests
    assert sent.url == "http://router/v1/models/mine:predict"
    assert sent.headers["authorization"] == "Bearer secret"
    example = Example(prompt="p", chosen="a", rejected="b")
    assert ask(server, "score", "p", ["a", "b"], None, [example]).source == "global"
    assert b'"chosen":"a"' in server.requests[-1].content
    assert ask(server, "ready") is True


@pytest.mark.parametrize("passing", [429, 502, 503, 504, httpx.ConnectError("gone"), httpx.ReadTimeout("late")])
def test_what_passes_is_asked_again(ask, passing):
    server = Server(passing, passing, 200)
    assert len(ask(server, "predict", QUESTIONS)) == 2
    assert len(server.requests) == 3
    server = Server(passing)
    with pytest.raises(BackendUnavailable, match=r"the words|does not answer"):
        ask(server, "predict", QUESTIONS, retries=1)
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("status", "error"),
    [(400, BadData), (413, BadData), (401, BadConfiguration), (404, BadConfiguration), (409, Conflict), (500, BackendUnavailable)],
)  # fmt: skip
def test_what_does_not_pass_is_told_at_once(ask, status, error):
    server = Server(status, x_request_id="r-17")
    with pytest.raises(error, match=rf"the words \({status}, request r-17\)"):
        ask(server, "predict", QUESTIONS)
    assert len(server.requests) == 1


def test_the_servers_retry_after_is_kept_within_the_deadline(ask):
    started = time.monotonic()
    ask(Server(429, 200, retry_after="1"), "predict", QUESTIONS)
    assert 1 <= time.monotonic() - started < 5
    started, server = time.monotonic(), Server(429, retry_after="60")
    with pytest.raises(BackendUnavailable):
        ask(server, "predict", QUESTIONS, timeout=5)
    assert time.monotonic() - started < 1
    assert len(server.requests) == 1
    assert server.requests[0].extensions["timeout"]["read"] <= 5


def test_a_question_that_cannot_be_is_not_sent(ask):
    server = Server(200)
    with pytest.raises(BadData, match="responses"):
        ask(server, "score", "p", [])
    with pytest.raises(BadData, match="instances"):
        ask(server, "predict", [])
    assert not server.requests
    with pytest.raises(BadConfiguration, match="timeout=0"):
        ask(server, "ready", timeout=0)


def test_an_answer_of_another_program_is_no_answer(ask):
    strange = httpx.MockTransport(lambda _: httpx.Response(200, json={"hello": 1}))
    with pytest.raises(BackendUnavailable, match="no answer of a router"):
        ask(strange, "predict", QUESTIONS)
    short = httpx.MockTransport(lambda _: httpx.Response(200, json={"predictions": [PREDICTION]}))
    with pytest.raises(BackendUnavailable, match="1 answers to 2 questions"):
        ask(short, "predict", QUESTIONS)
    assert ask(Server(httpx.ConnectError("gone")), "ready") is False


def test_votes_are_sent_again_as_they_were(ask):
    server = Server(503, 200)
    (stored,) = ask(server, "feedback", [{"worker_id": "w", "prompt": "p", "chosen": "a", "rejected": "b"}])
    assert server.requests[0].content == server.requests[1].content
    assert stored["worker_id"] == "w"


def test_both_clients_have_the_same_methods():
    def methods(kind):
        return {
            name: str(inspect.signature(member)).replace("Awaitable", "")
            for name, member in vars(kind).items()
            if not name.startswith("_")
        }

    assert methods(Client) == methods(AsyncClient)
