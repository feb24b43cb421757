"""The predictor: a KServe model that scores responses by the rewards of one bundle.

In a process of its own, as in a cluster (a new version is a rollout there):

    python -m serving.predictor --bundle /mnt/models --model_name coterie [--http_port 8080] [--grpc_port 8081]
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coterie.answers import Asked, answer
from coterie.bundle import Bundle
from coterie.config import ServeSettings
from coterie.contracts import ROUTE_TENSORS, Manifest, Prediction, RoutedRequest
from coterie.encoding import Encoder
from coterie.errors import BadBundle, CoterieError
from coterie.feedback.posteriors import Posteriors
from coterie.scoring import Scorer, load_scorer
from serving.batching import Batches
from serving.failures import BundleRefused, Unavailable
from serving.metrics import SWITCHES
from serving.protocol import Model

log = logging.getLogger("coterie.serving")


class Predictor(Model):
    """Predicts for contracts.RoutedRequest.

    Args:
        name: of the model in the URL.
        folder: the bundle; may be a link to it, which a later `switch` follows anew.
        encoder: the bundle's encoder; by default loaded by the name and revision that the bundle gives.
        settings: of batches, queue and deadline.
    """

    request = RoutedRequest
    inputs = ROUTE_TENSORS

    def __init__(
        self, name: str, folder: Path, encoder: Encoder | None = None, settings: ServeSettings | None = None
    ) -> None:
        super().__init__(name)
        self.folder, self._encoder, self._settings = folder, encoder, settings or ServeSettings()
        self._scorer: Scorer | None = None
        self._posteriors: Posteriors | None = None
        self._switching = threading.Lock()
        self._batches = Batches(
            answer, self._settings.batch_texts, self._settings.batch_wait_ms / 1000, self._settings.queue_texts
        )
        self.ready = True  # KServe registers no other; `healthy` says whether it is

    @property
    def manifest(self) -> Manifest | None:
        """Of the bundle that serves now; None before one does."""
        return None if self._scorer is None else self._scorer.bundle.manifest

    @property
    def scorer(self) -> Scorer:
        """The one that serves now. Raises Unavailable: none does yet."""
        if self._scorer is None:
            raise Unavailable(f"The model {self.name} is not ready.")
        return self._scorer

    @property
    def posteriors(self) -> Posteriors:
        """Of the bundle that serves now. Raises Unavailable: none does yet."""
        scorer = self.scorer
        if self._posteriors is None or self._posteriors.scorer is not scorer:
            self._posteriors = Posteriors(scorer)
        return self._posteriors

    def warm_up(self) -> None:
        """Load bundle and encoder and score the golden texts; then the predictor is ready.

        Raises:
            BadBundle: the bundle is incomplete or damaged, the golden scores come out otherwise than when it was made, or
                the encoder is another. BadConfiguration: the encoder cannot be loaded.
        """
        self._scorer = load_scorer(Bundle.load(self.folder.resolve()), self._encoder)

    def switch(self, accept: Callable[[Manifest], str | None] = lambda _: None) -> Manifest:
        """Load the bundle that lies in the folder now, beside the one that serves, and let it serve.

        A request is answered by the bundle that served when it came.

        Args:
            accept: says why a bundle must not serve here, None if it may.

        Raises:
            BundleRefused: it is incomplete or damaged, its golden scores come out otherwise, or it is not accepted; the one
                before serves on.
        """
        with self._switching:
            try:
                bundle = Bundle.load(self.folder.resolve())
                if (refusal := accept(bundle.manifest)) is not None:
                    raise BadBundle(refusal)
                self._scorer = load_scorer(bundle, self._encoder)
            except CoterieError as error:
                SWITCHES.labels("refused").inc()
                log.error("the bundle in %s was refused: %s", self.folder, error)
                raise BundleRefused(
                    "The bundle was refused, and the one before serves on. The server's log says why."
                ) from error
        self.ready = True
        SWITCHES.labels("done").inc()
        log.info("bundle %s serves", bundle.manifest.model_version[:12])
        return bundle.manifest

    async def healthy(self) -> bool:
        """Ready once the golden scores came out right."""
        return bool(self.ready) and self._scorer is not None

    async def predict(
        self, payload: RoutedRequest, headers: dict[str, str] | None = None, response_headers: Any = None
    ) -> list[Prediction]:
        """Score a routed request. Raises Overloaded, TooLate, or Unavailable."""
        asked = [Asked(instance, payload.explain, payload.next_pair) for instance in payload.instances]
        return await self._batches.ask(self.scorer, asked, self._settings.request_seconds)


if __name__ == "__main__":
    from serving.server import predictor_command

    predictor_command()
