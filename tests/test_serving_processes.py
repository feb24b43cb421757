"""Router and predictor in processes of their own, as in a cluster, each by its own command."""

import os
import signal
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from coterie.bundle import Bundle
from coterie.scoring import Scorer
from tests.served import KEY, POSTERIORS, HashingEncoder, free_port, is_ready, make_bundle, process, publish_profiles

PROMPT = "Shall I take the earlier train?"
RESPONSES = ["Yes.", "No! Take the later one, perhaps; it is emptier."]
BODY = {"instances": [{"worker_id": "bob", "prompt": PROMPT, "responses": RESPONSES}]}
SERVED = str(Path(__file__).with_name("served.py"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("processes")
    make_bundle(root)
    publish_profiles(root)
    trap = root / "trap" / "torch"
    trap.mkdir(parents=True)
    (trap / "__init__.py").write_text("raise RuntimeError('THE ROUTER IMPORTED TORCH')\n")
    return root


def predictor(run, port, grpc_port, **environ):
    log = run / f"predictor-{port}.log"
    command = [sys.executable, SERVED, "predictor", "--bundle", str(run / "bundle"), "--model_name", "mine"]
    command += ["--http_port", str(port), "--grpc_port", str(grpc_port)]
    return process(command, log, lambda: is_ready(f"http://127.0.0.1:{port}", "mine"), **environ)


def router(run, port, until, *arguments, key=KEY, **environ):
    log = run / f"router-{port}.log"
    command = [sys.executable, "-m", "serving.router", "--profiles", str(run / "publish"), "--model_name", "mine"]
    command += ["--http_port", str(port), "--grpc_port", str(free_port()), *arguments]
    # A torch that raises lies before the real one.
    path = os.pathsep.join([str(run / "trap"), str(Path(SERVED).parents[1])])
    environ |= {"COTERIE_PSEUDONYM_KEY": key, "COTERIE_PROFILE_DEADLINE_MS": "5000", "PYTHONPATH": path}
    return process(command, log, until, **environ)


@pytest.mark.parametrize("protocol", ["v1", "v2", "grpc-v2"])
def test_a_router_asks_its_predictor_in_every_protocol_and_imports_no_torch(run, protocol):
    http, calls, port = free_port(), free_port(), free_port()
    url = f"http://127.0.0.1:{port}"
    host = f"127.0.0.1:{calls if protocol == 'grpc-v2' else http}"
    manifest = f"http://127.0.0.1:{http}/v2/models/mine/manifest"
    arguments = ["--predictor_host", host, "--predictor_protocol", protocol, "--manifest-url", manifest]
    offline = Scorer(Bundle.load(run / "bundle"), HashingEncoder())
    with (
        predictor(run, http, calls) as serving,
        router(run, port, lambda: is_ready(url, "mine"), *arguments) as routing,
    ):
        asked = BODY | {"explain": True, "next_pair": True}
        (answer,) = httpx.post(f"{url}/v1/models/mine:predict", json=asked, timeout=60).json()["predictions"]
        np.testing.assert_allclose(answer["scores"], offline.score(PROMPT, RESPONSES, POSTERIORS[1]).scores, atol=1e-6)
        assert (answer["coterie"], answer["source"], answer["next_pair"]) == (1, "profile", [0, 1])
        assert len(answer["explanation"]["coteries"]) == 3
        names = [name for name in ("BOB", "bob") if name in (run / f"predictor-{http}.log").read_text()]
        assert not names  # who asked stays with the router

        serving.send_signal(signal.SIGSTOP)  # hangs: the router says so within its own deadline, and goes on living
        assert httpx.get(f"{url}/v2/health/live").status_code == 200
        serving.send_signal(signal.SIGCONT)
        serving.kill()
        serving.wait()
        gone = httpx.post(f"{url}/v1/models/mine:predict", json=BODY, timeout=60)
        assert gone.status_code == 503
        assert gone.json()["error"].startswith("The predictor")
        routing.send_signal(signal.SIGTERM)
        assert routing.wait(60) == 0
    log = (run / f"router-{port}.log").read_text()
    assert "TORCH" not in log


def test_a_router_lives_before_its_predictor_does_and_is_ready_after_it(run):
    http, port = free_port(), free_port()
    url = f"http://127.0.0.1:{port}"

    def lives():
        try:
            return httpx.get(f"{url}/v2/health/live").status_code == 200
        except httpx.HTTPError:
            return False

    with router(run, port, lives, "--predictor_host", f"127.0.0.1:{http}") as routing:
        assert not is_ready(url, "mine")
        early = httpx.post(f"{url}/v1/models/mine:predict", json=BODY)
        assert early.status_code == 503
        with predictor(run, http, free_port()):
            deadline = time.monotonic() + 120
            while not is_ready(url, "mine"):
                assert routing.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            assert httpx.post(f"{url}/v1/models/mine:predict", json=BODY, timeout=60).status_code == 200


IMPORTED = """
import runpy, sys, threading, time
import uvicorn

def imported(when):
    print(when, *sorted({name.partition(".")[0] for name, module in list(sys.modules.items()) if module}), flush=True)

async def startup(self, *args, **kwargs):
    await starting(self, *args, **kwargs)
    imported("LIVE")

def look():
    while not {"feast.infra.online_stores.sqlite", "serving.feedback"} <= sys.modules.keys():
        time.sleep(0.1)
    time.sleep(1)
    imported("READY")

starting, uvicorn.Server.startup = uvicorn.Server.startup, startup
threading.Thread(target=look, daemon=True).start()
runpy.run_module("serving.router", run_name="__main__")
"""


def test_a_router_lives_before_its_heavy_imports_and_never_makes_those_of_who_computes(run):
    log = run / "imported.log"
    command = [sys.executable, "-c", IMPORTED, "--profiles", str(run / "publish"), "--model_name", "mine", "--feedback"]
    command += ["--http_port", str(free_port()), "--grpc_port", str(free_port()), "--predictor_host", "127.0.0.1:1"]
    with process(command, log, lambda: "READY" in log.read_text(), COTERIE_PSEUDONYM_KEY=KEY):
        live, ready = (set(line.split()) for line in log.read_text().splitlines() if line.startswith(("LIVE", "READY")))
    assert {"kserve", "httpx"} <= live
    assert not live & {"feast", "dask", "sqlalchemy", "alembic", "psycopg"}
    assert {"feast", "sqlalchemy"} <= ready
    assert not ready & {"torch", "transformers", "sklearn", "scipy", "sentence_transformers", "peft"}


def test_a_router_with_another_key_than_ingests_is_never_ready(run):
    http, port = free_port(), free_port()
    url, log = f"http://127.0.0.1:{port}", run / f"router-{port}.log"
    with (
        predictor(run, http, free_port()),
        router(
            run,
            port,
            lambda: "NOT READY" in log.read_text(),
            "--predictor_host",
            f"127.0.0.1:{http}",
            key="another key of sixteen bytes",
        ),
    ):
        assert not is_ready(url, "mine")
        assert httpx.get(f"{url}/v2/health/live").status_code == 200
        assert httpx.post(f"{url}/v1/models/mine:predict", json=BODY).status_code == 503
        assert "another key" not in log.read_text()


def test_a_predictor_of_a_damaged_bundle_ends_with_words(run, tmp_path):
    import shutil
    import subprocess

    shutil.copytree(run / "bundle", tmp_path / "bundle")
    (tmp_path / "bundle" / "golden.json").write_text("[]")
    command = [sys.executable, SERVED, "predictor", "--bundle", str(tmp_path / "bundle")]
    command += ["--http_port", str(free_port()), "--grpc_port", str(free_port())]
    environ = os.environ | {"PYTHONPATH": str(Path(SERVED).parents[1])}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2
    assert "golden.json" in done.stderr
    assert "Traceback" not in done.stderr


def test_feedback_to_a_router_reaches_the_profile_through_its_predictor(run, tmp_path):
    http, port = free_port(), free_port()
    url = f"http://127.0.0.1:{port}"
    database = f"sqlite:///{tmp_path / 'feedback.db'}"
    told = ["--predictor_host", f"127.0.0.1:{http}", "--feedback", "--database", database]
    someone = {"instances": [{"worker_id": "newcomer", "prompt": PROMPT, "responses": RESPONSES}]}
    vote = {"worker_id": "newcomer", "prompt": "p", "chosen": "boat early.", "rejected": "a train!"}
    token = {"COTERIE_TOKEN": "of both", "COTERIE_CACHE_SECONDS": "3600"}  # the cache learns of it at once, or never
    with (
        predictor(run, http, free_port(), **token),
        router(run, port, lambda: is_ready(url, "coterie-feedback"), *told, **token),
        httpx.Client(base_url=url, timeout=60, headers={"authorization": "Bearer of both"}) as client,
    ):
        assert httpx.post(f"{url}/v1/feedback", json=vote).status_code == 401
        (found,) = client.post("/v1/models/mine:predict", json=someone).json()["predictions"]
        assert found["reason"] == "unknown-worker"
        assert client.post("/v1/feedback", json=vote).json()["comparisons"][0]["status"] == "stored"
        deadline = time.monotonic() + 60
        while True:
            (found,) = client.post("/v1/models/mine:predict", json=someone).json()["predictions"]
            if found["source"] == "profile":
                break
            assert time.monotonic() < deadline
            time.sleep(0.2)
