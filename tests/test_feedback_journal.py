"""Votes are committed before they are acknowledged, and once: checks, ids, the daily cap, and kill -9 in the midst."""

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from coterie.errors import BackendUnavailable, BadConfiguration, BadData, Conflict, RunFailed, StorageFull
from coterie.feedback.database import Database
from coterie.feedback.intake import read_body, read_comparisons
from coterie.feedback.journal import Journal, Overloaded
from coterie.feedback.tables import FEEDBACK, OUTBOX
from coterie.ingest.pseudonyms import fingerprint, pseudonym
from coterie.uplift import holdout
from tests.databases import postgres

KEY = b"0123456789abcdef0123456789abcdef"
ROOT = Path(__file__).parents[1]


def said(n=0, worker="anna", **more):
    return {"worker_id": worker, "prompt": f"prompt {n}", "chosen": "good", "rejected": "bad"} | more


def rows(*records):
    return read_comparisons(list(records), KEY)


@pytest.fixture(scope="module")
def server():
    with postgres() as running:
        yield running


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'feedback.db'}"
    return request.getfixturevalue("server").database()


@pytest.fixture
def database(url):
    opened = Database(url)
    yield opened
    opened.close()


@pytest.fixture
def journal(database):
    made = Journal(database, daily_cap=5)
    yield made
    made.close()


def stored(database):
    with database.reading() as connection:
        return connection.execute(sa.select(FEEDBACK).order_by(FEEDBACK.c.prompt)).mappings().all()


# ------------------------------------------------------------------------------------------------------- what is sent
def test_a_vote_becomes_a_row_of_the_table():
    [row] = rows(said(label=0, shown_first="chosen", confidence="0.5", ranking_id=7))
    assert (row["chosen"], row["rejected"], row["label"], row["shown_first"]) == ("bad", "good", 1.0, "rejected")
    assert (row["worker_id"], row["key_fingerprint"]) == (pseudonym(KEY, "anna"), fingerprint(KEY))
    assert (row["confidence"], row["ranking_id"]) == (0.5, "7")
    [same] = rows(said(chosen="bad", rejected="good", comparison_id=row["comparison_id"]))
    assert same["comparison_id"] == row["comparison_id"]
    with pytest.raises(Conflict, match=r"comparisons\[0\]: its comparison_id is another"):
        rows(said(comparison_id=row["comparison_id"]))


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (said(worker=""), "no worker id"),
        (said(worker=None), "no worker id"),
        (said(chosen="  "), "chosen is empty"),
        (said(chosen="bad"), "identical"),
        (said(prompt=3), "prompt is not text"),
        (said(prompt="a\0b"), "prompt holds a NUL"),
        (said(label="best"), "the label"),
        (said(confidence=1.5), "confidence"),
        (said(shown_first="left"), "shown_first"),
        (said(ranking_id="r" * 600), "ranking_id is over 512"),
        (said(extra=1), "no field 'extra'"),
        (said(served={"request_id": "r"}), "served needs"),
        (said(served={"request_id": "r", "scores": [1, True]}), "served needs"),
        ([], "not an object"),
    ],
)
def test_what_ingest_would_refuse_is_refused_in_words(record, words):
    with pytest.raises(BadData, match=words) as refused:
        rows(said(), record)
    assert "comparisons[1]" in str(refused.value)
    assert "good" not in str(refused.value)


def test_a_body_is_one_comparison_or_many():
    assert read_body(b'{"worker_id": "w"}') == [{"worker_id": "w"}]
    assert read_body(b'{"comparisons": [1]}') == read_body(b"[1]") == [1]
    for body, words in [(b"{", "not JSON"), (b"7", "Send a comparison"), (b'{"comparisons": [], "x": 1}', "x: there")]:
        with pytest.raises(BadData, match=words):
            read_body(body)
    with pytest.raises(BadData, match="1 to 1000"):
        rows()
    with pytest.raises(BadData, match="1 to 1000"):
        rows(*[said()] * 1001)


def test_the_arm_of_the_holdout_is_kept_with_the_vote():
    who = pseudonym(KEY, "anna")
    held = next(f"r{n}" for n in itertools.count() if holdout(who, f"r{n}", 0.1)[0])
    own = next(f"r{n}" for n in itertools.count() if not holdout(who, f"r{n}", 0.1)[0])

    def kept(request, **served):
        [row] = read_comparisons([said(served={"request_id": request, "scores": [1.0, 2.0]} | served)], KEY, 0.1)
        return row["arm"], row["propensity"], row["agreed"]

    assert kept(held, source="global", reason="holdout") == ("holdout", 0.1, 0.0)
    assert kept(own, source="profile", scores=[2.0, 1.0]) == ("own", 0.9, 1.0)
    assert kept(own, source="profile", scores=[1.0, 1.0])[2] == 0.5
    assert kept(own, source="global", reason="unknown-worker")[0] is None
    assert kept(own, source="global", reason="holdout")[0] is None  # nobody held that request out


# ----------------------------------------------------------------------------------------------------- what is stored
def test_a_retry_is_no_second_vote_and_other_content_a_conflict(database, journal):
    first = journal.submit(rows(said(0, confidence=0.5), said(1))).result(30)
    again = journal.submit(rows(said(1), said(0, confidence=0.5))).result(30)
    assert [one.status for one in first + again] == ["stored", "stored", "duplicate", "duplicate"]
    with pytest.raises(Conflict, match=r"comparisons\[1\].*stored already"):
        journal.submit(rows(said(2), said(0, confidence=0.7))).result(30)
    twice = journal.submit(rows(said(3), said(3))).result(30)
    assert [one.status for one in twice] == ["stored", "duplicate"]
    assert [row["prompt"] for row in stored(database)] == ["prompt 0", "prompt 1", "prompt 3"]
    with database.reading() as connection:
        assert connection.scalars(sa.select(OUTBOX.c.worker_id)).all() == [pseudonym(KEY, "anna")] * 2


def test_what_a_worker_says_counts_up_to_the_cap_of_a_day(database, journal):
    outcomes = journal.submit(rows(*[said(n) for n in range(8)], said(0, "ben"))).result(30)
    assert [one.counts for one in outcomes] == [True] * 5 + [False] * 3 + [True]
    with database.writing() as connection:
        connection.execute(FEEDBACK.update().values(created_at=datetime.now(UTC) - timedelta(days=1)))
    assert [one.counts for one in journal.submit(rows(said(0), said(7), said(9))).result(30)] == [True, False, True]
    assert len(stored(database)) == 10


def test_requests_share_a_transaction_and_stand_or_fall_alone(database, journal):
    with database.writing() as connection:  # the journal's thread waits here, and the requests for it
        database.lock(connection, [pseudonym(KEY, "anna")], "votes")
        waiting = [journal.submit(rows(said(n, f"worker {n}"), said(n, "anna", confidence=n / 100))) for n in range(40)]
        gone = journal.submit(rows(said(99)))
        gone.cancel()
    done = [future.result(30) for future in waiting]
    assert all(one.status == "stored" for outcomes in done for one in outcomes)
    with database.reading() as connection:
        moments = connection.scalars(sa.select(FEEDBACK.c.created_at).distinct()).all()
    assert len(moments) <= 3
    assert len(stored(database)) == 80


def test_a_row_that_the_database_refuses_takes_no_other_with_it(database):
    journal = Journal(database, daily_cap=5)
    [bad] = rows(said(1))
    bad["prompt"] = None
    with database.writing() as connection:
        database.lock(connection, [pseudonym(KEY, "anna")], "votes")
        good, poor = journal.submit(rows(said(0))), journal.submit([bad])
    assert [one.status for one in good.result(30)] == ["stored"]
    with pytest.raises(RunFailed, match="the log says why"):
        poor.result(30)
    journal.close()
    with pytest.raises(Overloaded):
        journal.submit(rows(said(2)))


def test_too_many_that_wait_are_turned_away(database):
    journal = Journal(database, daily_cap=5, most_waiting=2)
    with pytest.raises(Overloaded, match="Send these again"):
        journal.submit(rows(said(0), said(1), said(2)))
    journal.submit(rows(said(0), said(1))).result(30)
    journal.close()


def test_a_database_that_does_not_sync_is_refused(server, tmp_path, monkeypatch):
    engine = sa.create_engine(server.url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text("ALTER SYSTEM SET fsync = off"))
        connection.execute(sa.text("SELECT pg_reload_conf()"))
    try:
        time.sleep(0.5)
        with pytest.raises(BadConfiguration, match="fsync=off: acknowledged votes could be lost"):
            Database(server.url)
    finally:
        with engine.connect() as connection:
            connection.execute(sa.text("ALTER SYSTEM RESET fsync"))
            connection.execute(sa.text("SELECT pg_reload_conf()"))
        engine.dispose()
        time.sleep(0.5)
    for wrong in ("sqlite://", "mysql://host/name", "sqlite:///file::memory:?uri=true"):
        with pytest.raises((BadConfiguration, BadData)):
            Database(wrong)


# ------------------------------------------------------------------------------------------------------------- faults
def commit_until_killed(url, number, pipe):
    """In a process of its own: commit one request after the other, and say so in the pipe as soon as it is acknowledged."""
    try:
        database = Database(url)
        journal, turn = Journal(database, daily_cap=10**6), threading.Lock()

        def client(who):
            for n in itertools.count():
                sent = rows(*[said(f"{number} {who} {n} {i}", f"worker {i % 3}") for i in range(5)])
                journal.submit(sent).result()
                with turn:
                    os.write(pipe, "".join(f"{row['comparison_id']}\n" for row in sent).encode())

        for who in range(3):
            threading.Thread(target=client, args=(who,), daemon=True).start()
        threading.Event().wait()
    finally:
        os._exit(1)


@pytest.mark.timeout(600)
def test_kill_9_of_the_process_that_commits_loses_and_doubles_nothing(url):
    Database(url).close()
    acknowledged, draw = [], random.Random(0)
    for number in range(50):
        out, into = os.pipe()
        child = os.fork()
        if not child:
            os.close(out)
            commit_until_killed(url, number, into)
        os.close(into)
        told = os.fdopen(out, "rb")
        lines = [told.readline()]  # it is at work
        time.sleep(draw.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        lines += told.readlines()
        os.waitpid(child, 0)
        acknowledged += [line.decode().strip() for line in lines if line.endswith(b"\n")]
    database = Database(url)
    with database.reading() as connection:
        there = connection.scalars(sa.select(FEEDBACK.c.comparison_id)).all()
        changed = set(connection.scalars(sa.select(OUTBOX.c.worker_id)))
        workers = set(connection.scalars(sa.select(FEEDBACK.c.worker_id)))
        whole = connection.scalars(
            sa.select(sa.func.count()).select_from(FEEDBACK).group_by(FEEDBACK.c.created_at)
        ).all()
    database.close()
    assert len(acknowledged) > 250
    assert set(acknowledged) <= set(there)
    assert len(there) == len(set(there))
    assert changed == workers
    assert not any(number % 5 for number in whole)  # no request is there by half


def test_a_server_that_crashes_loses_nothing(server, tmp_path):
    database = Database(server.url)
    journal = Journal(database, daily_cap=10**6)
    acknowledged = []
    for crash in range(3):
        for n in range(30):
            sent = rows(said(f"{crash} {n} {tmp_path}"))
            journal.submit(sent).result(30)
            acknowledged.append(sent[0]["comparison_id"])
        server.stop(signal.SIGKILL)
        time.sleep(1)  # the orphaned backends see that their parent is gone; until then they commit
        with pytest.raises(BackendUnavailable, match="no restart is needed"):
            journal.submit(rows(said("down"))).result(60)
        server.start()
    journal.submit(rows(said("back"))).result(60)
    with database.reading() as connection:
        there = connection.scalars(sa.select(FEEDBACK.c.comparison_id)).all()
    journal.close()
    database.close()
    assert set(acknowledged) <= set(there)


def test_a_full_or_read_only_disk_is_said_and_passes(tmp_path, monkeypatch):
    database = Database(f"sqlite:///{tmp_path / 'feedback.db'}")
    journal = Journal(database, daily_cap=5)
    journal.submit(rows(said(0))).result(30)

    def limited(setting):
        # What a full or read-only file system makes SQLite say, root or not: its own limits say the same.
        database.close()
        listener = lambda connection, record: connection.execute(setting)  # noqa: E731
        sa.event.listen(database._engine, "connect", listener)
        return lambda: (sa.event.remove(database._engine, "connect", listener), database.close())

    with database.reading() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
    freed = limited(f"PRAGMA max_page_count={pages}")
    with pytest.raises(StorageFull, match="no space left"):
        journal.submit(rows(said(1, prompt="long " * 50_000))).result(30)
    freed()
    freed = limited("PRAGMA query_only=ON")
    with pytest.raises(BackendUnavailable, match="Make it writable; no restart is needed"):
        journal.submit(rows(said(1))).result(30)
    freed()
    assert [one.status for one in journal.submit(rows(said(1))).result(30)] == ["stored"]
    journal.close()
    database.close()


SYNCED = """
import sys
from tests.test_feedback_journal import Database, Journal, rows, said
database = Database(sys.argv[1])
journal = Journal(database, daily_cap=5)
for n in range(5):
    journal.submit(rows(said(n, prompt=f"marker-sent-{n}"))).result(30)
    sys.stdout.write(f"acknowledged-{n}")
    sys.stdout.flush()
"""


def test_the_vote_is_synced_before_it_is_acknowledged(tmp_path):
    program = shutil.which("strace")
    if program is None:
        words = "strace is not installed (Debian: apt-get install strace)"
        pytest.fail(words) if os.environ.get("CI") else pytest.skip(words)
    trace, file = tmp_path / "trace", tmp_path / "feedback.db"
    done = subprocess.run(
        [program, "-f", "-y", "-s", "4096", "-e", "trace=fsync,fdatasync,pwrite64,write", "-o", trace,
         sys.executable, "-c", SYNCED, f"sqlite:///{file}"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    if "acknowledged-0" not in trace.read_text():
        pytest.skip("this machine does not let strace look")
    lines = trace.read_text().splitlines()
    for n in range(5):
        written = next(i for i, line in enumerate(lines) if f"marker-sent-{n}" in line and "-wal>" in line)
        told = next(i for i, line in enumerate(lines) if f"acknowledged-{n}" in line)
        synced = [i for i, line in enumerate(lines[:told]) if "sync(" in line and "feedback.db-wal>" in line]
        assert any(written < i < told for i in synced), lines[written - 5 : told + 1]
