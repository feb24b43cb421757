"""The feedback database: what the router commits is what ingest reads."""

import itertools
import sqlite3
import sys
from datetime import UTC, datetime, timedelta, timezone

import pytest
import sqlalchemy as sa

from coterie.config import IngestSettings
from coterie.contracts import COMPARISON, content_id
from coterie.errors import BackendUnavailable, BadConfiguration, BadData
from coterie.feedback.tables import FEEDBACK, create_schema
from coterie.ingest import ingest
from coterie.ingest.identifiers import comparison_id, pair_id
from coterie.ingest.pseudonyms import fingerprint, pseudonym
from coterie.ingest.state import source_state

KEY = b"0123456789abcdef0123456789abcdef"
CONNECT = sqlite3.connect
START = datetime(2024, 5, 1, 12, tzinfo=UTC)


def vote(worker="anna", prompt="p", chosen="good", rejected="bad", label=1.0, key=KEY, **more):
    """A row as the router commits it."""
    who = pseudonym(key, worker)
    first, second = content_id(prompt, chosen), content_id(prompt, rejected)
    return {
        "comparison_id": comparison_id(who, first, second, label),
        "worker_id": who,
        "prompt": prompt,
        "prompt_id": content_id(prompt),
        "chosen": chosen,
        "rejected": rejected,
        "chosen_id": first,
        "rejected_id": second,
        "pair_id": pair_id(first, second),
        "label": label,
        "ranking_id": None,
        "shown_first": "chosen",
        "confidence": 0.5,
        "source": "router",
        "created_at": START,
        "key_fingerprint": fingerprint(key),
    } | more


@pytest.fixture
def database(tmp_path):
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'feedback.db'}")
    create_schema(engine)
    create_schema(engine)  # once more does no harm
    yield engine
    engine.dispose()


def commit(database, *rows):
    with database.begin() as connection:
        connection.execute(FEEDBACK.insert(), list(rows))


def run(tmp_path, database, key=KEY, **options):
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    metrics = ingest(IngestSettings.of(source=str(database.url), **options), out, key)
    return metrics, COMPARISON.read(out / "comparisons.parquet").to_pylist()


def test_what_the_router_commits_is_what_ingest_reads(tmp_path, database):
    rows = [vote(prompt=f"prompt {n}", created_at=START + timedelta(seconds=n)) for n in range(2500)]
    rows[7] |= vote(prompt="prompt 7", label=0.5, ranking_id="r", shown_first=None, confidence=None)
    commit(database, *reversed(rows))
    metrics, out = run(tmp_path, database)
    assert (metrics["sources"][0]["format"], metrics["refused"], metrics["duplicates"]) == ("coterie", 0, 0)
    expected = sorted(rows, key=lambda row: (row["created_at"], row["comparison_id"]))
    ours = {"split", "source"}
    assert [{name: row[name] for name in row if name not in ours} for row in out] == [
        {name: row[name] for name in row if name not in (*ours, "key_fingerprint")} for row in expected
    ]


def test_the_columns_are_the_comparisons():
    there = {field.name: field.nullable for field in COMPARISON.fields if field.name != "split"}
    own = {"created_at": False, "key_fingerprint": False, "counts": False}
    own |= dict.fromkeys(("request_id", "arm", "propensity", "agreed"), True)
    assert {c.name: c.nullable for c in FEEDBACK.c} == there | own
    assert [c.name for c in FEEDBACK.primary_key] == ["comparison_id"]
    for dialect in ("postgresql", "sqlite"):
        statement = sa.schema.CreateTable(FEEDBACK).compile(dialect=sa.dialects.registry.load(dialect)())
        assert "comparison_id TEXT NOT NULL" in str(statement)


def test_a_vote_counts_once_and_has_a_time(database):
    first = vote()
    del first["created_at"]
    before = datetime.now(UTC)
    commit(database, first)
    with pytest.raises(sa.exc.IntegrityError):
        commit(database, vote())
    elsewhere = START.astimezone(timezone(timedelta(hours=5)))
    commit(database, vote("ben", created_at=elsewhere))
    with database.connect() as connection:
        times = dict(connection.execute(sa.select(FEEDBACK.c.worker_id, FEEDBACK.c.created_at)).all())
    assert before <= times[pseudonym(KEY, "anna")] <= datetime.now(UTC)
    assert times[pseudonym(KEY, "ben")] == START
    assert times[pseudonym(KEY, "ben")].tzinfo == UTC


def test_rows_are_checked_like_any_others(tmp_path, database):
    commit(database, vote(), vote("ben", rejected=" "), vote("cleo", confidence=7.0))
    metrics, out = run(tmp_path, database, max_refused=0.7)
    assert [row["worker_id"] for row in out] == [pseudonym(KEY, "anna")]
    assert set(metrics["refused_by_reason"]) == {
        "rejected is empty",
        "the confidence is not a number between 0 and 1",
    }


def test_the_keys_must_agree(tmp_path, database):
    commit(database, vote())
    other = KEY[::-1]
    with pytest.raises(BadData, match=f"pseudonyms of another key.*{fingerprint(KEY)}.*{fingerprint(other)}"):
        run(tmp_path, database, key=other)
    with pytest.raises(BadData, match="pseudonyms of another key"):
        run(tmp_path, database, pseudonyms="none")
    commit(database, vote(key=other))
    with pytest.raises(BadData, match="several keys"):
        run(tmp_path, database)


def test_the_migrations_make_the_tables(tmp_path, database):
    plain = sa.create_engine(f"sqlite:///{tmp_path / 'plain.db'}")
    FEEDBACK.metadata.create_all(plain)

    def described(engine):
        found = sa.inspect(engine)
        names = set(found.get_table_names()) - {"alembic_version"}
        return {
            name: (
                [(c["name"], str(c["type"]), c["nullable"], c["primary_key"]) for c in found.get_columns(name)],
                sorted((i["name"], tuple(i["column_names"])) for i in found.get_indexes(name)),
            )
            for name in names
        }

    def in_any_order(tables):
        return {name: (sorted(columns), indexes) for name, (columns, indexes) in tables.items()}

    assert in_any_order(described(database)) == in_any_order(described(plain))
    plain.dispose()


def test_what_does_not_count_is_not_read(tmp_path, database):
    commit(database, vote(counts=True), vote("ben", counts=False))
    _, out = run(tmp_path, database)
    assert [row["worker_id"] for row in out] == [pseudonym(KEY, "anna")]


def test_its_state_tells_every_vote(tmp_path, database):
    url = str(database.url)
    states = [source_state([url])]
    for row in (vote(), vote("ben"), vote("cleo", created_at=START - timedelta(days=1))):
        commit(database, row)
        states.append(source_state([url]))
    with database.begin() as connection:  # somebody is forgotten, somebody else has voted
        connection.execute(FEEDBACK.delete().where(FEEDBACK.c.worker_id == pseudonym(KEY, "ben")))
    commit(database, vote("dora"))
    states.append(source_state([url]))
    assert all(one != other for one, other in itertools.combinations(states, 2))
    assert source_state([url]) == states[-1]


def test_what_cannot_be_read_is_said_in_words(tmp_path, database):
    def reading(url):
        return lambda: ingest(IngestSettings.of(source=url), tmp_path, KEY)

    with pytest.raises(BadData, match="no feedback yet"):
        run(tmp_path, database)
    (tmp_path / "text.db").write_text("no database at all, though it is long enough to be taken for one" * 20)
    sqlite3.connect(tmp_path / "empty.db").execute("CREATE TABLE other (a)").connection.close()
    sqlite3.connect(tmp_path / "old.db").execute("CREATE TABLE feedback (comparison_id)").connection.close()
    for url, error, words in [
        (f"sqlite:///{tmp_path}/nothing.db", BadData, "no such file"),
        ("sqlite://", BadData, "no such file"),
        (f"sqlite:///{tmp_path}/text.db", BadData, "not a database"),
        (f"sqlite:///{tmp_path}/empty.db", BadData, "no table feedback"),
        (f"sqlite:///{tmp_path}/old.db", BadData, "has no agreed, arm, chosen, .*version"),
        ("postgresql+nodriver://host/name", BadConfiguration, "nodriver"),
        ("postgresql+psycopg://user:secret@host/name", BadConfiguration, r"user:\*\*\*@host.*PGPASSWORD"),
        ("postgresql+psycopg://host/name?password=secret", BadConfiguration, "PGPASSWORD"),
        ("postgresql+psycopg://host:port/name", BadConfiguration, "not the URL of a database"),
    ]:
        for attempt in (reading(url), lambda url=url: source_state([url])):
            with pytest.raises(error, match=words) as raised:
                attempt()
            assert "secret" not in str(raised.value)
    assert not (tmp_path / "nothing.db").exists()
    with pytest.raises(BadData, match="give it as sqlite:///"):
        reading(str(tmp_path / "feedback.db"))()


def test_what_is_missing_or_does_not_answer(tmp_path, database, monkeypatch):
    commit(database, vote())
    with sqlite3.connect(tmp_path / "feedback.db", isolation_level=None) as locked:
        monkeypatch.setattr(sqlite3, "connect", lambda *args, **kw: CONNECT(*args, **(kw | {"timeout": 0})))
        locked.execute("BEGIN EXCLUSIVE")
        with pytest.raises(BackendUnavailable, match="database is locked"):
            run(tmp_path, database)
        locked.execute("ROLLBACK")
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(BadData, match=r"psycopg.*Install the database's driver"):
        source_state(["postgresql+psycopg://host/name"])
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)
    for name in [name for name in sys.modules if name.startswith("coterie.feedback")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("coterie.feedback")
    with pytest.raises(BadData, match=r"Install coterie\[sources\]"):
        run(tmp_path, database)
