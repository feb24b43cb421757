"""`coterie serve`: router and predictor in one KServe model server on one machine."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import socket
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from coterie.errors import BadConfiguration
from coterie.ingest.pseudonyms import load_key
from coterie.routing import MAX_AGE

if TYPE_CHECKING:
    from coterie.encoding import Encoder

log = logging.getLogger("coterie.serving")

ROUTER, PREDICTOR = "coterie", "coterie-predictor"
MAX_AGE_DAYS, DEADLINE_MS = "COTERIE_PROFILE_MAX_AGE_DAYS", "COTERIE_PROFILE_DEADLINE_MS"
"""Environment variables: age past which a profile is stale, and how long a lookup may take."""


def serve(
    bundle: Path,
    profiles: Path,
    port: int = 8080,
    host: str = "127.0.0.1",
    environ: Mapping[str, str] = os.environ,
    encoder: Encoder | None = None,
) -> None:
    """Serve a bundle until SIGTERM or SIGINT; requests in flight are answered first.

    Args:
        bundle: folder of a bundle.
        profiles: folder that publish wrote.
        port: to listen on; 0 takes a free one.
        host: address to listen on.
        environ: the pseudonym key, and the settings named above.
        encoder: in place of the one that the bundle names.

    Raises:
        BadConfiguration: the port is taken, the key or a setting is missing or wrong.
        BadBundle: the bundle is incomplete or damaged, or scores otherwise than when it was made.
        BadData: `profiles` is not a published folder.
    """
    port = _free_port(host, port)
    max_age = timedelta(days=_number(environ, MAX_AGE_DAYS, MAX_AGE.days))
    deadline = _number(environ, DEADLINE_MS, 250) / 1000
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("kserve.trace").setLevel(logging.WARNING)  # two lines a request, which /metrics has as well
    warnings.filterwarnings("ignore", "ORJSONResponse is deprecated")  # KServe's choice of response class
    with _arguments_hidden():
        from serving.predictor import Predictor
        from serving.profiles import FeastProfiles
        from serving.router import Router
    predictor = Predictor(PREDICTOR, bundle, encoder)
    manifest = predictor.bundle.manifest
    key = load_key(environ) if manifest.key_fingerprint else None
    source = FeastProfiles.open(profiles, environ, deadline)
    predictor.load()
    router = Router(ROUTER, manifest, key, source, predictor, max_age)
    router.load()
    state = "Serving" if router.key_agrees else "NOT READY (see the log above): "
    _start(
        router, predictor, host, port, f"{state} {manifest.name} {manifest.model_version[:12]} on http://{host}:{port}"
    )


def _start(router: Any, predictor: Any, host: str, port: int, greeting: str) -> None:
    from kserve import ModelServer
    from kserve.model_server import app

    from serving.protocol import BodyLimit

    class Server(ModelServer):  # type: ignore[misc]
        """KServe's server, on the host asked for, with a word when it listens."""

        async def _serve(self) -> None:
            self._rest_server.config.host = host  # KServe has no setting for it
            greet = asyncio.create_task(self._greet())
            try:
                await super()._serve()
            finally:
                greet.cancel()

        async def _greet(self) -> None:
            while not self._rest_server._server.started:
                await asyncio.sleep(0.05)
            print(f"{greeting}\n{_example(host, port)}", flush=True)

    app.add_middleware(BodyLimit)
    server = Server(http_port=port, enable_grpc=False, workers=1, enable_latency_logging=False)
    server.start([router, predictor])


def _example(host: str, port: int) -> str:
    instance = {"worker_id": "somebody", "prompt": "Shall we?", "responses": ["Yes.", "No, and here is why: ..."]}
    body = orjson.dumps({"instances": [instance]}).decode()
    url = f"http://{host}:{port}/v1/models/{ROUTER}:predict"
    return f"Try: curl -s {url} -H 'content-type: application/json' -d {shlex.quote(body)}"


def _free_port(host: str, port: int) -> int:
    """The port, or a free one for 0, after trying to bind it: before minutes of loading, not after them."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            free: int = probe.getsockname()[1]
            return free
    except (OSError, OverflowError) as error:
        raise BadConfiguration(
            f"cannot listen on {host}:{port}: {error}. Stop what listens there, or choose another --port or --host."
        ) from error


def _number(environ: Mapping[str, str], name: str, default: float) -> float:
    text = environ.get(name, "")
    try:
        value = float(text) if text else default
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise BadConfiguration(f"{name}={text}: not a number above zero. Unset it for {default:g}.")
    return value


@contextmanager
def _arguments_hidden() -> Iterator[None]:
    """Hide the command line from kserve, which parses it at import and knows other arguments than ours."""
    arguments = sys.argv
    sys.argv = arguments[:1]
    try:
        yield
    finally:
        sys.argv = arguments
