"""What `helm test` runs: the stores answer, and what is deployed is ready and scores."""

import json
import os
import socket
import sys
import urllib.request

import redis
import sqlalchemy as sa


def check_redis(connection: str) -> str:
    """Ping Redis, given as Feast writes it: host:port[,password=...][,ssl=true]."""
    address, *options = connection.split(",")
    host, _, port = address.rpartition(":")
    told = dict(option.split("=", 1) for option in options)
    ssl = told.get("ssl", "").lower() == "true"
    redis.Redis(host, int(port), password=told.get("password"), ssl=ssl, socket_timeout=5).ping()
    return f"Redis answers at {address}"


def check_database(url: str) -> str:
    """Connect, and see that a commit is a commit."""
    engine = sa.create_engine(url, connect_args={"connect_timeout": 5})
    with engine.connect() as connection:
        for name in ("fsync", "synchronous_commit"):
            found = connection.execute(sa.text(f"SHOW {name}")).scalar_one()
            if found != "on":
                raise RuntimeError(f"{name} is {found}: votes that were acknowledged could be lost. Set it to on")
    return f"the feedback database answers at {engine.url.host}"


def ask(path: str, body: dict[str, object] | None = None) -> dict[str, object]:
    """One request to the router."""
    headers = {"content-type": "application/json"}
    if os.environ.get("COTERIE_TOKEN"):
        headers["authorization"] = f"Bearer {os.environ['COTERIE_TOKEN']}"
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(ROUTER + path, data, headers), timeout=30) as answer:
        return json.load(answer)


def check_router() -> str:
    """Ready, and a stranger is scored by the global reward."""
    try:
        socket.getaddrinfo(ROUTER.removeprefix("http://"), 80)
    except socket.gaierror:
        if os.environ["DEPLOYED"] == "yes":
            raise RuntimeError("there is no InferenceService. See the logs of the Job that deploys") from None
        return "nothing is deployed yet: run the pipeline with deploy_namespace, or give bundle.uri"
    ask("/v2/models/coterie/ready")
    instance = {"worker_id": "helm-test", "prompt": "Shall we?", "responses": ["Yes.", "No, and here is why."]}
    [prediction] = ask("/v1/models/coterie:predict", {"instances": [instance]})["predictions"]
    return f"bundle {prediction['model_version'][:12]} answers: {prediction['scores']}, {prediction['source']}"


ROUTER = os.environ["ROUTER"]
failed = False
for name, check in {
    "COTERIE_REDIS": check_redis,
    "COTERIE_FEEDBACK_DATABASE": check_database,
    "ROUTER": lambda _: check_router(),
}.items():
    value = os.environ.get(name, "")
    if not value or value.startswith("sqlite:"):
        continue
    try:
        print("ok:", check(value), flush=True)
    except Exception as error:  # whatever it is, the others are still worth a look
        failed = True
        print(f"FAILED: {name}: {type(error).__name__}: {error}", flush=True)
sys.exit(failed)
