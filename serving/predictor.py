"""The predictor: a KServe model that scores responses by the rewards of one bundle."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from coterie.bundle import Bundle
from coterie.contracts import RoutedRequest
from coterie.encoding import Encoder
from coterie.scoring import Scorer, load_scorer
from serving.protocol import Model, parse


class Predictor(Model):
    """V1 predict: {"instances": [contracts.RoutedInstance]} to {"predictions": [contracts.Prediction]}.

    Scoring runs in one thread of its own, so that the event loop answers probes meanwhile.

    Args:
        name: of the model in the URL.
        folder: the bundle.
        encoder: the bundle's encoder; by default loaded by the name and revision that the bundle gives.

    Raises:
        BadBundle: the bundle is incomplete or damaged.
    """

    def __init__(self, name: str, folder: Path, encoder: Encoder | None = None) -> None:
        super().__init__(name)
        self.bundle = Bundle.load(folder)
        self._encoder = encoder
        self._scorer: Scorer | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="scorer")

    def load(self) -> bool:
        """Load the encoder and score the bundle's golden texts, which warms it up; then the predictor is ready.

        Raises:
            BadBundle: the golden scores come out otherwise than when the bundle was made, or the encoder is another.
            BadConfiguration: the encoder cannot be loaded.
        """
        if self._scorer is None:
            self._scorer = load_scorer(self.bundle, self._encoder)
        self.ready = True
        return True

    async def predict(
        self, payload: Any, headers: dict[str, str] | None = None, response_headers: Any = None
    ) -> dict[str, Any]:
        """Score a routed request. Raises InvalidInput."""
        if self._scorer is None:
            raise RuntimeError("load was not called")
        request = parse(RoutedRequest, payload)
        loop = asyncio.get_running_loop()
        predictions = await loop.run_in_executor(self._thread, self._scorer.predict, request.instances)
        return {"predictions": [prediction.model_dump() for prediction in predictions]}
