"""What a router depends on fails under load, one after another: nobody gets another's coterie, and nothing is started again."""

import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from functools import partial

import httpx
import numpy as np
import pytest
import sqlalchemy as sa

from coterie.bundle import Bundle
from coterie.feedback.database import Database
from coterie.feedback.tables import FEEDBACK, OUTBOX
from coterie.scoring import Scorer
from tests.databases import Redis, postgres
from tests.served import (
    KEY,
    POSTERIORS,
    ROOT,
    WORKERS,
    HashingEncoder,
    free_port,
    is_ready,
    make_bundle,
    process,
    publish_profiles,
)

PROMPT = "Shall I take the earlier train?"
RESPONSES = ["Yes.", "No! Take the later one, perhaps; it is emptier."]
PREDICT, FEEDBACK_PATH = "/v1/models/mine:predict", "/v1/feedback"
BACK_WITHIN = 60  # seconds, on a machine that does much else


@pytest.fixture(scope="module")
def redis(tmp_path_factory):
    server = Redis(tmp_path_factory.mktemp("redis"))
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def run(tmp_path_factory, redis):
    """A bundle, and its workers' profiles in Redis."""
    root = tmp_path_factory.mktemp("faults")
    make_bundle(root)
    with pytest.MonkeyPatch.context() as environ:
        environ.setenv("COTERIE_REDIS", f"127.0.0.1:{redis.port}")
        publish_profiles(root, online_store="redis")
    return root


def predictor(run, port):
    command = [sys.executable, str(ROOT / "tests" / "served.py"), "predictor", "--bundle", str(run / "bundle")]
    command += ["--model_name", "mine", "--http_port", str(port), "--grpc_port", str(free_port())]
    url = f"http://127.0.0.1:{port}"
    return process(command, run / f"predictor-{time.monotonic_ns()}.log", lambda: is_ready(url, "mine"))


@contextmanager
def router(run, redis, predictor_port, database, until):
    """A router with feedback; yields its address once `until` says that it is far enough."""
    port = free_port()
    command = [sys.executable, "-m", "serving.router", "--profiles", str(run / "publish"), "--model_name", "mine"]
    command += ["--http_port", str(port), "--grpc_port", str(free_port()), "--feedback", "--database", database]
    command += ["--predictor_host", f"127.0.0.1:{predictor_port}"]
    environ = {
        "COTERIE_PSEUDONYM_KEY": KEY, "COTERIE_REDIS": f"127.0.0.1:{redis.port}", "COTERIE_CACHE_SECONDS": "0.2",
        "COTERIE_CACHE_WORKERS": "2", "COTERIE_PROFILE_DEADLINE_MS": "500", "COTERIE_PROFILE_PAUSE_SECONDS": "0.5",
    }  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    with process(command, run / f"router-{port}.log", lambda: until(url), **environ):
        yield url


def vote(n):
    return {"worker_id": f"voter {n % 7}", "prompt": f"p {n}", "chosen": "boat early.", "rejected": "a train!"}


class Load:
    """A few clients who ask and vote without a pause; keeps what they were told, and which fault there was meanwhile."""

    def __init__(self, url):
        self.url, self.fault, self.stop = url, None, threading.Event()
        self.answers, self.votes, self.broken = [], [], []
        self._clients = [threading.Thread(target=self._run, args=(self._ask,)) for _ in range(3)]
        self._clients.append(threading.Thread(target=self._run, args=(self._vote,)))

    def __enter__(self):
        for client in self._clients:
            client.start()
        return self

    def __exit__(self, *_):
        self.end()

    def end(self):
        self.stop.set()
        for client in self._clients:
            client.join()

    def _run(self, ask):
        try:
            with httpx.Client(base_url=self.url, timeout=60) as client:
                for n in itertools.count():
                    if self.stop.is_set():
                        return
                    before = self.fault
                    ask(client, n, before)
                    time.sleep(0.02)
        except Exception as error:
            self.broken.append(error)

    def _ask(self, client, n, before):
        names = [WORKERS[n % 3], f"stranger {n % 50}"]
        asked = [{"worker_id": name, "prompt": PROMPT, "responses": RESPONSES} for name in names]
        answer = client.post(PREDICT, json={"instances": asked})
        self.answers.append((names, answer, {before, self.fault}))

    def _vote(self, client, n, before):
        answer = client.post(FEEDBACK_PATH, json=vote(n))
        self.votes.append((answer, {before, self.fault}))

    @contextmanager
    def during(self, fault, failing, seconds=2):
        """`failing` makes something fail for some seconds, then what is done inside mends it."""
        self.fault = fault
        failing()
        time.sleep(seconds)
        yield
        self.recovers()
        self.fault = None

    def goes_on(self, votes=20):
        """Wait until so many more votes were answered."""
        wanted, deadline = len(self.votes) + votes, time.monotonic() + BACK_WITHIN
        while len(self.votes) < wanted:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def recovers(self):
        """Wait until everything is as before."""
        deadline = time.monotonic() + BACK_WITHIN
        asked = [{"worker_id": name, "prompt": PROMPT, "responses": RESPONSES} for name in WORKERS]
        with httpx.Client(base_url=self.url, timeout=60) as client:
            while True:
                answer = client.post(PREDICT, json={"instances": asked})
                own = answer.status_code == 200 and all(p["source"] == "profile" for p in answer.json()["predictions"])
                paused = "coterie_profile_store_paused 1.0" in client.get("/metrics").text
                voted = client.post(FEEDBACK_PATH, json=vote(10**6)).status_code == 200
                if own and voted and not paused:
                    return
                assert time.monotonic() < deadline, (answer.text, voted, paused)
                time.sleep(0.1)


def check(load, run):
    """Nobody was served by another's coterie, and no request failed that could be answered."""
    scorer = Scorer(Bundle.load(run / "bundle"), HashingEncoder())
    own = {name: scorer.score(PROMPT, RESPONSES, POSTERIORS[k]).scores for k, name in enumerate(WORKERS)}
    by_global = scorer.score(PROMPT, RESPONSES).by_global
    reasons = set()
    assert not load.broken
    for names, answer, faults in load.answers:
        if answer.status_code != 200:
            assert "predictor" in faults, answer.text  # whom nobody can stand in for
            assert answer.status_code in (503, 504)
            continue
        for name, prediction in zip(names, answer.json()["predictions"], strict=True):
            if prediction["source"] == "profile":
                assert prediction["coterie"] == WORKERS.index(name)
                np.testing.assert_allclose(prediction["scores"], own[name], atol=1e-5)
                continue
            assert (prediction["source"], prediction["coterie"]) == ("global", None)
            assert prediction["reason"] in ("profiles-unavailable", *(() if name in WORKERS else ("unknown-worker",)))
            np.testing.assert_allclose(prediction["scores"], by_global, atol=1e-5)
            reasons.add(prediction["reason"])
    for answer, faults in load.votes:
        if answer.status_code != 200:
            assert "database" in faults, answer.text
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "1"
    return reasons


@pytest.mark.timeout(600)
def test_redis_postgres_and_predictor_fail_under_load(run, redis):
    port = free_port()
    with postgres() as server:
        database = server.database()
        with (
            predictor(run, port) as first,
            router(run, redis, port, database, lambda url: is_ready(url, "coterie-feedback")) as url,
            Load(url) as load,
        ):
            load.recovers()
            load.goes_on()
            with load.during("redis", lambda: redis.signal(signal.SIGSTOP), 3):
                redis.signal(signal.SIGCONT)
            with load.during("redis", lambda: redis.signal(signal.SIGKILL)):
                redis.start()
            for how in (signal.SIGINT, signal.SIGKILL):
                with load.during("database", partial(server.stop, how)):
                    server.start()
            load.fault = "predictor"
            first.kill()
            first.wait()
            with predictor(run, port):
                load.recovers()
                load.fault = None
                load.goes_on()
                load.end()
                kept = check_votes(Database(database), load)
    assert check(load, run) == {"profiles-unavailable", "unknown-worker"}
    assert kept > 30
    statuses = {(status, fault) for answer, faults in load.votes for fault in faults for status in [answer.status_code]}
    assert {(503, "database"), (200, "redis"), (200, "predictor"), (200, None)} <= statuses


def check_votes(database, load):
    """All that was acknowledged is stored, once, and reaches the profiles; return how many votes that were."""
    deadline = time.monotonic() + BACK_WITHIN
    while True:
        with database.reading() as connection:
            left = connection.scalar(sa.select(sa.func.count()).select_from(OUTBOX))
            there = connection.scalars(sa.select(FEEDBACK.c.comparison_id)).all()
        if not left:
            break
        assert time.monotonic() < deadline
        time.sleep(0.2)
    database.close()
    stored = [answer.json()["comparisons"][0] for answer, _ in load.votes if answer.status_code == 200]
    assert {one["status"] for one in stored} <= {"stored", "duplicate"}
    assert {one["comparison_id"] for one in stored} <= set(there)
    assert len(there) == len(set(there))
    return len(stored)


@contextmanager
def small_disk(folder):
    """A file system of four MiB, at first read-only."""
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip(
            "only root can mount a disk that is full or read-only; what SQLite says is tested beside the journal"
        )
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m,ro", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"this machine lets nobody mount: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.timeout(600)
def test_a_disk_that_is_read_only_or_full_costs_no_prediction_and_no_acknowledged_vote(run, redis, tmp_path):
    port = free_port()
    with small_disk(tmp_path / "disk") as disk, predictor(run, port):
        file = disk / "feedback.db"
        with (
            router(run, redis, port, f"sqlite:///{file}", lambda url: is_ready(url, "mine")) as url,
            httpx.Client(base_url=url, timeout=60) as client,
        ):
            refused = until(lambda: client.post(FEEDBACK_PATH, json=vote(0)), 503)  # started while nothing can be kept
            assert refused.headers["retry-after"] == "1"
            assert str(tmp_path) not in refused.text
            subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
            until(lambda: client.post(FEEDBACK_PATH, json=vote(0)), 200)
            with Load(url) as load:
                load.goes_on()
                load.fault = "database"
                with suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
                    while True:
                        filler.write(b"\0" * 4096)
                long = vote(1) | {"chosen": "long " * 100_000}
                full = until(lambda: client.post(FEEDBACK_PATH, json=long), 507)
                assert int(full.headers["retry-after"]) >= 1
                assert not re.search(r"sqlite|disk/|Error", full.text)
                (disk / "filler").unlink()
                load.recovers()
                load.fault = None
                assert client.post(FEEDBACK_PATH, json=long).status_code == 200
                load.goes_on()
                load.end()
            votes = [(a, f) for a, f in load.votes if a.status_code != 507]
            assert all("database" in faults for answer, faults in load.votes if answer.status_code != 200)
            load.votes = votes
            check(load, run)
            assert check_votes(Database(f"sqlite:///{file}"), load) > 10


def until(ask, status):
    """The first answer of this status."""
    deadline = time.monotonic() + BACK_WITHIN
    while (answer := ask()).status_code != status:
        assert time.monotonic() < deadline, answer.text
        time.sleep(0.2)
    return answer
