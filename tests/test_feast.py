"""Publication into Feast and lookups, on SQLite and on a real Redis."""

import asyncio
import os
import shutil
import signal
import time
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from coterie import contracts
from coterie.config import PublishSettings, ServeSettings
from coterie.errors import BackendUnavailable, BadConfiguration, BadData
from tests.databases import Redis

WORKERS = [f"w{i}" for i in range(40)] + ["émile 🙂", "a b\n"]
RANK, COTERIES = 2, 3


def write_assignments(folder, version="m1", seed=0, workers=WORKERS, **changes):
    rng = np.random.default_rng(seed)
    posterior = rng.dirichlet([0.3] * COTERIES, len(workers)).astype(np.float32)
    columns = {
        "worker_id": workers,
        "embedding": rng.normal(size=(len(workers), RANK)),
        "reliability": rng.lognormal(size=len(workers)),
        "comparisons": rng.integers(1, 100, len(workers)),
        "coterie": posterior.argmax(1),
        "posterior": posterior,
        "mixture_version": [version] * len(workers),
    } | changes
    contracts.ASSIGNMENT.write(folder / "assignments.parquet", columns, embedding=RANK, posterior=COTERIES)
    return columns


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A published folder, moved after publication as a stage moves its result; the columns, and the answer."""
    from feature_repo.publish import publish

    root = tmp_path_factory.mktemp("feast")
    columns = write_assignments(root / "cluster")
    answer = publish(root / "cluster", root / ".publish.part", PublishSettings())
    (root / ".publish.part").rename(root / "publish")
    return root / "publish", columns, answer


def assert_profiles(profiles, columns):
    for i, profile in enumerate(profiles):
        assert profile.worker_id == columns["worker_id"][i]
        np.testing.assert_array_equal(np.float32(profile.posterior), columns["posterior"][i])
        np.testing.assert_array_equal(np.float32(profile.embedding), np.float32(columns["embedding"][i]))
        assert profile.coterie == columns["coterie"][i]
        assert profile.comparisons == columns["comparisons"][i]
        assert profile.reliability == pytest.approx(columns["reliability"][i], rel=1e-6)
        assert profile.mixture_version == columns["mixture_version"][i]


def test_every_published_profile_comes_back_from_the_moved_folder(published):
    from feature_repo.store import lookup, open_store

    folder, columns, answer = published
    assert answer == {"profiles": 42, "coteries": 3, "mixture_version": "m1", "online_store": "sqlite"}
    profiles = lookup(open_store(folder), WORKERS)
    assert_profiles(profiles, columns)
    assert abs(datetime.now(UTC) - profiles[0].event_timestamp) < timedelta(minutes=5)


def test_a_stranger_has_no_profile_beside_somebody_who_has(published):
    from feature_repo.store import lookup, open_store

    store = open_store(published[0])
    stranger, known, other = lookup(store, ["stranger", "w3", ""])
    assert stranger is None
    assert other is None
    assert known.worker_id == "w3"
    assert lookup(store, []) == []


def test_the_offline_store_is_a_profile_table_and_names_no_folder(published):
    folder, columns, _ = published
    table = contracts.PROFILE.read(folder / "profiles.parquet")
    assert table["worker_id"].to_pylist() == WORKERS
    np.testing.assert_array_equal(contracts.matrix(table["posterior"]), columns["posterior"])
    assert not any(str(folder.parent).encode() in file.read_bytes() for file in folder.iterdir())


def test_feast_joins_the_offline_store_at_a_point_in_time(published):
    import pandas as pd

    from feature_repo.store import open_store

    now = pd.Timestamp.now(tz="UTC")
    question = pd.DataFrame({"worker_id": ["w1", "stranger"], "event_timestamp": [now, now]})
    features = ["worker_profile:coterie", "worker_profile:mixture_version"]
    job = open_store(published[0]).get_historical_features(question, features)
    answer = job.to_df().set_index("worker_id")
    assert answer.loc["w1", "coterie"] == published[1]["coterie"][1]
    assert pd.isna(answer.loc["stranger", "mixture_version"])


def test_the_definitions_have_every_field_of_the_contract():
    from feast.types import Array, Float32, Int32, String

    from feature_repo.definitions import worker_profile

    types = {field.name: field.dtype for field in worker_profile.schema}
    assert types.keys() | {"event_timestamp"} == {field.name for field in contracts.PROFILE.fields}
    assert types["posterior"] == types["embedding"] == Array(Float32)
    assert (types["coterie"], types["worker_id"]) == (Int32, String)


def opened(folder, **settings):
    """The profiles that were published into `folder`, as the router looks them up."""
    from serving.profiles import FeastProfiles, Profiles

    store = FeastProfiles(folder)
    store.open()
    return Profiles(store.lookup, ServeSettings(**{"profile_deadline_ms": 10_000, "cache_seconds": 0} | settings))


def test_a_broken_store_is_an_outage_and_a_stranger_is_none(published, tmp_path):
    known, stranger = asyncio.run(opened(published[0]).get(["w1", "x"]))
    assert (known[0].worker_id, stranger) == ("w1", ())
    broken = tmp_path / "broken"
    shutil.copytree(published[0], broken)
    (broken / "online.db").write_bytes(b"no database at all" * 100)
    assert asyncio.run(opened(broken).get(["w1"])) == [None]


def test_a_folder_of_published_folders_has_a_profile_of_each_mixture(published, tmp_path):
    from feature_repo.publish import publish

    shutil.copytree(published[0], tmp_path / "online" / "m1")
    profiles = opened(tmp_path / "online")
    assert [p.mixture_version for p in asyncio.run(profiles.get(["w1"]))[0]] == ["m1"]
    write_assignments(tmp_path / "cluster", version="m2")
    publish(tmp_path / "cluster", tmp_path / "online" / "m2", PublishSettings())
    assert [p.mixture_version for p in asyncio.run(opened(tmp_path / "online").get(["w1"]))[0]] == ["m1", "m2"]


@pytest.mark.parametrize("name", ["feature_store.yaml", "registry.db", "online.db"])
def test_an_unfinished_folder_is_refused(published, tmp_path, name):
    from feature_repo.store import open_store

    shutil.copytree(published[0], tmp_path / "copy")
    (tmp_path / "copy" / name).unlink()
    with pytest.raises(BadData, match=name):
        open_store(tmp_path / "copy")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"worker_id": ["w0"] * len(WORKERS)}, "more than once"),
        ({"mixture_version": ["m1", "m2"] * (len(WORKERS) // 2)}, "2 mixture versions"),
    ],
)
def test_contradictory_assignments_are_refused(tmp_path, changes, words):
    from feature_repo.publish import publish

    write_assignments(tmp_path, **changes)
    with pytest.raises(BadData, match=words):
        publish(tmp_path, tmp_path / "out", PublishSettings())


def test_no_assignments_are_refused(tmp_path):
    from feature_repo.publish import publish

    with pytest.raises(BadData, match=r"assignments\.parquet: no such file"):
        publish(tmp_path, tmp_path / "out", PublishSettings())
    write_assignments(tmp_path, workers=[])
    with pytest.raises(BadData, match="no worker"):
        publish(tmp_path, tmp_path / "out", PublishSettings())


# ------------------------------------------------------------------------------------------------------- redis
@pytest.fixture
def redis(monkeypatch, tmp_path):
    """A Redis of the machine's own; yields its process after naming it in COTERIE_REDIS."""
    folder = tmp_path / "redis"
    folder.mkdir()
    server = Redis(folder)
    monkeypatch.setenv("COTERIE_REDIS", server.address)
    server.start()
    yield server.process
    server.stop()


def test_redis_takes_a_second_publication_even_from_a_clock_that_runs_behind(redis, tmp_path):
    from feature_repo.publish import publish
    from feature_repo.store import connect, lookup, open_store

    settings = PublishSettings(online_store="redis")
    write_assignments(tmp_path / "one")
    assert publish(tmp_path / "one", tmp_path / "first", settings)["online_store"] == "redis"
    # Somebody whose clock is an hour ahead of ours has published w0 before us.
    ahead = contracts.PROFILE.read(tmp_path / "first" / "profiles.parquet").to_pandas().head(1)
    ahead["event_timestamp"] += timedelta(hours=1)
    connect(tmp_path / "first").write_to_online_store("worker_profile", df=ahead)

    columns = write_assignments(tmp_path / "two", seed=1)
    publish(tmp_path / "two", tmp_path / "second", settings)
    profiles = lookup(open_store(tmp_path / "second"), WORKERS)
    assert_profiles(profiles, columns)
    table = contracts.PROFILE.read(tmp_path / "second" / "profiles.parquet")
    just_after = ahead["event_timestamp"][0].to_pydatetime() + timedelta(microseconds=1)
    assert table["event_timestamp"][0].as_py() == just_after


def test_two_mixtures_are_online_in_redis_at_once_and_each_is_removed_from_its_own_folder(redis, tmp_path):
    from feature_repo.publish import publish
    from feature_repo.store import lookup, open_store, remove

    settings = PublishSettings(online_store="redis")
    columns = {}
    for seed, version in enumerate(["0123456789abcdef", "fedcba9876543210"]):
        columns[version] = write_assignments(tmp_path / version, version=version, seed=seed)
        publish(tmp_path / version, tmp_path / "online" / version, settings)
    stores = {version: open_store(tmp_path / "online" / version) for version in columns}
    assert [store.project for store in stores.values()] == ["coterie_01234567", "coterie_fedcba98"]
    for version, store in stores.items():
        assert_profiles(lookup(store, WORKERS), columns[version])
    both = asyncio.run(opened(tmp_path / "online").get(["w1"]))[0]
    assert [profile.mixture_version for profile in both] == list(columns)
    first, second = stores.values()
    assert remove(first, "w1")
    assert lookup(first, ["w1"]) == [None]
    assert lookup(second, ["w1"]) != [None]


def test_a_redis_that_hangs_or_dies_is_an_outage_and_is_found_again(redis, tmp_path):
    from feature_repo.publish import publish

    settings = PublishSettings(online_store="redis")
    write_assignments(tmp_path / "one")
    publish(tmp_path / "one", tmp_path / "out", settings)

    async def hang_and_come_back():
        profiles = opened(tmp_path / "out", profile_deadline_ms=250, profile_pause_seconds=0.1)
        assert (await profiles.get(["w1"]))[0][0].worker_id == "w1"
        redis.send_signal(signal.SIGSTOP)
        started = time.monotonic()
        assert (await profiles.get(["w1", "w2"]))[0][0].worker_id == "w1"  # as it was found before
        assert await profiles.get(["w2"]) == [None]
        assert time.monotonic() - started < 1
        redis.send_signal(signal.SIGCONT)
        await asyncio.sleep(0.5)
        assert (await profiles.get(["w2"]))[0][0].worker_id == "w2"

    asyncio.run(hang_and_come_back())
    redis.kill()
    redis.wait()
    assert asyncio.run(opened(tmp_path / "out").get(["w1"])) == [None]
    with pytest.raises(BackendUnavailable, match="redis"):
        publish(tmp_path / "one", tmp_path / "again", settings)


def test_redis_without_an_address_is_refused(tmp_path, monkeypatch):
    from feature_repo.publish import publish

    monkeypatch.delenv("COTERIE_REDIS", raising=False)
    assert "COTERIE_REDIS" not in os.environ
    write_assignments(tmp_path)
    with pytest.raises(BadConfiguration, match="COTERIE_REDIS"):
        publish(tmp_path, tmp_path / "out", PublishSettings(online_store="redis"))
