"""Operating `coterie serve`: bundles switched under load, tokens, limits, metrics, logs, a queue that is full."""

import asyncio
import json
import logging
import re
import shutil
import signal
import threading
import time

import grpc
import httpx
import numpy as np
import pytest

from coterie.bundle import Bundle
from coterie.scoring import Scorer
from serving.doors import JsonLines
from tests.served import HashingEncoder, grpc_address, make_bundle, publish_profiles, serving

PROMPT = "Shall I take the earlier train?"
RESPONSES = ["Yes.", "No! Take the later one, perhaps; it is emptier."]
BODY = {"instances": [{"worker_id": name, "prompt": PROMPT, "responses": RESPONSES} for name in ("ann", "bob")] * 20}
LOAD = "/v2/repository/models/coterie/load"


@pytest.fixture(scope="module")
def versions(tmp_path_factory):
    """Two bundles of different mixtures, and a folder with the profiles of both."""
    root = tmp_path_factory.mktemp("versions")
    for version, seed in (("m1", 1), ("m2", 2)):
        make_bundle(root / version, version, seed)
        publish_profiles(root / version, version)
        shutil.copytree(root / version / "publish", root / "online" / version)
    return root


@pytest.fixture
def run(versions, tmp_path):
    """A folder that serves m1 by a link, with both mixtures' profiles."""
    (tmp_path / "bundle").symlink_to(versions / "m1" / "bundle")
    (tmp_path / "publish").symlink_to(versions / "online")
    return tmp_path


def point(run, bundle):
    """Let the served link name another bundle, at once."""
    (run / "next").symlink_to(bundle)
    (run / "next").rename(run / "bundle")


def scores(folder):
    """What a bundle says of BODY, offline."""
    scorer = Scorer(Bundle.load(folder), HashingEncoder())
    return {k: scorer.score(PROMPT, RESPONSES, posterior).scores for k, posterior in enumerate(POSTERIORS)}


POSTERIORS = np.float32([[0.97, 0.02, 0.01], [0.1, 0.6, 0.3]])


def test_bundles_switch_under_load_without_a_failed_or_mixed_answer(versions, run):
    expected = {v: scores(versions / v / "bundle") for v in ("m1", "m2")}
    answers, failed, stop = [], [], threading.Event()

    def ask(url, keep_alive):
        while not stop.is_set():
            with httpx.Client(base_url=url, timeout=60) as client:
                while not stop.is_set():
                    response = client.post("/v1/models/coterie:predict", json=BODY)
                    (answers if response.status_code == 200 else failed).append(response)
                    if not keep_alive:
                        break

    with serving(run) as (_, url, _):
        askers = [threading.Thread(target=ask, args=(url, i % 2 == 0)) for i in range(4)]
        for asker in askers:
            asker.start()
        for i in range(30):
            point(run, versions / ("m2" if i % 2 == 0 else "m1") / "bundle")
            assert httpx.post(url + LOAD, timeout=60).status_code == 200
            time.sleep(0.02)
        stop.set()
        for asker in askers:
            asker.join()
    assert not failed
    seen = set()
    for answer in answers:
        predictions = answer.json()["predictions"]
        (version,) = {p["mixture_version"] for p in predictions}
        seen.add(version)
        for prediction in predictions:
            assert prediction["source"] == "profile"
            np.testing.assert_allclose(prediction["scores"], expected[version][prediction["coterie"]], atol=1e-5)
    assert seen == {"m1", "m2"}


def test_a_bad_bundle_is_refused_and_the_old_one_serves_on(versions, run, tmp_path):
    damaged, other_key = tmp_path / "damaged", tmp_path / "other-key"
    for folder in (damaged, other_key):
        shutil.copytree(versions / "m2" / "bundle", folder)
    (damaged / "golden.json").write_text("[]")
    manifest = json.loads((other_key / "manifest.json").read_text())
    (other_key / "manifest.json").write_text(json.dumps(manifest | {"key_fingerprint": "0" * 16}))
    with serving(run) as (_, url, log):
        before = httpx.post(f"{url}/v1/models/coterie:predict", json=BODY).json()
        for bad in (damaged, other_key, tmp_path / "nowhere"):
            point(run, bad)
            refused = httpx.post(url + LOAD, timeout=60)
            assert refused.status_code == 422
            assert "the one before serves on" in refused.json()["error"]
            assert str(tmp_path) not in refused.text
            assert httpx.post(f"{url}/v1/models/coterie:predict", json=BODY).json() == before
        assert "golden.json" in log.read_text()
        assert "0" * 16 in log.read_text()
        metrics = httpx.get(f"{url}/metrics").text
        assert 'coterie_bundle_switches_total{cause="refused"} 3.0' in metrics

        assert httpx.post(f"{url}/v2/repository/models/nothing/load").status_code == 404
        assert httpx.post(f"{url}/v2/repository/models/coterie/unload").json()["unload"] is True
        assert httpx.get(f"{url}/v2/models/coterie/ready").status_code == 503
        assert httpx.post(f"{url}/v1/models/coterie:predict", json=BODY).status_code == 503
        point(run, versions / "m2" / "bundle")
        assert httpx.post(url + LOAD, timeout=60).status_code == 200
        after = httpx.post(f"{url}/v1/models/coterie:predict", json=BODY).json()["predictions"]
        assert {p["mixture_version"] for p in after} == {"m2"}


def test_a_token_is_asked_of_everybody_but_probes_and_scrapers(run, tmp_path):
    from kserve import InferenceGRPCClient, InferRequest

    (tmp_path / "token").write_text("a very secret token\n")
    with serving(run, environ={"COTERIE_TOKEN_FILE": str(tmp_path / "token")}) as (_, url, log):
        for path in (
            "/v2/health/live",
            "/v2/health/ready",
            "/v2/models/coterie/ready",
            "/v1/models/coterie",
            "/metrics",
        ):
            assert httpx.get(url + path).status_code == 200
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "a very secret token"}):
            for path in ("/v1/models/coterie:predict", "/v2/models/coterie/infer", LOAD, "/openapi.json"):
                refused = httpx.request("GET" if "openapi" in path else "POST", url + path, json=BODY, headers=headers)
                assert refused.status_code == 401
        right = {"authorization": "Bearer a very secret token"}
        assert httpx.post(f"{url}/v1/models/coterie:predict", json=BODY, headers=right).status_code == 200

        async def call(headers):
            client = InferenceGRPCClient(grpc_address(log))
            assert await client.is_model_ready("coterie")
            return await client.infer(InferRequest("coterie", []), headers=headers)

        for headers, code in (((), "UNAUTHENTICATED"), (tuple(right.items()), "INVALID_ARGUMENT")):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                asyncio.run(call(headers))
            assert refused.value.code().name == code
        assert "secret" not in log.read_text()


def test_a_full_queue_is_429_while_probes_answer_and_passes(run):
    long = {"instances": [{"prompt": "p", "responses": ["word " * 4000] * 64}] * 8}
    short = {"instances": [{"prompt": "p", "responses": ["a", "b"]}]}
    answers = []

    def ask(url):
        with httpx.Client(base_url=url, timeout=60) as own:
            answers.append(own.post("/v1/models/coterie:predict", json=long))

    limits = {"queue_texts": 64, "request_seconds": 0.3, "batch_texts": 64}
    with serving(run, **limits) as (_, url, _), httpx.Client(base_url=url, timeout=60) as client:
        asking = [threading.Thread(target=ask, args=(url,)) for _ in range(12)]
        for one in asking:
            one.start()
        while any(one.is_alive() for one in asking):
            assert client.get("/v2/health/live").status_code == 200
        for one in asking:
            one.join()
        statuses = [answer.status_code for answer in answers]
        assert 429 in statuses
        assert set(statuses) <= {200, 429, 504}
        assert all(int(a.headers["retry-after"]) >= 1 for a in answers if a.status_code == 429)
        metrics = client.get("/metrics").text
        assert re.search(r'coterie_requests_total{cause="overloaded",model="coterie"} [1-9]', metrics)
        deadline = time.monotonic() + 60
        while client.post("/v1/models/coterie:predict", json=short).status_code != 200:
            assert time.monotonic() < deadline


def test_who_is_about_to_end_answers_and_ends_connections_with_answers(run):
    with serving(run) as (process, url, _), httpx.Client(base_url=url, timeout=30) as client:
        assert "connection" not in client.get("/v2/health/live").headers
        process.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + 20
        while (answer := client.post("/v1/models/coterie:predict", json=BODY)).headers.get("connection") != "close":
            assert answer.status_code == 200
            assert time.monotonic() < deadline
        assert answer.status_code == 200
        assert client.post("/v1/models/coterie:predict", json=BODY).headers["connection"] == "close"


def test_metrics_count_by_cause_and_logs_hold_ids_and_no_text(run):
    private = {"worker_id": "ann", "prompt": "very private words", "responses": ["other private words", "b"]}
    with serving(run) as (_, url, log), httpx.Client(base_url=url, timeout=60) as client:
        headers = {"x-request-id": "the-id-of-this-request"}
        answer = client.post("/v1/models/coterie:predict", json={"instances": [private]}, headers=headers)
        assert answer.headers["x-request-id"] == "the-id-of-this-request"
        for worker in ("ann", "nobody", "nobody"):
            client.post("/v1/models/coterie:predict", json={"instances": [private | {"worker_id": worker}]})
        assert client.post("/v1/models/coterie:predict", json={"instances": [private | {"x": 1}]}).status_code == 400
        metrics = client.get("/metrics").text
        for line in (
            'coterie_requests_total{cause="answered",model="coterie"} 4.0',
            'coterie_requests_total{cause="refused",model="coterie"} 1.0',
            'coterie_answers_total{source="profile"} 2.0',
            'coterie_answers_total{source="global"} 2.0',
            'coterie_fallbacks_total{reason="unknown-worker"} 2.0',
            'coterie_profiles_total{where="cache"} 2.0',
            'coterie_profiles_total{where="store"} 2.0',
            "coterie_posterior_entropy_count 2.0",
            "coterie_batch_texts_count 4.0",
            "coterie_queue_texts 0.0",
        ):
            assert line in metrics
        said = log.read_text()
        assert "private" not in said
        assert "ann" not in re.sub(r"channel|annot|cannot|scann", "", said)
        lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
        (mine,) = [line for line in lines if line.get("request_id") == "the-id-of-this-request"]
        assert (mine["status"], mine["path"]) == (200, "/v1/models/coterie:predict")
    with serving(run, log_texts=True) as (_, url, log):
        httpx.post(f"{url}/v1/models/coterie:predict", json={"instances": [private]})
        assert "very private words" in log.read_text()


def test_feedback_moves_the_person_and_the_holdout_is_the_global_rewards(run, tmp_path):
    from coterie.client import Client
    from coterie.contracts import Instance
    from coterie.ingest.pseudonyms import pseudonym
    from coterie.uplift import holdout
    from tests.served import KEY

    told = {"database": f"sqlite:///{tmp_path / 'feedback.db'}", "holdout": 0.5}
    with serving(run, environ={"FEEDBACK": json.dumps(told)}) as (_, url, log), Client(url) as client:
        drawn = {}
        for i in range(20):
            headers = {"x-request-id": f"request-{i}"}
            answer = httpx.post(f"{url}/v1/models/coterie:predict", json=BODY, headers=headers, timeout=60).json()
            bob = answer["predictions"][1]
            held_out, _ = holdout(pseudonym(KEY.encode(), "bob"), f"request-{i}", 0.5)
            assert (bob["source"], bob["reason"]) == (("global", "holdout") if held_out else ("profile", None))
            drawn[held_out] = bob["scores"]
        assert drawn[True] != drawn[False]

        newcomer = [Instance(worker_id="newcomer", prompt=PROMPT, responses=RESPONSES)]
        assert client.predict(newcomer)[0].reason == "unknown-worker"
        votes = [
            {"worker_id": "newcomer", "prompt": f"p {i}", "chosen": "boat early.", "rejected": "a train!"}
            for i in range(9)
        ]
        assert {one["status"] for one in client.feedback(votes)} == {"stored"}
        assert {one["status"] for one in client.feedback(votes)} == {"duplicate"}
        deadline = time.monotonic() + 30
        while (found := client.predict(newcomer)[0]).reason not in (None, "holdout"):
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        assert httpx.get(f"{url}/v2/models/coterie-feedback/ready").status_code == 200
        assert found.source in ("profile", "global")


def test_feedback_follows_the_bundle_that_serves_and_waits_for_profiles_that_are_not_there_yet(versions, run, tmp_path):
    from coterie.client import Client
    from coterie.contracts import Instance

    online, late = tmp_path / "online", versions / "online" / "m2"
    shutil.copytree(versions / "online" / "m1", online / "m1")
    (run / "publish").unlink()
    (run / "publish").symlink_to(online)
    newcomer = [Instance(worker_id="newcomer", prompt=PROMPT, responses=RESPONSES)]
    told = {"database": f"sqlite:///{tmp_path / 'feedback.db'}"}
    with (
        serving(run, environ={"FEEDBACK": json.dumps(told)}, cache_seconds=0) as (_, url, log),
        Client(url, timeout=60) as client,
    ):

        def votes(*numbers):
            sent = [
                {"worker_id": "newcomer", "prompt": f"p {n}", "chosen": "boat.", "rejected": "a train!"}
                for n in numbers
            ]
            assert {one["status"] for one in client.feedback(sent)} == {"stored"}

        def found(mixture, other=None):
            deadline = time.monotonic() + 60
            while True:
                answer = client.predict(newcomer)[0]
                assert answer.mixture_version == mixture
                if answer.source == "profile" and answer.posterior != other:
                    return answer.posterior
                assert answer.source == "profile" or answer.reason in ("unknown-worker", "other-mixture")
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)

        def switch(version):
            point(run, versions / version / "bundle")
            assert httpx.post(url + LOAD, timeout=60).status_code == 200

        votes(0, 1)
        first = found("m1")
        switch("m2")
        votes(2)
        time.sleep(1.5)  # three rounds
        assert client.predict(newcomer)[0].reason == "other-mixture"
        metrics = httpx.get(f"{url}/metrics").text
        assert "coterie_feedback_unpublished 1.0" in metrics
        assert "coterie_feedback_outbox 1.0" in metrics
        assert "no profiles of mixture m2" in log.read_text()

        shutil.copytree(late, online / "m2")
        switch("m2")
        second = found("m2")
        assert "coterie_feedback_unpublished 0.0" in httpx.get(f"{url}/metrics").text
        votes(3)
        found("m2", other=second)
        switch("m1")  # back: all four votes count there too
        found("m1", other=first)


def test_the_log_tells_the_time_in_utc_wherever_it_runs(monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        record = logging.makeLogRecord({"msg": "said", "created": 3600.5, "msecs": 500.0})
        assert json.loads(JsonLines().format(record))["time"] == "1970-01-01T01:00:00.500Z"
    finally:
        monkeypatch.undo()
        time.tzset()
