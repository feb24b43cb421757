"""A router that asks a predictor elsewhere: what it makes of each answer, and of none."""

import asyncio

import aiohttp
import pytest

from serving.asking import Refusal, RemotePredictor

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"
BUSY = b"HTTP/1.1 429 Too Many Requests\r\nretry-after: 7\r\ncontent-length: 0\r\n\r\n"


def asked(answers, times=1, seconds=5.0):
    """Ask `times` times a server that gives these answers to its requests in turn, None closing the connection.

    Returns:
        What came of each, and the requests that the server read, by the number of their connection.
    """

    async def run():
        requests, connections, left = [], 0, list(answers)

        async def serve(reader, writer):
            nonlocal connections
            connections += 1
            number = connections
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                requests.append((number, head, await reader.readexactly(length)))
                if not left or (answer := left.pop(0)) is None:
                    break
                writer.write(answer)
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        remote = RemotePredictor(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/predict", seconds)
        found = [
            await asyncio.gather(remote.ask(b"[1]", {"x-request-id": "r"}), return_exceptions=True)
            for _ in range(times)
        ]
        await remote.close()
        server.close()
        return [one for [one] in found], requests

    return asyncio.run(run())


def test_questions_share_a_connection_and_say_what_they_are():
    found, requests = asked([ANSWER] * 3, times=3)
    assert found == [b"{}"] * 3
    assert [(number, body) for number, _, body in requests] == [(1, b"[1]")] * 3
    assert b"x-request-id: r" in requests[0][1]
    assert b"application/json" in requests[0][1]


def test_a_kept_connection_that_is_cut_costs_no_question():
    found, requests = asked([ANSWER, None, ANSWER], times=2)
    assert found == [b"{}", b"{}"]
    assert [number for number, *_ in requests] == [1, 1, 2]


def test_who_hangs_up_twice_is_not_asked_a_third_time():
    [found], requests = asked([None, None, ANSWER])
    assert isinstance(found, aiohttp.ClientError)
    assert len(requests) == 2


def test_a_refusal_keeps_its_status_and_when_to_come_again():
    [found], requests = asked([BUSY])
    assert isinstance(found, Refusal)
    assert (found.status, found.retry_after, len(requests)) == (429, "7", 1)


def test_no_answer_in_time_and_nobody_there():
    [found], requests = asked([b""], seconds=0.3)  # reads, and says nothing
    assert isinstance(found, TimeoutError)
    assert len(requests) == 1
    remote = RemotePredictor("http://127.0.0.1:9/predict", 5)

    async def nobody():
        try:
            await remote.ask(b"", {})
        finally:
            await remote.close()

    with pytest.raises(aiohttp.ClientConnectorError):
        asyncio.run(nobody())
