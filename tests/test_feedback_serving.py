"""The feedback endpoint: what it answers, what it survives."""

import asyncio
import itertools
import json
import os
import signal
import threading
import time

import httpx
import numpy as np
import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from starlette.testclient import TestClient

from coterie.errors import BackendUnavailable, StorageFull
from coterie.feedback.database import Database
from coterie.feedback.journal import Overloaded
from coterie.feedback.tables import FEEDBACK, OUTBOX
from coterie.ingest.pseudonyms import pseudonym
from tests.databases import postgres
from tests.feedback_app import KEY, serving


def said(n=0, worker="anna", **more):
    return {"worker_id": worker, "prompt": f"prompt {n}", "chosen": "good", "rejected": "bad"} | more


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    with serving(f"sqlite:///{folder / 'feedback.db'}", folder, daily_cap=3) as (_, address):
        yield folder, httpx.Client(base_url=address, timeout=30)


def online(folder):
    file = folder / "online.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_votes_are_acknowledged_and_reach_the_profile(app):
    folder, client = app
    answer = client.post("/v1/feedback", json={"comparisons": [said(n) for n in range(4)]})
    assert answer.status_code == 200
    assert [one["counts"] for one in answer.json()["comparisons"]] == [True, True, True, False]
    again = client.post("/v1/feedback", json=said(0)).json()["comparisons"]
    assert [one["status"] for one in again] == ["duplicate"]
    deadline = time.monotonic() + 20
    while not (mine := [p for p in online(folder) if p["worker_id"] == pseudonym(KEY, "anna")]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert mine[-1]["comparisons"] == 3
    conflict = client.post("/v1/feedback", json=said(0, confidence=0.1))
    assert (conflict.status_code, "stored already" in conflict.json()["error"]) == (409, True)
    refused = client.post("/v1/feedback", json={"comparisons": [said(9), said(10, chosen="")]})
    assert (refused.status_code, refused.json()["error"][:33]) == (400, "comparisons[1]: chosen is empty. ")
    assert client.post("/v1/feedback", json=said(9)).json()["comparisons"][0]["status"] == "stored"


# ------------------------------------------------------------------------------------------------------------- faults
@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'feedback.db'}"
    else:
        with postgres() as server:
            yield server.url


@pytest.mark.timeout(600)
def test_kill_9_of_the_whole_server_loses_and_doubles_nothing(url, tmp_path):
    acknowledged, turn = [], threading.Lock()

    def send(address, start, until):
        with httpx.Client(base_url=address, timeout=30) as client:
            for n in itertools.count():
                batch = [said(f"{start} {n} {i}", f"worker {i}") for i in range(4)]
                try:
                    answer = client.post("/v1/feedback", json={"comparisons": batch})
                    again = client.post("/v1/feedback", json={"comparisons": batch})  # as a client that is not sure
                except httpx.TransportError:
                    return
                for one in (answer, again):
                    assert one.status_code == 200, one.text
                    with turn:
                        acknowledged.extend(vote["comparison_id"] for vote in one.json()["comparisons"])
                if until.is_set():
                    return

    for kill in range(3):
        with serving(url, tmp_path, daily_cap=100_000) as (server, address):
            until = threading.Event()
            clients = [threading.Thread(target=send, args=(address, f"{kill} {c}", until)) for c in range(4)]
            for client in clients:
                client.start()
            time.sleep(1.5)
            os.kill(server.pid, signal.SIGKILL)
            until.set()
            for client in clients:
                client.join()
    with serving(url, tmp_path, daily_cap=100_000):  # what was left in the outbox is done at start
        database, deadline = Database(url), time.monotonic() + 60
        while True:
            with database.reading() as connection:
                left = connection.scalar(sa.select(sa.func.count()).select_from(OUTBOX))
            if not left:
                break
            assert time.monotonic() < deadline
            time.sleep(0.1)
    with database.reading() as connection:
        there = connection.scalars(sa.select(FEEDBACK.c.comparison_id)).all()
        counted = sa.select(FEEDBACK.c.worker_id, sa.func.count()).group_by(FEEDBACK.c.worker_id)
        said_by = dict(connection.execute(counted).all())
    database.close()
    assert len(acknowledged) > 100
    assert set(acknowledged) <= set(there)
    assert len(there) == len(set(there))
    newest = {profile["worker_id"]: profile for profile in online(tmp_path)}
    assert {worker: profile["comparisons"] for worker, profile in newest.items()} == said_by
    stamps = {}
    for profile in online(tmp_path):
        stamps.setdefault(profile["worker_id"], []).append(profile["event_timestamp"])
    assert all(sorted(set(times)) == times for times in stamps.values())


def test_a_database_that_does_not_move_is_a_503_until_it_does(url, tmp_path):
    with serving(url, tmp_path) as (_, address), httpx.Client(base_url=address, timeout=60) as client:
        assert client.post("/v1/feedback", json=said(0)).status_code == 200
        time.sleep(1)
        with sa.create_engine(url).connect() as other:  # somebody holds the table, and lets nobody in
            alone = "BEGIN IMMEDIATE" if url.startswith("sqlite") else "LOCK TABLE feedback IN ACCESS EXCLUSIVE MODE"
            other.exec_driver_sql(alone)
            locked = client.post("/v1/feedback", json=said(1))
            other.rollback()
        assert (locked.status_code, locked.headers["retry-after"]) == (503, "1")
        assert "Send the same request again" in locked.json()["error"]
        assert "sql" not in locked.text
        # The database's own word: not that the request's patience came to an end, with the journal still held up.
        told = "database is locked" if url.startswith("sqlite") else "lock timeout"
        assert told in (tmp_path / "server.log").read_text()
        assert client.post("/v1/feedback", json=said(1)).status_code == 200


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (StorageFull("sqlite:////secret/place: full"), 507),
        (BackendUnavailable("host secret is down"), 503),
        (Overloaded("wait"), 429),
        (RuntimeError("secret"), 500),
    ],
)
def test_failures_are_told_by_their_kind_and_leak_nothing(monkeypatch, error, status):
    monkeypatch.setattr("sys.argv", ["test"])
    from serving.feedback import routes

    class Failing:
        async def take(self, records):
            raise error

    app = FastAPI()
    app.include_router(routes(Failing()))
    answer = TestClient(app).post("/v1/feedback", json=said(0))
    assert answer.status_code == status
    assert ("retry-after" in answer.headers) == (status != 500)
    assert "secret" not in answer.text


# --------------------------------------------------------------------------------------------------------------- grpc
def test_the_open_inference_protocol_carries_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["test"])
    from kserve import InferInput, InferRequest
    from kserve.errors import InvalidInput, ModelNotReady

    from coterie.config import FeedbackSettings
    from coterie.errors import BackendUnavailable
    from coterie.feedback.relay import Published
    from serving.feedback import Feedback, FeedbackModel
    from tests.feedback_app import publish_nobody

    def nowhere(_):
        raise BackendUnavailable("nobody is there")

    database = FeedbackSettings(database=f"sqlite:///{tmp_path / 'feedback.db'}")
    feedback = Feedback(database)
    model = FeedbackModel(feedback)

    def request(*documents, name="comparison", shape=None):
        data = [document.encode() if isinstance(document, str) else document for document in documents]
        tensor = InferInput(name, shape or [len(data)], "BYTES")
        tensor.set_data_from_numpy(np.array(data, dtype=object), binary_data=False)
        return InferRequest("coterie-feedback", [tensor], request_id="7")

    async def ask():
        assert not await model.healthy()
        with pytest.raises(ModelNotReady, match="Send them again"):
            await model.predict(request(json.dumps(said(0))))
        feedback.follow(KEY, Published(publish_nobody(tmp_path)), nowhere, nowhere)
        assert await model.healthy()
        answer = await model.predict(request(json.dumps(said(0)), json.dumps(said(1))))
        outcomes = [json.loads(one) for one in answer.outputs[0].data]
        assert [one["status"] for one in outcomes] == ["stored", "stored"]
        assert answer.id == "7"
        for bad in (request("{"), request("[]"), request("{}", name="other"), {"instances": []}):
            with pytest.raises(InvalidInput):
                await model.predict(bad)
        feedback.database._engine.dispose()
        file = tmp_path / "feedback.db"
        file.rename(tmp_path / "away.db")
        file.mkdir()
        with pytest.raises(ModelNotReady, match="Send them again"):
            await model.predict(request(json.dumps(said(2))))
        file.rmdir()
        (tmp_path / "away.db").rename(file)
        assert (await model.predict(request(json.dumps(said(2))))).outputs

    try:
        asyncio.run(ask())
    finally:
        feedback.close()
