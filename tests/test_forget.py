"""A person who is forgotten is nowhere, and everybody else is where they were."""

import json
import shutil

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from coterie import stages
from coterie.cli import main
from coterie.contracts import ASSIGNMENT, COMPARISON, DIFFERENCE, EMBEDDING, QUARANTINE, VECTOR, matrix
from coterie.discovery.votes import VoteFile
from coterie.errors import BadData
from coterie.feedback.database import Database
from coterie.feedback.intake import read_comparisons
from coterie.feedback.journal import Journal
from coterie.forget import forget
from tests.staged import everything


def nobody(folder, worker):
    return False


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = everything(tmp_path_factory.mktemp("run")).root
    table = ASSIGNMENT.read(root / "cluster" / "assignments.parquet")
    with EMBEDDING.writer(root / "embed" / "embeddings.parquet", embedding=2) as writer:
        writer.write_table(table.select(writer.schema.names).cast(writer.schema))
    return root


@pytest.fixture
def run(made, tmp_path, monkeypatch):
    monkeypatch.setenv("COTERIE_STAGE_CACHE", str(tmp_path / "cache"))
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def test_tables_lose_the_person_and_nobody_else(run, tmp_path):
    before = EMBEDDING.read(run / "embed" / "embeddings.parquet")
    names = before["worker_id"].to_pylist()
    gone, rest = names[7], [name for name in names if name != names[7]]
    QUARANTINE.write(
        run / "ingest" / "quarantine.parquet",
        {
            "source": ["s"] * 2,
            "line": [1, 2],
            "reason": ["r"] * 2,
            "row": [json.dumps({"worker": n}) for n in names[7:9]],
        },
    )
    (run / "report").mkdir()
    (run / "report" / "metrics.json").write_text(json.dumps({"worst": gone}))
    shutil.copytree(run / "cluster", tmp_path / "cache" / "cluster" / "key")
    (tmp_path / "cache" / "cluster" / "key" / "stage.json").write_text("{}")
    votes = {split: VoteFile(run / "embed" / "differences.parquet", split).loaded() for split in ("train", "test")}
    report = forget(gone, None, [run], nobody)

    assert gone.encode() not in b"".join(path.read_bytes() for path in run.rglob("*.parquet"))
    assert EMBEDDING.read(run / "embed" / "embeddings.parquet")["worker_id"].to_pylist() == rest
    assert ASSIGNMENT.read(run / "cluster" / "assignments.parquet")["worker_id"].to_pylist() == rest
    assert QUARANTINE.read(run / "ingest" / "quarantine.parquet").num_rows == 1
    for split, old in votes.items():
        new = VoteFile(run / "embed" / "differences.parquet", split).loaded()
        kept = old.worker != 7
        assert (new.x == old.x[kept]).all()
        assert new.n_workers == old.n_workers - 1
        assert [rest[i] for i in new.worker] == [names[i] for i in old.worker[kept]]
    comparisons = COMPARISON.read(run / "ingest" / "comparisons.parquet")
    named = set(comparisons["chosen_id"].to_pylist()) | set(comparisons["rejected_id"].to_pylist())
    assert set(VECTOR.read(run / "encode" / "vectors.parquet")["response_id"].to_pylist()) == named
    assert report["named_in"] == [str(run / "report" / "metrics.json")]
    assert [path.rpartition("/cache/")[2] for path in report["cached"]] == ["cluster/key"]
    assert not (tmp_path / "cache" / "cluster" / "key").exists()
    assert report["files"][str(run / "embed" / "embeddings.parquet")] == 1
    assert (
        matrix(before["embedding"])[8] == matrix(EMBEDDING.read(run / "embed" / "embeddings.parquet")["embedding"])[7]
    ).all()
    assert DIFFERENCE.metadata(run / "embed" / "differences.parquet")["workers"] == str(len(rest))
    again = forget(gone, None, [run], nobody)
    assert (again["files"], again["cached"]) == ({}, [])


def test_who_is_not_there_changes_no_file(run):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.parquet")}
    assert forget("nobody", None, [run], nobody)["files"] == {}
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.parquet")} == before
    with pytest.raises(BadData, match="no such folder"):
        forget("nobody", None, [run / "absent"], nobody)


def test_the_database_keeps_no_trace(tmp_path, monkeypatch):
    monkeypatch.setenv("COTERIE_STAGE_CACHE", str(tmp_path / "cache"))
    url = f"sqlite:///{tmp_path / 'feedback.db'}"
    database = Database(url)
    journal = Journal(database, daily_cap=10)
    for worker in ("the-one-who-goes", "the-one-who-stays"):
        record = {"worker_id": worker, "prompt": f"secret of {worker}", "chosen": "a", "rejected": "b"}
        journal.submit(read_comparisons([record], None)).result(30)
    journal.close()
    database.close()
    done = CliRunner().invoke(main, ["forget", "the-one-who-goes", "--pseudonym", "--database", url])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["feedback"] == {"folded": 0, "feedback": 1, "outbox": 1, "stamp": 0}
    raw = b"".join(path.read_bytes() for path in tmp_path.glob("feedback.db*"))
    assert b"the-one-who-goes" not in raw
    assert b"the-one-who-stays" in raw


def test_the_profile_goes_offline(run):
    from coterie.config import PublishSettings
    from feature_repo.publish import publish
    from feature_repo.store import lookup, open_store

    publish(run / "cluster", run / "publish", PublishSettings())
    names = EMBEDDING.read(run / "embed" / "embeddings.parquet")["worker_id"].to_pylist()
    report = stages.forget(names[0], None, [run])
    assert report["online"] == [str(run / "publish")]
    there = lookup(open_store(run / "publish"), names[:2])
    assert there[0] is None
    assert there[1].worker_id == names[1]
    assert names[0] not in pq.read_table(run / "publish" / "profiles.parquet")["worker_id"].to_pylist()
