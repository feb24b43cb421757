"""The proxy of policies: who asks decides which adapter of an OpenAI-compatible server answers, piece by piece."""

import json
import shutil
import sys

import httpx
import pytest

from coterie.contracts import PolicyGate
from coterie.routing import policy_of
from tests.served import free_port, make_bundle, process, publish_profiles, serving

PATH = "/openai/v1/chat/completions"
GATES = [(None, "own"), (0, "own"), (1, "start"), (2, "global")]
FAKE = """
import asyncio, sys, uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

app = FastAPI()

@app.get("/")
def live():
    return "yes"

@app.post("/v1/chat/completions")
async def complete(request: Request):
    body = await request.json()
    if body["model"] == "start":
        return JSONResponse({"error": {"message": "no adapter of this name"}}, status_code=404)
    if not body.get("stream"):
        return {"asked": body, "authorization": request.headers.get("authorization")}
    async def pieces():
        for word in ("one", "two"):
            yield f"data: {word}\\n\\n"
            await asyncio.sleep(0.3)
        yield "data: [DONE]\\n\\n"
    return StreamingResponse(pieces(), media_type="text/event-stream")

uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="error")
"""


def test_the_gates_say_which_policy_answers():
    gates = [PolicyGate(coterie=k, serves=serves, reason="r") for k, serves in GATES]
    assert [policy_of(gates, k) for k in (None, 0, 1, 2, 3)] == ["global", "coterie-0", "start", "global", "global"]
    start = [PolicyGate(coterie=None, serves="start", reason="r"), *gates[1:]]
    assert [policy_of(start, k) for k in (None, 0, 2)] == ["start", "coterie-0", "start"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a bundle that holds policies, and one that holds none."""
    root = tmp_path_factory.mktemp("policies")
    make_bundle(root)
    publish_profiles(root)
    shutil.copytree(root / "bundle", root / "plain")
    manifest = json.loads((root / "bundle" / "manifest.json").read_text())
    manifest["policies"] = [{"coterie": k, "serves": serves, "reason": "r"} for k, serves in GATES]
    (root / "bundle" / "manifest.json").write_text(json.dumps(manifest))
    return root


@pytest.fixture(scope="module")
def url(root):
    (root / "fake.py").write_text(FAKE)
    port = free_port()

    def lives():
        try:
            return httpx.get(f"http://127.0.0.1:{port}/").status_code == 200
        except httpx.HTTPError:
            return False

    fake = process([sys.executable, str(root / "fake.py"), str(port)], root / "fake.log", lives)
    with fake, serving(root, policies=f"http://127.0.0.1:{port}") as (_, url, _):
        yield url


def ask(url, **body):
    return httpx.post(
        url + PATH, json={"model": "x", "messages": [{"role": "user", "content": "hi"}]} | body, timeout=60
    )


@pytest.mark.parametrize(("user", "policy", "reason"), [("ann", "coterie-0", None), ("nobody", "global", "unknown-worker"), (None, "global", "no-worker")])  # fmt: skip
def test_who_asks_decides_which_policy_answers_and_is_not_told(url, user, policy, reason):
    answer = ask(url, temperature=0.3, **({"user": user} if user else {}))
    assert answer.status_code == 200
    assert answer.json()["asked"] == {
        "model": policy, "messages": [{"role": "user", "content": "hi"}], "temperature": 0.3,
    }  # fmt: skip
    assert answer.headers["x-coterie-policy"] == policy
    assert answer.headers.get("x-coterie-reason") == reason


def test_an_answer_streams_as_it_is_written(url):
    body = {"model": "x", "messages": [], "user": "ann", "stream": True}
    pieces = []
    with httpx.stream("POST", url + PATH, json=body, timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        pieces = [piece for piece in answer.iter_text() if piece]
    assert len(pieces) == 3
    assert "".join(pieces) == "data: one\n\ndata: two\n\ndata: [DONE]\n\n"


def test_what_the_server_refuses_is_handed_back_and_what_is_no_question_is_refused(url):
    assert ask(url, user="bob").status_code == 404  # coterie 1 is answered by the start, which this server has not
    for bad in ({"user": 3}, {"user": ""}, {"messages": "hi"}):
        refused = ask(url, **bad)
        assert refused.status_code == 400
        assert refused.json()["error"].startswith(next(iter(bad)))
    assert httpx.post(url + PATH, content=b"{").status_code == 400


def test_a_server_that_is_gone_and_a_bundle_without_policies(root, tmp_path):
    for folder in ("plain", "bundle"):
        run = tmp_path / folder
        run.mkdir()
        (run / "bundle").symlink_to(root / folder)
        (run / "publish").symlink_to(root / "publish")
        with serving(run, policies=f"http://127.0.0.1:{free_port()}") as (_, other, _):
            assert ask(other).status_code == (404 if folder == "plain" else 503)
