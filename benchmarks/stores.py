"""What a profile takes of Redis, and a comparison of PostgreSQL, both started here.

python -m benchmarks.stores [--profiles 20000] [--comparisons 6000]

Profiles of eight coteries, published as the step publish does; comparisons of 240 words, committed as the router does. Redis
tells its memory and its append-only file, PostgreSQL the size of its database, indexes and what is empty included.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import redis
import sqlalchemy as sa

from coterie import contracts
from coterie.config import PublishSettings
from coterie.feedback.database import Database
from coterie.feedback.intake import MOST, read_comparisons
from coterie.feedback.journal import Journal
from feature_repo.publish import publish
from feature_repo.store import REDIS
from tests.databases import Postgres, Redis

RESULTS = Path(__file__).parent / "results" / "stores.json"
_COTERIES, _RANK = 8, 4
_PROMPT, _RESPONSE = 40, 100  # words
_SEED = 0


def of_redis(folder: Path, profiles: int) -> dict[str, float]:
    """Bytes of memory, and of the append-only file, a profile takes."""
    rng = np.random.default_rng(_SEED)
    posterior = rng.dirichlet(np.ones(_COTERIES), profiles)
    columns = {
        "worker_id": [f"w_{contracts.content_id(str(number))}" for number in range(profiles)],
        "embedding": rng.normal(size=(profiles, _RANK)),
        "reliability": rng.uniform(size=profiles),
        "comparisons": rng.integers(1, 500, profiles),
        "coterie": posterior.argmax(axis=1),
        "posterior": posterior,
        "mixture_version": [contracts.content_id("mixture")] * profiles,
    }
    file = folder / "cluster" / "assignments.parquet"
    contracts.ASSIGNMENT.write(file, columns, embedding=_RANK, posterior=_COTERIES)
    (folder / "redis").mkdir()
    server = Redis(folder / "redis")
    server.start()
    try:
        os.environ[REDIS] = server.address
        told = redis.Redis(port=server.port)
        before = _sizes(told)
        publish(file.parent, folder / "publish", PublishSettings(online_store="redis"))
        return {name: (size - before[name]) / profiles for name, size in _sizes(told).items()}
    finally:
        server.stop()


def _sizes(told: redis.Redis) -> dict[str, int]:
    info: dict[str, Any] = told.info()
    return {"memory": info["used_memory"], "file": info["aof_current_size"]}


def of_postgresql(folder: Path, comparisons: int) -> float:
    """Bytes of the database that a comparison takes."""
    rng = np.random.default_rng(_SEED)
    words = np.array([contracts.content_id(str(number))[: 2 + number % 9] for number in range(5000)])

    def text(length: int) -> str:
        return " ".join(rng.choice(words, length))

    records = [
        {
            "worker_id": f"w-{number % 500}",
            "prompt": text(_PROMPT),
            "chosen": text(_RESPONSE),
            "rejected": text(_RESPONSE),
        }
        for number in range(comparisons)
    ]
    folder.mkdir()
    server = Postgres(folder)
    server.start()
    try:
        url = server.database()
        database = Database(url)
        journal = Journal(database, daily_cap=10**6)
        for first in range(0, comparisons, MOST):
            journal.submit(read_comparisons(records[first : first + MOST], b"a key of the benchmark")).result()
        journal.close()
        with database.reading() as connection:
            size = connection.execute(sa.text("SELECT pg_database_size(current_database())")).scalar_one()
        database.close()
        return float(size) / comparisons
    finally:
        server.stop()


@click.command()
@click.option("--profiles", default=20_000, show_default=True)
@click.option("--comparisons", default=6_000, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS)
def main(profiles: int, comparisons: int, out: Path) -> None:
    """Measure both, write the results, and say them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)  # PostgreSQL runs as another user
        results = {
            "seed": _SEED,
            "profiles": profiles,
            "coteries": _COTERIES,
            "rank": _RANK,
            "redis_bytes_a_profile": of_redis(folder, profiles),
            "comparisons": comparisons,
            "words": _PROMPT + 2 * _RESPONSE,
            "postgresql_bytes_a_comparison": of_postgresql(folder / "postgresql", comparisons),
        }
    contracts.write_text(out, json.dumps(results, indent=1) + "\n")
    click.echo(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
