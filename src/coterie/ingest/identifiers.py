"""Ids of prompts, responses, pairs and comparisons, each 128 bits in hex, made from the content alone.

    prompt_id      content_id(prompt), where the source brings none
    chosen_id      content_id(prompt, chosen); rejected_id alike
    pair_id        chosen_id XOR rejected_id: the same for both orders
    comparison_id  content_id(worker_id, label) + 3 chosen_id + 5 rejected_id, each of an id's two halves as a
                   little-endian integer modulo 2^64; the label is written "1.0" or "0.5"

So an id does not depend on the file, the row order or the machine, and a vote that is sent twice has one id.
The last two combine what BLAKE2b has made uniform already, so they are as unlikely to collide as a hash of
their parts, at no cost in a batch; the factors are odd, so that no part loses a bit, and differ, so that order
counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa

from coterie.contracts import content_id

SIZE = 16  # bytes of an id
Digests = np.ndarray[Any, np.dtype[np.uint8]]  # [rows, 16]
Numbers = np.ndarray[Any, np.dtype[np.int32]]  # [rows]


def pair_id(chosen_id: str, rejected_id: str) -> str:
    """The id of the unordered pair of two responses."""
    return f"{int(chosen_id, 16) ^ int(rejected_id, 16):032x}"


def comparison_id(worker_id: str, chosen_id: str, rejected_id: str, label: float) -> str:
    """The id of one vote; `worker_id` is the pseudonym."""
    chosen, rejected = (np.frombuffer(bytes.fromhex(text), np.uint8)[None] for text in (chosen_id, rejected_id))
    voters = Voters()
    return voters.combine(voters.numbers([worker_id]), np.array([label]), chosen, rejected).tobytes().hex()


class Voters(dict[str, int]):
    """Numbers workers in the order in which they come, and makes the ids of their votes."""

    def __init__(self) -> None:
        self._digests = bytearray()  # of content_id(worker_id, label), label 1 and label .5

    def __missing__(self, worker: str) -> int:
        number = self[worker] = len(self)
        self._digests += bytes.fromhex(content_id(worker, "1.0") + content_id(worker, "0.5"))
        return number

    def numbers(self, workers: Sequence[str]) -> Numbers:
        """The number of each worker."""
        return np.fromiter(map(self.__getitem__, workers), np.int32, len(workers))

    def combine(self, workers: Numbers, labels: np.ndarray[Any, Any], chosen: Digests, rejected: Digests) -> Digests:
        """Digests of `comparison_id`, one a row; `workers` are numbers, `labels` 1 or .5."""
        known = np.frombuffer(self._digests, "<u8").reshape(-1, 2, 2)
        votes = known[workers, np.where(labels == 1, 0, 1)]
        combined: Digests = (votes + np.uint64(3) * _halves(chosen) + np.uint64(5) * _halves(rejected)).view(np.uint8)
        return combined


def hash_texts(
    prompts: Sequence[str], chosen: Sequence[str], rejected: Sequence[str]
) -> tuple[Digests, Digests, Digests]:
    """Digests of content_id(prompt), content_id(prompt, chosen), content_id(prompt, rejected) of each row.

    A prompt is hashed once for its three ids, and once for all its rows where these follow each other.
    """
    digests: list[bytes] = []
    last, prompt_digest, state = None, b"", blake2b(digest_size=SIZE)
    for prompt, yes, no in zip(prompts, chosen, rejected, strict=True):
        if prompt != last:
            state = blake2b(_framed(prompt), digest_size=SIZE)
            last, prompt_digest = prompt, state.digest()
        first, second = state.copy(), state.copy()
        first.update(_framed(yes))
        second.update(_framed(no))
        digests += prompt_digest, first.digest(), second.digest()
    parts = np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 3, SIZE)
    return parts[:, 0], parts[:, 1], parts[:, 2]


def _framed(text: str) -> bytes:
    raw = text.encode()
    return len(raw).to_bytes(8, "little") + raw


def _halves(digests: Digests) -> np.ndarray[Any, np.dtype[np.uint64]]:
    return np.ascontiguousarray(digests).view("<u8")


def hex_column(digests: Digests) -> pa.StringArray:
    """The digests as an Arrow column of hex strings, without a Python object for each."""
    offsets = np.arange(len(digests) + 1, dtype=np.int32) * (2 * SIZE)
    text = digests.tobytes().hex().encode()
    return pa.StringArray.from_buffers(len(digests), pa.py_buffer(offsets), pa.py_buffer(text))


def first_64_bits(digests: Digests) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """The first half of each digest: any two of n rows collide with odds n^2 / 2^65, 3e-6 for 10^7 rows."""
    return _halves(digests)[:, 0]
