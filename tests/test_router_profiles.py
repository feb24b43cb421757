"""Profiles before Feast: the cache, the deadline, the breaker, and the mixtures that are online."""

import asyncio
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest

from coterie.config import ServeSettings
from coterie.contracts import Route
from coterie.routing import Profile, choose
from serving.profiles import Profiles

NOW = datetime(2026, 5, 1, tzinfo=UTC)
ANN = Profile("ann", (0.0, 1.0), 1.0, 40, 1, (0.1, 0.6, 0.3), "m1", NOW)


class Store:
    """A profile store that counts its lookups, and hangs or fails when it is told to."""

    def __init__(self):
        self.asked, self.failing, self.running = [], False, threading.Event()
        self.running.set()

    def __call__(self, workers):
        self.asked.append(list(workers))
        self.running.wait(10)
        if self.failing:
            raise ConnectionError("down")
        return [(replace(ANN, worker_id=worker),) if worker != "stranger" else () for worker in workers]


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def store():
    store = Store()
    yield store
    store.running.set()


def profiles(store, clock=time.monotonic, **settings):
    return Profiles(store, ServeSettings(**{"profile_deadline_ms": 2000} | settings), clock)


def names(found):
    return [None if of is None else [profile.worker_id for profile in of] for of in found]


def test_what_is_fresh_is_not_looked_up_again_strangers_included(store):
    clock = Clock()

    async def ask():
        source = profiles(store, clock, cache_seconds=10)
        for _ in range(3):
            assert names(await source.get(["ann", "stranger", "bob"])) == [["ann"], [], ["bob"]]
        assert store.asked == [["ann", "stranger", "bob"]]
        clock.now += 10
        await source.get(["ann"])
        assert store.asked[1:] == [["ann"]]
        source.forget("bob")
        clock.now += 1
        await source.get(["ann", "bob"])
        assert store.asked[2:] == [["bob"]]

    asyncio.run(ask())


def test_the_cache_is_bounded_and_drops_who_was_not_asked_for_longest(store):
    async def ask():
        source = profiles(store, cache_workers=2)
        for worker in ("a", "b", "a", "c", "a", "b"):
            await source.get([worker])
        assert store.asked == [["a"], ["b"], ["c"], ["b"]]

    asyncio.run(ask())


def test_lookups_that_wait_for_each_other_are_made_together(store):
    async def ask():
        source = profiles(store)
        store.running.clear()
        everybody = [asyncio.create_task(source.get([f"w{i % 50}"])) for i in range(200)]
        await asyncio.sleep(0.05)
        store.running.set()
        found = await asyncio.gather(*everybody)
        assert [names(one) for one in found] == [[[f"w{i % 50}"]] for i in range(200)]
        assert len(store.asked) <= 8
        assert sorted(w for asked in store.asked for w in asked) == sorted(f"w{i}" for i in range(50))

    asyncio.run(ask())


def test_past_the_deadline_an_old_profile_serves_and_a_stranger_waits_no_longer(store):
    clock = Clock()

    async def ask():
        source = profiles(store, clock, profile_deadline_ms=30, cache_seconds=5)
        await source.get(["ann", "stranger"])
        clock.now += 6
        store.running.clear()
        started = time.monotonic()
        assert names(await source.get(["ann", "stranger", "bob"])) == [["ann"], None, None]
        assert time.monotonic() - started < 1
        store.running.set()
        await asyncio.sleep(0.1)
        assert names(await source.get(["bob"])) == [["bob"]]

    asyncio.run(ask())


def test_a_store_that_fails_is_left_alone_for_a_while_and_then_tried_by_one_lookup(store):
    clock = Clock()

    async def ask():
        source = profiles(store, clock, profile_failures=3, profile_pause_seconds=2, cache_seconds=0)
        store.failing = True
        for _ in range(10):
            assert await source.get(["ann"]) == [None]
        assert len(store.asked) == 3
        clock.now += 2.1
        assert await source.get(["ann", "bob"]) == [None, None]
        assert await source.get(["ann"]) == [None]
        assert store.asked[3:] == [["ann"]]
        store.failing = False
        clock.now += 2.1
        assert names(await source.get(["ann"])) == [["ann"]]
        assert names(await source.get(["bob"])) == [["bob"]]

    asyncio.run(ask())


def test_the_predictor_takes_the_route_of_its_own_mixture():
    def known(version, **changes):
        route = Route(source="profile", coterie=1, posterior=[0.4, 0.6], embedding=[0.0], mixture_version=version)
        return route.model_copy(update=changes)

    old, new = known("m1"), known("m2")
    assert choose([old, new], "m2", 2) == new
    assert choose([old, new], "m1", 2) == old
    assert choose([old], "m2", 2).reason == "other-mixture"
    assert choose([old, known("m2", posterior=[0.5, 0.9])], "m2", 2).reason == "damaged-profile"
    stale = Route(source="global", reason="stale-profile")
    assert choose([old, stale], "m2", 2).reason == "stale-profile"
    assert choose([stale, new], "m2", 2) == new


def test_a_router_has_each_new_bundle_followed_until_that_could_be_done(monkeypatch):
    monkeypatch.setattr("sys.argv", ["test"])  # kserve reads the command line when it is imported
    from serving import router

    monkeypatch.setattr(router, "_MANIFEST_SECONDS", 0)
    monkeypatch.setattr(router, "_UNSETTLED_SECONDS", 0)
    serves, followed = iter(["v1", "v1", "v1", "v1", "v2", "v1"]), []

    async def meet(url):
        version = next(serves, None)
        if version is None:
            raise EOFError
        return SimpleNamespace(model_version=version)

    async def follow(manifest):
        followed.append(manifest.model_version)
        return len(followed) > 2

    watching = router.Router("coterie", None, None)
    monkeypatch.setattr(watching, "meet", meet)
    with pytest.raises(EOFError):
        asyncio.run(watching.watch("http://predictor", follow))
    assert followed == ["v1", "v1", "v1", "v2", "v1"]
