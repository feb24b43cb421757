"""All peers, ours first, the references next."""

from __future__ import annotations

from benchmarks.peers import Peer
from benchmarks.peers.lore import LoRe
from benchmarks.peers.meta import Meta
from benchmarks.peers.neighbours import Neighbours
from benchmarks.peers.ours import Ours
from benchmarks.peers.own import Own
from benchmarks.peers.pal import Pal
from benchmarks.peers.pooled import Pooled, Reliability
from benchmarks.peers.vpl import Vpl

OURS, REFERENCE, POOLED = Ours.name, Reliability.name, Pooled.name
PEERS: dict[str, Peer] = {
    peer.name: peer for peer in (Ours(), Reliability(), Pooled(), Own(), LoRe(), Pal(), Vpl(), Meta(), Neighbours())
}
