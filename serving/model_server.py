"""KServe's model server with our door, our words for every failure, and load and unload that work."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from coterie.config import ServeSettings
from coterie.contracts import Manifest
from coterie.errors import CoterieError

if TYPE_CHECKING:
    from serving.feedback import Feedback
    from serving.predictor import Predictor
    from serving.profiles import FeastProfiles
    from serving.router import Router

log = logging.getLogger("coterie.serving")

Background = Callable[[], Awaitable[None]]


def model_server(
    settings: ServeSettings,
    environ: Mapping[str, str],
    host: str,
    port: int,
    grpc_port: int | None,
    predictor: Predictor | None = None,
    router: Router | None = None,
    store: FeastProfiles | None = None,
) -> Any:
    """A server to `run`. KServe is imported here, once its arguments are what they should be.

    Args:
        settings: deadline, limits, policies.
        environ: the token that requests must bring, if they must.
        host, port: of REST.
        grpc_port: of gRPC; None: none.
        predictor, router: the models that it serves.
        store: profiles that are opened anew before a bundle is.
    """
    import grpc
    from kserve import ModelRepository, ModelServer
    from kserve.model_server import app
    from kserve.protocol.dataplane import DataPlane
    from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import add_GRPCInferenceServiceServicer_to_server
    from kserve.protocol.grpc.servicer import InferenceServicer
    from kserve.protocol.model_repository_extension import ModelRepositoryExtension

    from serving import failures
    from serving.doors import Door, GrpcDoor, load_token

    token, limit = load_token(environ), int(settings.max_body_mb * 2**20)
    followers: list[Callable[[], Any]] = []  # of the bundle that serves

    class Repository(ModelRepository):  # type: ignore[misc]
        """Models that stay registered: an unloaded one is not ready, and can be loaded again."""

        def unload(self, name: str) -> None:
            self.models[name].ready = False

    class Switches(ModelRepositoryExtension):  # type: ignore[misc]
        """Load: the bundle that lies in the folder now serves in place of the old one. Unload: nothing is served."""

        async def load(self, model_name: str) -> dict[str, Any]:
            model = self._known(model_name)
            if store is not None:  # whose profiles of a new mixture are there before the bundle
                try:
                    await asyncio.to_thread(store.open)
                except CoterieError as error:
                    log.error("the bundle was not loaded: %s", error)
                    raise failures.BundleRefused("The profiles cannot be opened. The server's log says why.") from error
            if predictor is not None:
                accept = router.refusal if router is not None else lambda _: None
                await asyncio.to_thread(predictor.switch, accept)
                for follow in followers:
                    try:
                        await asyncio.to_thread(follow)
                    except CoterieError as error:
                        log.error("feedback stays with the bundle before: %s", error)
            model.ready = True
            return {"name": model_name, "load": True}

        async def unload(self, model_name: str) -> dict[str, Any]:
            self._known(model_name).ready = False
            return {"name": model_name, "unload": True}

        def _known(self, model_name: str) -> Any:
            model = self._model_registry.get_model(model_name)
            if model is None:
                raise failures.NotFound(f"There is no model {model_name[:60]} here.")
            return model

    class Plane(DataPlane):  # type: ignore[misc]
        """A body that cannot be read is the asker's fault, whatever stumbled over it."""

        def decode(self, *args: Any, **kwargs: Any) -> Any:
            try:
                return super().decode(*args, **kwargs)
            except Exception:
                raise failures.Refused("The body is not in the format that its headers say. Send JSON.") from None

    class Server(ModelServer):  # type: ignore[misc]
        """One REST and one gRPC server, on the host asked for."""

        def __init__(self) -> None:
            super().__init__(
                http_port=port,
                enable_grpc=False,  # ours has a door
                workers=1,
                enable_latency_logging=False,
                grace_period=settings.grace_seconds,
                registered_models=Repository(),
            )
            self.dataplane = Plane(self.registered_models)
            self.model_repository_extension = Switches(self.registered_models)
            self._background: Background | None = None
            self._greeting, self._error = "", None
            self._feedback: Feedback | None = None
            app.add_middleware(Door, token=token, limit=limit)
            if router is not None and settings.policies:
                from serving.policies import routes

                app.include_router(routes(router, settings.policies, settings.request_seconds))
            app.add_api_route("/v2/models/{model_name}/manifest", self._manifest, methods=["GET"])

        def run(self, models: list[Any], background: Background | None = None, greeting: str = "") -> None:
            """Serve until a signal, with `background` beside it. Raises what that raises."""
            self._background, self._greeting = background, greeting
            for model in models:
                model.log_texts = settings.log_texts
            try:
                self.start(models)
            finally:
                if self._feedback is not None:
                    self._feedback.close()
            if self._error is not None:
                raise self._error

        def take_feedback(self, feedback: Feedback, follow: Callable[[], Any] | None = None) -> None:
            """Answer POST /v1/feedback, and the model coterie-feedback; `follow` is called after each switch of bundles."""
            from serving.feedback import FeedbackModel, routes

            self._feedback = feedback
            if follow is not None:
                followers.append(follow)
            app.include_router(routes(feedback))
            self.register_model(FeedbackModel(feedback))

        async def _serve(self) -> None:
            rest = self._rest_server
            rest.config.host = host  # KServe has no setting for it
            rest._add_middlewares = lambda app: None  # times every request for a log that /metrics replaces
            rest._add_exception_handlers = failures.handle
            calls = await self._grpc() if grpc_port is not None else None
            # Told before the end: a connection that is kept open until then would be cut with a request on its way.
            asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, setattr, app.state, "draining", True)
            tasks = [asyncio.create_task(self._greet()), asyncio.create_task(self._behind())]
            try:
                await super()._serve()
            finally:
                for task in tasks:
                    task.cancel()
                if router is not None:
                    await router.close()
                if calls is not None:
                    await calls.stop(settings.grace_seconds)

        async def _grpc(self) -> Any:
            options = [(f"grpc.max_{way}_message_length", limit) for way in ("send", "receive")]
            server = grpc.aio.server(interceptors=[GrpcDoor(token)], options=options)
            servicer = InferenceServicer(self.dataplane, self.model_repository_extension)
            add_GRPCInferenceServiceServicer_to_server(servicer, server)
            server.add_insecure_port(f"{f'[{host}]' if ':' in host else host}:{grpc_port}")
            await server.start()
            return server

        async def _behind(self) -> None:
            await self._listens()  # whatever is imported behind would hold that up
            try:
                if self._background is not None:
                    await self._background()
            except Exception as error:
                self._error = error
                self._rest_server._server.should_exit = True

        async def _listens(self) -> None:
            while not self._rest_server._server.started:
                await asyncio.sleep(0.05)

        async def _greet(self) -> None:
            await self._listens()
            if self._greeting:
                print(self._greeting, flush=True)

        async def _manifest(self, model_name: str) -> dict[str, Any]:
            """Which bundle answers."""
            model = self.registered_models.get_model(model_name)
            manifest: Manifest | None = getattr(model, "manifest", None)
            if model is None:
                raise failures.NotFound(f"There is no model {model_name[:60]} here.")
            if manifest is None or not await model.healthy():
                raise failures.Unavailable(f"The model {model_name} is not ready.")
            return manifest.model_dump(mode="json")

    return Server()
