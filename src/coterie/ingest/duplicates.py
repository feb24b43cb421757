"""Which votes were there before: a set of 64-bit hashes, asked and filled a batch at a time.

A hash table with linear probing in one array, at most half full: 16 to 32 bytes a vote, where a set of Python's needs 80.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from coterie.ingest.splits import Hashes

Flags = np.ndarray[Any, np.dtype[np.bool_]]
_CHUNK = 1 << 18  # hashes moved at a time when the table grows


class Seen:
    """The hashes met so far; they are taken to be uniform, as those of identifiers.py are."""

    def __init__(self, slots: int = 1 << 16) -> None:
        self._table = np.zeros(slots, dtype=np.uint64)  # a power of two; 0: free
        self._size = 0

    def add(self, hashes: Hashes) -> Flags:
        """Add the hashes; return which of them are new, the first of several alike."""
        hashes = np.maximum(hashes, np.uint64(1))
        while 2 * (self._size + len(hashes)) > len(self._table):
            self._grow()
        new = _first_of_each(hashes)
        new[new] = self._insert(hashes[new])
        self._size += int(new.sum())
        return new

    def _insert(self, hashes: Hashes) -> Flags:
        """Insert hashes that differ from each other; return which were not there."""
        table, mask = self._table, np.uint64(len(self._table) - 1)
        new, rows, slots = np.ones(len(hashes), dtype=bool), np.arange(len(hashes)), hashes & mask
        while len(rows):
            wanted, there = hashes[rows], table[slots]
            new[rows[there == wanted]] = False
            free = there == 0
            table[slots[free]] = wanted[free]  # of several that want one slot, one gets it
            rest = table[slots] != wanted
            rows, slots = rows[rest], (slots[rest] + np.uint64(1)) & mask
        return new

    def _grow(self) -> None:
        old = self._table
        self._table = np.zeros(2 * len(old), dtype=np.uint64)
        for start in range(0, len(old), _CHUNK):
            part = old[start : start + _CHUNK]
            self._insert(part[part != 0])


def _first_of_each(hashes: Hashes) -> Flags:
    ordered = np.sort(hashes)
    if (ordered[1:] != ordered[:-1]).all():  # a much faster question than which of them come first
        return np.ones(len(hashes), dtype=bool)
    first = np.zeros(len(hashes), dtype=bool)
    first[np.unique(hashes, return_index=True)[1]] = True
    return first
