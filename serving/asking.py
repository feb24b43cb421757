"""A predictor in a process of its own, asked over REST through connections that stay.

aiohttp, where KServe's own client is httpx: that one took two thirds of a router's processor time (benchmarks.serving).
"""

from __future__ import annotations

from collections.abc import Mapping

import aiohttp

_CONNECT_SECONDS = 5.0


class Refusal(Exception):
    """The predictor answered with another status than 200: `status`, and its Retry-After or None."""

    def __init__(self, status: int, retry_after: str | None) -> None:
        super().__init__(f"the predictor answered {status}")
        self.status, self.retry_after = status, retry_after


class RemotePredictor:
    """Asks one URL.

    Args:
        url: of the model's predict or infer endpoint.
        seconds: that an answer may take.
    """

    def __init__(self, url: str, seconds: float) -> None:
        self.url = url
        self._timeout = aiohttp.ClientTimeout(total=seconds, sock_connect=_CONNECT_SECONDS)
        self._session: aiohttp.ClientSession | None = None  # belongs to the event loop that asks first

    async def ask(self, body: bytes, headers: Mapping[str, str]) -> bytes:
        """The body of the answer to a JSON body.

        Raises:
            Refusal: another status than 200. TimeoutError: no answer in time. aiohttp.ClientError: there is none.
        """
        if self._session is None:
            # How much is under way is the predictor's to limit, in texts.
            connector = aiohttp.TCPConnector(limit=0)
            self._session = aiohttp.ClientSession(connector=connector, timeout=self._timeout)
        told = {"content-type": "application/json", **headers}
        try:
            return await self._once(body, told)
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
            if isinstance(error, aiohttp.ClientConnectorError):  # nobody listens
                raise
            # A kept connection that was cut while we wrote, as when a pod ends: to score twice does no harm.
            return await self._once(body, told)

    async def _once(self, body: bytes, headers: Mapping[str, str]) -> bytes:
        assert self._session is not None
        async with self._session.post(self.url, data=body, headers=headers) as answer:
            if answer.status != 200:
                raise Refusal(answer.status, answer.headers.get("retry-after"))
            return await answer.read()

    async def close(self) -> None:
        """End the connections."""
        if self._session is not None:
            await self._session.close()
