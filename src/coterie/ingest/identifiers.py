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

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa

from coterie.contracts import content_id

SIZE = 16  # bytes of an id
Digests = np.ndarray[Any, np.dtype[np.uint8]]  # [rows, 16]


def pair_id(chosen_id: str, rejected_id: str) -> str:
    """The id of the unordered pair of two responses."""
    return f"{int(chosen_id, 16) ^ int(rejected_id, 16):032x}"


def comparison_id(worker_id: str, chosen_id: str, rejected_id: str, label: float) -> str:
    """The id of one vote; `worker_id` is the pseudonym."""
    chosen, rejected = (np.frombuffer(bytes.fromhex(text), np.uint8)[None] for text in (chosen_id, rejected_id))
    return combine_votes([worker_id], [label], chosen, rejected).tobytes().hex()


def combine_votes(workers: Sequence[str], labels: Sequence[float], chosen: Digests, rejected: Digests) -> Digests:
    """Digests of `comparison_id`, one a row."""
    whose: dict[tuple[str, float], int] = {}
    rows = [whose.setdefault(pair, len(whose)) for pair in zip(workers, labels, strict=True)]
    known = b"".join([bytes.fromhex(content_id(worker, f"{label:.1f}")) for worker, label in whose])
    votes = _halves(np.frombuffer(known, np.uint8).reshape(-1, SIZE))[rows]
    combined: Digests = (votes + np.uint64(3) * _halves(chosen) + np.uint64(5) * _halves(rejected)).view(np.uint8)
    return combined


def hash_texts(texts: Iterable[tuple[str, str, str]]) -> tuple[Digests, Digests, Digests]:
    """Digests of content_id(prompt), content_id(prompt, chosen), content_id(prompt, rejected) of each.

    A prompt is hashed once for its three ids, and once for all its triples where these follow each other.
    """
    digests: list[bytes] = []
    add = digests.append
    last, prompt_digest, prompt_state = None, b"", blake2b(digest_size=SIZE)
    for prompt, chosen, rejected in texts:
        if prompt != last:
            raw = prompt.encode()
            prompt_state = blake2b(len(raw).to_bytes(8, "little") + raw, digest_size=SIZE)
            last, prompt_digest = prompt, prompt_state.digest()
        add(prompt_digest)
        for response in (chosen, rejected):
            raw, state = response.encode(), prompt_state.copy()
            state.update(len(raw).to_bytes(8, "little") + raw)
            add(state.digest())
    parts = np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 3, SIZE)
    return parts[:, 0], parts[:, 1], parts[:, 2]


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


def from_hex(column: pa.ChunkedArray) -> Digests:
    """The digests of a column of 32-digit hex ids."""
    texts = column.combine_chunks()
    texts = pa.concat_arrays(texts.chunks) if isinstance(texts, pa.ChunkedArray) else texts
    first, last = np.frombuffer(texts.buffers()[1], dtype=np.int32)[[texts.offset, texts.offset + len(texts)]]
    return np.frombuffer(bytes.fromhex(texts.buffers()[2][first:last].to_pybytes().decode()), np.uint8).reshape(
        -1, SIZE
    )
