"""A server of the feedback endpoint alone, for the tests: run as a program, in a process of its own.

Places are uniform, and profiles go to a file, a line each.
"""

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import httpx

from coterie.contracts import PROFILE
from tests.served import ROOT, free_port

KEY = b"0123456789abcdef0123456789abcdef"


def publish_nobody(folder):
    """profiles.parquet of one worker."""
    columns = {
        "worker_id": ["somebody"], "embedding": [[0.0]], "reliability": [1.0], "comparisons": [1], "coterie": [0],
        "posterior": [[0.5, 0.5]], "mixture_version": ["m1"], "event_timestamp": [0],
    }  # fmt: skip
    PROFILE.write(folder / "profiles.parquet", columns, embedding=1, posterior=2)
    return folder / "profiles.parquet"


@contextmanager
def serving(url, folder, wait=True, **settings):
    """Start the server; yields its process and address."""
    port = free_port()
    command = [sys.executable, __file__, url, str(folder), str(port), json.dumps(settings)]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (folder / "server.log").open("ab") as log:
        server = subprocess.Popen(command, env=environ, stdout=log, stderr=log, cwd=folder)
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
    try:
        while True:
            try:
                httpx.get(f"{address}/live")
                break
            except httpx.TransportError:
                assert server.poll() is None, (folder / "server.log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)
        yield server, address
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    import uvicorn
    from fastapi import FastAPI

    from coterie.config import FeedbackSettings
    from coterie.feedback.evidence import Place
    from coterie.feedback.relay import Published

    sys.argv, arguments = sys.argv[:1], sys.argv[1:]  # kserve reads the command line when it is imported
    from serving.feedback import Feedback, routes

    url, folder, port, settings = arguments[0], Path(arguments[1]), int(arguments[2]), json.loads(arguments[3])

    def push(profiles):
        with (folder / "online.jsonl").open("a") as file:
            for profile in profiles:
                file.write(json.dumps(asdict(profile), default=str) + "\n")

    def infer(people):
        return [Place(posterior=[0.5, 0.5], embedding=[0.0], reliability=1.0) for _ in people]

    feedback = Feedback(FeedbackSettings(database=url, **settings))
    feedback.follow(KEY, Published(publish_nobody(folder)), infer, push)
    app = FastAPI()
    app.include_router(routes(feedback))
    app.get("/live")(lambda: "yes")
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)
