"""KServe's model server for router and predictor: `coterie serve` runs both, a cluster each in a process of its own."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import socket
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import orjson

from coterie.config import FeedbackSettings, ServeSettings
from coterie.errors import BackendUnavailable, BadConfiguration, BadData, CoterieError
from coterie.ingest.pseudonyms import KEY_FILE_VARIABLE, KEY_VARIABLE, load_key
from coterie.options import InWords, PathOption, read_settings, settings_options
from serving.model_server import model_server

if TYPE_CHECKING:
    from feast import FeatureStore

    from coterie.contracts import Manifest
    from coterie.encoding import Encoder
    from coterie.feedback.evidence import Infer
    from coterie.routing import Profile
    from serving.feedback import Feedback
    from serving.profiles import FeastProfiles, Profiles

log = logging.getLogger("coterie.serving")

ROUTER, PREDICTOR = "coterie", "coterie-predictor"
PROFILES_FILE = "profiles.parquet"
ABSENT = ("torch", "transformers", "sklearn", "scipy")  # from the router: it computes nothing


def serve(
    bundle: Path,
    profiles: Path,
    port: int = 8080,
    host: str = "127.0.0.1",
    grpc_port: int | None = None,
    settings: ServeSettings | None = None,
    feedback: FeedbackSettings | None = None,
    environ: Mapping[str, str] = os.environ,
    encoder: Encoder | None = None,
) -> None:
    """Serve a bundle until SIGTERM or SIGINT; requests in flight are answered first.

    Args:
        bundle: folder of a bundle, or a link to it. POST /v2/repository/models/coterie/load reads it anew.
        profiles: folder that publish wrote, or one that holds several such, one a mixture.
        port: to listen on; 0 takes a free one.
        host: address to listen on.
        grpc_port: for gRPC; None: none, 0 a free one.
        settings: of router and predictor.
        feedback: the database that POST /v1/feedback writes to, and the share that is held out; None: none is taken.
        environ: the pseudonym key, and the token that requests must bring, if they must.
        encoder: in place of the one that the bundle names.

    Raises:
        BadConfiguration: a port is taken, the key is missing or wrong.
        BadBundle: the bundle is incomplete or damaged, or scores otherwise than when it was made.
        BadData: `profiles` is not a published folder, or feedback is taken and it holds none of the bundle's mixture.
        BackendUnavailable: the feedback database does not answer.
    """
    from coterie.bundle import Bundle

    settings = settings or ServeSettings()
    port = _free_port(host, port)
    grpc_port = None if grpc_port is None else _free_port(host, grpc_port)
    with _arguments_hidden():
        from serving.predictor import Predictor
        from serving.profiles import FeastProfiles, Profiles
        from serving.router import Router
    _log_json()
    # What is missing is said before a backbone is loaded, which takes minutes.
    Bundle.load(bundle, verify=False)
    store = FeastProfiles(profiles, environ)
    store.open()
    predictor = Predictor(PREDICTOR, bundle, encoder, settings)
    predictor.warm_up()
    manifest = predictor.manifest
    assert manifest is not None
    key = load_key(environ) if manifest.key_fingerprint else None
    source = Profiles(store.lookup, settings)
    router = Router(ROUTER, key, source, predictor, settings, feedback.holdout if feedback else 0.0)
    refusal = router.refusal(manifest)
    if refusal is not None:
        log.error("NOT READY: %s", refusal)
    state = "Serving" if refusal is None else "NOT READY (see the log above): "
    address = f"http://{host}:{port}" + (f", gRPC on {host}:{grpc_port}" if grpc_port else "")
    greeting = f"{state} {manifest.name} {manifest.model_version[:12]} on {address}\n{_example(host, port)}"
    server = model_server(settings, environ, host, port, grpc_port, predictor, router, store)
    if feedback is not None:
        taking = _feedback(feedback)

        def follow() -> None:
            infer = predictor.posteriors
            _follow(taking, infer.scorer.bundle.manifest, key, store, source, infer)

        if _online(store, manifest.mixture_version) is None:
            raise BadData(
                f"{profiles}: no profiles of mixture {manifest.mixture_version}, on top of which feedback comes. Publish "
                "those of the bundle's run, or serve with --no-feedback."
            )
        if refusal is None:  # else people would be named with another key
            follow()
        server.take_feedback(taking, follow)
    server.run([router, predictor], greeting=greeting)


@click.command(cls=InWords, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@click.option("--bundle", type=PathOption, default=Path("/mnt/models"), show_default=True)
@settings_options(ServeSettings)
def predictor_command(bundle: Path, **values: Any) -> None:
    """The predictor alone; KServe's own arguments are understood as well."""
    settings = read_settings(ServeSettings, values)
    from kserve.model_server import app, args

    from serving.posteriors import routes as posteriors
    from serving.predictor import Predictor

    _log_json()
    predictor = Predictor(args.model_name, bundle, settings=settings)
    server = model_server(settings, os.environ, "0.0.0.0", args.http_port, args.grpc_port, predictor)

    async def warm_up() -> None:
        await asyncio.to_thread(predictor.warm_up)

    app.include_router(posteriors(lambda: predictor.posteriors))
    server.run([predictor], warm_up)


@click.command(cls=InWords, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@click.option("--profiles", type=PathOption, default=Path("/mnt/profiles"), show_default=True)
@click.option("--manifest-url", help="where the predictor tells what it serves; default: by KServe's --predictor_host")
@click.option("--feedback/--no-feedback", envvar="COTERIE_FEEDBACK", help="take feedback")
@settings_options(ServeSettings)
@settings_options(FeedbackSettings)
def router_command(profiles: Path, manifest_url: str | None, feedback: bool, **values: Any) -> None:
    """The router alone; KServe's own arguments are understood as well."""
    for name in ABSENT:  # Feast and what it brings would import them where they are installed, for seconds
        sys.modules[name] = None  # type: ignore[assignment]
    of_feedback = FeedbackSettings.of(**{name: values.pop(name) for name in FeedbackSettings.model_fields})
    settings = read_settings(ServeSettings, values)
    from kserve.model_server import args

    from serving.doors import bearer, load_token
    from serving.profiles import FeastProfiles, Profiles
    from serving.router import Router

    _log_json()
    if not args.predictor_host:
        raise BadConfiguration("the router needs a predictor: give --predictor_host HOST[:PORT]")
    key = load_key() if os.environ.get(KEY_VARIABLE) or os.environ.get(KEY_FILE_VARIABLE) else None
    store = FeastProfiles(profiles)
    source = Profiles(store.lookup, settings)
    held_out = of_feedback.holdout if feedback else 0.0
    router = Router(args.model_name, key, source, settings=settings, held_out=held_out)
    url = manifest_url or f"http://{args.predictor_host}/v2/models/{args.model_name}/manifest"
    headers = bearer(load_token(os.environ))
    server = model_server(settings, os.environ, "0.0.0.0", args.http_port, args.grpc_port, router=router, store=store)

    async def warm_up() -> None:  # the server lives meanwhile; Feast takes five seconds to import
        taking = await asyncio.to_thread(_feedback, of_feedback) if feedback else None
        if taking is not None:
            server.take_feedback(taking)
        await asyncio.to_thread(store.open)
        await router.watch(url, None if taking is None else partial(follow, taking))

    async def follow(taking: Feedback, manifest: Manifest) -> bool:
        from serving.posteriors import RemotePosteriors

        if router.refusal(manifest) is not None:  # people would be named with another key
            return False
        infer = RemotePosteriors(url.partition("/v2/")[0], manifest.mixture_version, headers)
        try:
            await asyncio.to_thread(store.open)  # there may be more by now
            return await asyncio.to_thread(_follow, taking, manifest, key, store, source, infer)
        except CoterieError as error:
            if not (taking.opened or isinstance(error, BackendUnavailable)):
                raise  # what does not pass, such as a database that would lose votes
            log.error("feedback waits: %s", error)
            return False

    server.run([router], warm_up)


def _feedback(settings: FeedbackSettings) -> Feedback:
    """Imported late: the database takes a while."""
    from serving.feedback import Feedback

    return Feedback(settings)


def _follow(
    feedback: Feedback, manifest: Manifest, key: bytes | None, store: FeastProfiles, source: Profiles, infer: Infer
) -> bool:
    """Let feedback come on top of the profiles of the mixture that serves. Return whether there are any."""
    from coterie.feedback.relay import Published
    from serving.feedback import push_to

    named, found = key if manifest.key_fingerprint else None, _online(store, manifest.mixture_version)
    if found is None:
        log.error(
            "%s: no profiles of mixture %s. Feedback is stored, and waits for them: publish those of the bundle's run.",
            store.folder,
            manifest.mixture_version,
        )
        feedback.follow(named, None, infer, lambda _: None)
        return False
    folder, online = found
    write = push_to(online)

    def push(profiles: Sequence[Profile]) -> None:
        write(profiles)
        for profile in profiles:  # else the router would know it only when its cache is old
            source.forget(profile.worker_id)

    feedback.follow(named, Published(folder / PROFILES_FILE), infer, push)
    return True


def _online(store: FeastProfiles, mixture_version: str) -> tuple[Path, FeatureStore] | None:
    """The published folder of a mixture, and its store."""
    from coterie.feedback.relay import mixture_of

    found = (one for one in store.opened().items() if mixture_of(one[0] / PROFILES_FILE) == mixture_version)
    return next(found, None)


def _log_json() -> None:
    """A JSON object a line on standard error, KServe's and uvicorn's lines included."""
    from serving.doors import JsonLines

    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for name in ("kserve", "kserve.trace"):
        logging.getLogger(name).handlers = [logging.NullHandler()]  # else KServe adds its own
        logging.getLogger(name).propagate = True
    for name in ("kserve.trace", "uvicorn.access", "httpx"):  # a line a request, which the door writes better
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "ORJSONResponse is deprecated")  # KServe's choice of response class


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


@contextmanager
def _arguments_hidden() -> Iterator[None]:
    """Hide the command line from kserve, which parses it at import and knows other arguments than ours."""
    arguments = sys.argv
    sys.argv = arguments[:1]
    try:
        yield
    finally:
        sys.argv = arguments
