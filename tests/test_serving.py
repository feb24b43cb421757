"""`coterie serve`: a real server process on a real bundle and real profiles, asked over HTTP."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import httpx
import numpy as np
import pytest

from coterie import contracts
from coterie.bundle import Bundle
from coterie.errors import BadBundle
from coterie.ingest.pseudonyms import fingerprint, pseudonym
from coterie.routing import Profile
from coterie.scoring import Scorer
from tests.served import (
    KEY,
    POSTERIORS,
    WORKERS,
    HashingEncoder,
    free_port,
    make_bundle,
    publish_profiles,
    serving,
)

PROMPT = "Shall I take the earlier train?"
RESPONSES = ["Yes.", "No! Take the later one, perhaps; it is emptier.", "That depends.\n- cost\n- comfort"]
ASK = {"prompt": PROMPT, "responses": RESPONSES}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a bundle and the published profiles of its workers."""
    root = tmp_path_factory.mktemp("serving")
    make_bundle(root)
    publish_profiles(root)
    return root


@pytest.fixture(scope="module")
def offline(run):
    return Scorer(Bundle.load(run / "bundle"), HashingEncoder())


@pytest.fixture(scope="module")
def url(run):
    with serving(run) as (_, url, _):
        yield url


def predict(url, *instances, model="coterie"):
    body = {"instances": list(instances)}
    return httpx.post(f"{url}/v1/models/{model}:predict", json=body, timeout=60)


def fallbacks(url, reason):
    found = re.search(rf'^coterie_fallbacks_total{{reason="{reason}"}} (\S+)$', httpx.get(f"{url}/metrics").text, re.M)
    return float(found[1]) if found else 0.0


@pytest.mark.parametrize("worker", range(3))
def test_a_known_worker_gets_the_scores_of_their_posterior(url, offline, worker):
    (prediction,) = predict(url, ASK | {"worker_id": WORKERS[worker]}).json()["predictions"]
    expected = offline.score(PROMPT, RESPONSES, POSTERIORS[worker])
    np.testing.assert_allclose(prediction["scores"], expected.scores, atol=1e-6)
    assert prediction["best"] == int(np.argmax(expected.scores))
    assert (prediction["source"], prediction["reason"], prediction["coterie"]) == ("profile", None, worker)
    np.testing.assert_allclose(prediction["posterior"], POSTERIORS[worker], atol=1e-7)
    assert prediction["model_version"] == offline.bundle.manifest.model_version
    assert prediction.keys() == contracts.Prediction.model_fields.keys()


def test_workers_of_different_coteries_get_different_scores(url):
    ann, bob = predict(url, ASK | {"worker_id": "ann"}, ASK | {"worker_id": "bob"}).json()["predictions"]
    assert np.abs(np.subtract(ann["scores"], bob["scores"])).max() > 0.1


@pytest.mark.parametrize(("who", "reason"), [({"worker_id": "nobody"}, "unknown-worker"), ({}, "no-worker")])
def test_a_stranger_gets_the_global_reward_flagged_and_counted(url, offline, who, reason):
    before = fallbacks(url, reason)
    (prediction,) = predict(url, ASK | who).json()["predictions"]
    np.testing.assert_allclose(prediction["scores"], offline.score(PROMPT, RESPONSES).by_global, atol=1e-6)
    assert (prediction["source"], prediction["reason"]) == ("global", reason)
    assert prediction["coterie"] is prediction["posterior"] is None
    assert fallbacks(url, reason) == before + 1


def test_a_pseudonym_is_no_worker_id(url):
    (prediction,) = predict(url, ASK | {"worker_id": pseudonym(KEY.encode(), "ann")}).json()["predictions"]
    assert prediction["reason"] == "unknown-worker"


def test_instances_are_answered_in_their_order(url):
    names = ["bob", "nobody", "ann", None, "bob"]
    asked = [
        {"worker_id": name, "prompt": f"{i}?", "responses": RESPONSES[: 1 + i % 3]} for i, name in enumerate(names)
    ]
    answers = predict(url, *asked).json()["predictions"]
    assert [answer["coterie"] for answer in answers] == [1, None, 0, None, 1]
    assert [len(answer["scores"]) for answer in answers] == [1, 2, 3, 1, 2]


def test_odd_texts_are_scored(url):
    asked = {"worker_id": "ann", "prompt": "", "responses": ["", "🙂" * 1000, "\x00\u202e", "a" * 200_000]}
    response = predict(url, asked)
    assert response.status_code == 200
    assert np.isfinite(response.json()["predictions"][0]["scores"]).all()


BAD = {
    "no JSON": (b"{", "format"),
    "NaN": (b'{"instances": [{"prompt": NaN, "responses": ["a"]}]}', "format"),
    "a lone surrogate": (rb'{"instances": [{"prompt": "\ud800", "responses": ["a"]}]}', "format"),
    "no UTF-8": (b'{"instances": [{"prompt": "\xff", "responses": ["a"]}]}', "format"),
    "a list": (b"[]", "not a json object"),
    "nothing": (b"", "format"),
    "deep": (b"[" * 100_000, "format"),
    "no instances": ({}, "instances: field required"),
    "instances no list": ({"instances": {}}, "instances"),
    "empty instances": ({"instances": []}, "instances: list should have at least 1 item"),
    "too many instances": ({"instances": [ASK] * 257}, "at most 256"),
    "an instance no object": ({"instances": [ASK, 3]}, "instances[1]"),
    "no responses": ({"instances": [ASK, {"prompt": "p"}]}, "instances[1].responses: field required"),
    "empty responses": ({"instances": [{"prompt": "p", "responses": []}]}, "instances[0].responses: list should"),
    "a response no text": ({"instances": [{"prompt": "p", "responses": ["a", None]}]}, "instances[0].responses[1]: "),
    "a response too long": ({"instances": [{"prompt": "p", "responses": ["a" * 200_001]}]}, "at most 200000 char"),
    "a number for a worker": ({"instances": [ASK | {"worker_id": 17}]}, "instances[0].worker_id: input should be"),
    "an empty worker": ({"instances": [ASK | {"worker_id": ""}]}, "instances[0].worker_id: string should have at"),
    "a field too many": ({"instances": [ASK | {"posterior": [1]}]}, "instances[0].posterior: there is no such field"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_told_what_where_and_nothing_more(url, name):
    body, words = BAD[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{url}/v1/models/coterie:predict", content=content, headers=headers)
    assert response.status_code == 400
    said = response.json()["error"]
    assert words in said.lower()
    assert len(said) < 600
    assert not re.search(r"Traceback|pydantic|Error\b|/serving/|\.py", said)


def test_another_content_type_is_a_bad_request(url):
    headers = {"content-type": "text/plain"}
    response = httpx.post(f"{url}/v1/models/coterie:predict", content=b"hello", headers=headers)
    assert (response.status_code, "not a JSON object" in response.json()["error"]) == (400, True)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_too_large_is_refused_before_it_is_read(url, chunked):
    content = (b" " * 2**20 for _ in range(17)) if chunked else b" " * (17 * 2**20)
    with httpx.Client() as client:
        try:
            response = client.post(f"{url}/v1/models/coterie:predict", content=content)
        except httpx.WriteError:  # refused and closed while we were still sending
            return
    assert response.status_code == 413
    assert "16777216 bytes" in response.json()["error"]


def test_a_model_that_is_not_there_is_not_found(url):
    assert predict(url, ASK, model="nothing").status_code == 404


def test_health_says_live_and_ready(url):
    assert httpx.get(f"{url}/v2/health/live").json() == {"live": True}
    assert httpx.get(f"{url}/v1/models/coterie").json()["ready"] is True


def test_probes_answer_while_texts_are_scored(url):
    long = [{"prompt": "p", "responses": ["word " * 2000] * 64}] * 8
    answers = []
    asking = threading.Thread(target=lambda: answers.append(predict(url, *long)))
    asking.start()
    slowest, began = 0.0, time.monotonic()
    while asking.is_alive():
        started = time.monotonic()
        assert httpx.get(f"{url}/v2/health/live").status_code == 200
        slowest = max(slowest, time.monotonic() - started)
    asking.join()
    took = time.monotonic() - began
    assert answers[0].status_code == 200
    assert slowest < took / 3, f"a probe took {slowest:.2f} s of the {took:.2f} s of scoring"


# --------------------------------------------------------------------------------------- start, stop, refusals
def test_another_key_is_not_ready_and_a_stop_answers_what_is_in_flight(run):
    with serving(run, key="another key of sixteen bytes") as (server, url, log):
        assert httpx.get(f"{url}/v2/health/live").status_code == 200
        assert httpx.get(f"{url}/v1/models/coterie").status_code == 503
        assert predict(url, ASK | {"worker_id": "ann"}).status_code == 503
        said = log.read_text()
        assert "NOT READY" in said
        assert fingerprint(KEY.encode()) in said
        assert fingerprint(b"another key of sixteen bytes") in said
        assert "another key" not in said

        private = {"prompt": "very private words", "responses": ["very private words", 3]}
        assert predict(url, private, model="coterie-predictor").status_code == 400
        assert "private" not in log.read_text()

        before, answers = len(log.read_text()), []
        long = [{"prompt": "p", "responses": ["word " * 2000] * 64}] * 8
        asking = threading.Thread(target=lambda: answers.append(predict(url, *long, model="coterie-predictor")))
        asking.start()
        time.sleep(0.5)
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
        asking.join()
        assert answers[0].status_code == 200
        assert len(answers[0].json()["predictions"]) == 8
        assert "Traceback" not in log.read_text()[before:]


def serve_command(*arguments, **environ):
    command = [sys.executable, "-m", "coterie.cli", "serve", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"COTERIE_PSEUDONYM_KEY": KEY} | environ
    )


def test_a_taken_port_is_a_configuration_error_at_once(run):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = serve_command(run / "bundle", "--port", port)
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_that_is_no_bundle_is_refused(tmp_path):
    done = serve_command(tmp_path, "--port", free_port())
    assert done.returncode == 2
    assert "manifest.json" in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_profiles_and_settings_that_are_no_numbers_are_refused(run, tmp_path):
    done = serve_command(run / "bundle", "--profiles", tmp_path / "none", "--port", free_port())
    assert done.returncode == 2
    assert "no published worker profiles" in done.stderr
    done = serve_command(run / "bundle", "--port", free_port(), COTERIE_PROFILE_DEADLINE_MS="soon")
    assert done.returncode == 2
    assert "COTERIE_PROFILE_DEADLINE_MS" in done.stderr
    assert "'soon'" in done.stderr


# ------------------------------------------------------------------------------------------ router and predictor
class Known:
    """A profile source of a few profiles; an outage where there are none."""

    def __init__(self, profiles):
        self.profiles = profiles

    async def get(self, worker_ids):
        if self.profiles is None:
            return [None] * len(worker_ids)
        return [self.profiles.get(worker_id, ()) for worker_id in worker_ids]


NOW = datetime(2026, 5, 1, tzinfo=UTC)
BOB = Profile(pseudonym(KEY.encode(), "bob"), (0.0, 1.0), 1.0, 40, 1, (0.1, 0.6, 0.3), "m1", NOW)


@pytest.mark.parametrize(
    ("profile", "reason"),
    [
        (BOB, None),
        (replace(BOB, event_timestamp=NOW - timedelta(days=91)), "stale-profile"),
        (replace(BOB, mixture_version="m0"), "other-mixture"),
        (replace(BOB, posterior=(0.4, 0.6)), "damaged-profile"),
        (None, "profiles-unavailable"),
    ],
)
def test_every_fallback_reaches_the_answer(run, offline, profile, reason):
    from serving.predictor import Predictor
    from serving.router import Router

    predictor = Predictor("coterie-predictor", run / "bundle", HashingEncoder())
    predictor.warm_up()
    source = Known({profile.worker_id: (profile,)} if profile else None)
    router = Router("coterie", KEY.encode(), source, predictor, clock=lambda: NOW)
    answer, _ = asyncio.run(router({"instances": [ASK | {"worker_id": "bob"}, ASK]}, {}))
    bob, nobody = answer["predictions"]
    expected = offline.score(PROMPT, RESPONSES, BOB.posterior if reason is None else None)
    np.testing.assert_allclose(bob["scores"], expected.scores, atol=1e-6)
    assert bob["reason"] == reason
    assert nobody["reason"] == "no-worker"


def test_a_failure_inside_leaks_nothing(run, offline):
    from serving.failures import Failure
    from serving.predictor import Predictor

    class Broken(HashingEncoder):
        def encode(self, texts):
            if PROMPT in texts:
                raise RuntimeError("CUDA error at 0xdeadbeef: the secret is 42")
            return super().encode(texts)

    predictor = Predictor("coterie-predictor", run / "bundle", Broken())
    predictor.warm_up()
    with pytest.raises(Failure) as caught:
        asyncio.run(predictor({"instances": [{"prompt": "", "responses": [PROMPT]}]}, {}))
    assert "secret" not in str(caught.value)


def test_a_bundle_that_was_tampered_with_or_scores_otherwise_is_refused(run, tmp_path):
    import shutil

    from serving.predictor import Predictor

    class Other(HashingEncoder):
        def encode(self, texts):
            return super().encode(texts) * 1.1

    with pytest.raises(BadBundle, match="golden"):
        Predictor("p", run / "bundle", Other()).warm_up()
    shutil.copytree(run / "bundle", tmp_path / "bundle")
    (tmp_path / "bundle" / "rewards" / "global" / contracts.HEAD_FILE).write_bytes(b"something else")
    with pytest.raises(BadBundle, match=r"head\.safetensors"):
        Predictor("p", tmp_path / "bundle", HashingEncoder()).warm_up()
