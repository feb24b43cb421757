"""Every format that ingest reads, wherever it lies, told apart by looking."""

import csv
import gzip
import json
import re
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stand_ins import s3

from coterie.config import IngestSettings
from coterie.contracts import COMPARISON, QUARANTINE
from coterie.errors import BackendUnavailable, BadConfiguration, BadData
from coterie.ingest import ingest

COLUMNS = ("worker_id", "prompt", "chosen", "rejected")


def lines(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8").write(text)
    return str(path)


def run(tmp_path, *sources, **options):
    """The metrics and rows of an ingest with plain worker ids."""
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    metrics = ingest(IngestSettings.of(source=list(sources), pseudonyms="none", **options), out)
    return metrics, COMPARISON.read(out / "comparisons.parquet").to_pylist()


def brief(rows, columns=COLUMNS):
    return [tuple(row[name] for name in columns) for row in rows]


def format_of(metrics):
    return metrics["sources"][0]["format"]


# -------------------------------------------------------------------------------------------------------------- OpenAI
def openai_row(choice=0, confidence=2, info=None, **more):
    info = info or {"id": "t3_1", "post": "My cat left.", "title": "Cat", "subreddit": "pets"}
    summaries = [{"text": " first", "policy": "ref", "note": "ok"}, {"text": " second", "policy": "ppo", "note": "ok"}]
    extra = {"confidence": confidence}
    return {
        "info": info,
        "summaries": summaries,
        "choice": choice,
        "worker": "w",
        "extra": extra,
        "split": "valid1",
    } | more


def test_openai(tmp_path):
    article = {"id": "x", "article": "News.", "title": "T", "site": "dailymail", "post": None, "subreddit": None}
    rows = [openai_row(), openai_row(1, 9), openai_row(1, None, article), openai_row(0, 4, article, extra={})]
    metrics, out = run(tmp_path, lines(tmp_path / "a.json.gz", rows))
    assert format_of(metrics) == "openai"
    assert brief(out, ("prompt", "prompt_id", "chosen", "shown_first", "confidence")) == [
        ("r/pets\n\nCat\n\nMy cat left.", "t3_1", " first", "chosen", 0.75),
        ("r/pets\n\nCat\n\nMy cat left.", "t3_1", " second", "rejected", 1.0),
        ("dailymail\n\nT\n\nNews.", "x", " second", "rejected", None),
        ("dailymail\n\nT\n\nNews.", "x", " first", "chosen", None),
    ]


@pytest.mark.parametrize("size", [1, 1 << 20], ids=["a block a row", "one block"])
def test_openai_refusals(tmp_path, monkeypatch, size):
    monkeypatch.setattr("coterie.ingest.sources._BYTES", size)
    bad = [
        openai_row(choice=2),
        openai_row(choice=True),
        openai_row(choice=-1),
        openai_row(summaries=[{"text": "one"}]),
        openai_row(info={"id": "x", "title": "no text"}),
        openai_row(info="x"),
        openai_row(confidence=10),
        openai_row(worker=None),
    ]
    metrics, _ = run(tmp_path, lines(tmp_path / "a.json", [openai_row(), *bad]), max_refused=1)
    assert metrics["refused"] == len(bad)


# ----------------------------------------------------------------------------------------------------------------- TRL
def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Sky?", "chosen": "Blue.", "rejected": "Green."}, ("Sky?", "Blue.", "Green.")),
        (
            {
                "chosen": "\n\nHuman: Sky?\n\nAssistant: It is blue.",
                "rejected": "\n\nHuman: Sky?\n\nAssistant: It isn't.",
            },
            ("\n\nHuman: Sky?\n\nAssistant:", "It is blue.", "It isn't."),
        ),
        ({"chosen": "The sky is blue.", "rejected": "The sky is black."}, ("The sky is", "blue.", "black.")),
        (
            {"prompt": [user("Sky?")], "chosen": [assistant("Blue.")], "rejected": [assistant("Green.")]},
            ("Sky?", "Blue.", "Green."),
        ),
        (
            {
                "chosen": [user("Sky?"), assistant("Blue."), user("Why?"), assistant("Rayleigh.")],
                "rejected": [user("Sky?"), assistant("Blue."), user("Why?"), assistant("Paint.")],
            },
            ("user: Sky?\n\nassistant: Blue.\n\nuser: Why?", "Rayleigh.", "Paint."),
        ),
        (
            {
                "prompt": "Sky?",
                "chosen": [user("Sky?"), assistant("Blue.")],
                "rejected": [user("Sky?"), assistant("Green.")],
            },
            ("Sky?", "Blue.", "Green."),
        ),
    ],
    ids=["explicit", "implicit transcript", "implicit words", "conversation", "implicit conversation", "prompt twice"],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_trl(tmp_path, row, expected, kind):
    row = row | {"annotator_id": "ann"}
    if kind == "jsonl":
        source = lines(tmp_path / "a.jsonl", [row])
    else:
        source = str(tmp_path / "a.parquet")
        pq.write_table(pa.Table.from_pylist([row]), source)
    metrics, out = run(tmp_path, source)
    assert format_of(metrics) == "trl"
    assert brief(out) == [("ann", *expected)]


def test_an_unnamed_column_is_no_prompt(tmp_path):
    path = tmp_path / "a.csv"  # as a data frame writes its index
    path.write_text(",annotator,chosen,rejected\n0,ann,The sky is blue.,The sky is black.\n")
    _, out = run(tmp_path, str(path))
    assert brief(out) == [("ann", "The sky is", "blue.", "black.")]


def test_trl_without_a_common_beginning_is_refused(tmp_path):
    rows = [
        {"worker": "a", "chosen": "x y", "rejected": "x z"},
        {"worker": "a", "chosen": "yes", "rejected": "no"},
        {"worker": "a", "chosen": [assistant("yes")], "rejected": [assistant("no")]},
        {"worker": "a", "chosen": [{"role": "user"}], "rejected": [assistant("no")]},
    ]
    metrics, out = run(tmp_path, lines(tmp_path / "a.jsonl", rows), max_refused=1)
    assert brief(out) == [("a", "x", "y", "z")]
    assert metrics["refused"] == 3


# --------------------------------------------------------------------------------------------------------------- PRISM
def utterance(turn, within, text, chosen=False, conversation="c1", question=None):
    return {
        "utterance_id": f"{turn}{within}",
        "interaction_id": turn,
        "conversation_id": conversation,
        "user_id": "user7",
        "turn": 0,
        "within_turn_id": within,
        "user_prompt": question or f"question {turn}",
        "model_response": text,
        "score": 50,
        "if_chosen": chosen,
    }


def test_prism(tmp_path):
    rows = [
        utterance("t1", 0, "a"),
        utterance("t1", 1, "b", True),
        utterance("t1", 2, "c"),
        utterance("t2", 0, "d", True),
        utterance("t2", 1, "e"),
        utterance("t3", 0, "f", True, "c2"),
        utterance("t3", 1, "g", False, "c2"),
    ]
    metrics, out = run(tmp_path, lines(tmp_path / "utterances.jsonl", rows))
    assert format_of(metrics) == "prism"
    second = "user: question t1\n\nassistant: b\n\nuser: question t2"
    assert brief(out, ("prompt", "chosen", "rejected", "prompt_id", "ranking_id", "shown_first")) == [
        ("question t1", "b", "a", "c1", "t1", "rejected"),
        ("question t1", "b", "c", "c1", "t1", "chosen"),
        (second, "d", "e", "c1", "t2", "chosen"),
        ("question t3", "f", "g", "c2", "t3", "chosen"),
    ]
    assert metrics["from_rankings"] == 4


def test_prism_refusals(tmp_path):
    rows = [
        utterance("t1", 0, "a", True),
        utterance("t1", 1, ""),  # this response alone
        utterance("t1", 2, "c"),
        utterance("t2", 0, "d"),  # nobody chose
        utterance("t2", 1, "e"),
        utterance("t1", 3, "late"),  # away from its turn
        utterance("t3", 0, "same", True),
        utterance("t3", 1, "same"),
    ]
    metrics, out = run(tmp_path, lines(tmp_path / "u.jsonl", rows), max_refused=1)
    assert brief(out, ("chosen", "rejected")) == [("a", "c")]
    where = QUARANTINE.read(tmp_path / "out" / "quarantine.parquet")["line"].to_pylist()
    assert where == [2, 4, 5, 6, 7, 8]
    assert metrics["rows"] == 8


# -------------------------------------------------------------------------------------------------------------- tables
TABLE = [
    ["annotator", "question", "left", "right", "verdict", "sure"],
    ["x1", 'Which "one"?', "line\nbreak, comma", "other", "1", "0.25"],
    ["x2", "Which?", "one", "two", "0", ""],
    ["x2", "Why?", "one", "two", "tie", "1"],
]
MAPPING = {"prompt": "question", "chosen": "left", "rejected": "right", "label": "verdict", "confidence": "sure"}


@pytest.mark.parametrize("suffix", ["csv", "tsv", "csv.gz", "semicolon.csv", "bom.csv", "parquet", "jsonl"])
def test_tables_with_mapped_columns(tmp_path, suffix):
    path = tmp_path / f"votes.{suffix}"
    records = [dict(zip(TABLE[0], row, strict=True)) for row in TABLE[1:]]
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif suffix == "jsonl":
        lines(path, records)
    else:
        opened = gzip.open if suffix.endswith("gz") else open
        with opened(path, "wt", encoding="utf-8-sig" if "bom" in suffix else "utf-8", newline="") as file:
            delimiter = {"tsv": "\t", "semicolon.csv": ";"}.get(suffix, ",")
            csv.writer(file, delimiter=delimiter).writerows(TABLE)
    metrics, out = run(tmp_path, str(path), columns=MAPPING)
    assert format_of(metrics) == "table"
    assert brief(out, (*COLUMNS, "label", "confidence")) == [
        ("x1", 'Which "one"?', "line\nbreak, comma", "other", 1.0, 0.25),
        ("x2", "Which?", "two", "one", 1.0, None),
        ("x2", "Why?", "one", "two", 0.5, 1.0),
    ]


def test_label_zero_turns_shown_first_round_too(tmp_path):
    row = {"worker": 7, "prompt": "p", "chosen": "a", "rejected": "b", "label": 0, "shown_first": "chosen"}
    _, out = run(tmp_path, lines(tmp_path / "a.jsonl", [row]))
    assert brief(out, ("worker_id", "chosen", "shown_first")) == [("7", "b", "rejected")]


@pytest.mark.parametrize("as_cell", [False, True])
def test_a_ranking_becomes_its_pairs(tmp_path, as_cell):
    ranking = ["best", "middle", "worst"]
    rows = [{"worker": w, "prompt": "p", "ranking": json.dumps(ranking) if as_cell else ranking} for w in "ab"]
    rows.append({"worker": "c", "prompt": "p", "ranking": ["same", "same"]})
    metrics, out = run(tmp_path, lines(tmp_path / "a.jsonl", rows), max_refused=1)
    pairs = [("best", "middle"), ("best", "worst"), ("middle", "worst")]
    assert brief(out, ("worker_id", "chosen", "rejected")) == [(w, *pair) for w in "ab" for pair in pairs]
    assert [len({row["ranking_id"] for row in out if row["worker_id"] == w}) for w in "ab"] == [1, 1]
    assert len({row["ranking_id"] for row in out}) == 2
    assert (metrics["rows"], metrics["refused"], metrics["comparisons"]) == (3, 1, 6)


def test_own_columns_in_parquet(tmp_path):
    when = datetime(2024, 5, 1, tzinfo=UTC)
    table = {
        "worker_id": [1.0, float("nan")],
        "prompt": ["p", "p"],
        "chosen": ["a", "a"],
        "rejected": ["b", "b"],
        "confidence": [float("nan"), 0.5],
        "prompt_id": ["first", None],
        "created_at": [when, None],
    }
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    metrics, out = run(tmp_path, str(tmp_path / "a.parquet"), max_refused=1)
    assert brief(out, ("worker_id", "prompt_id", "confidence", "created_at")) == [("1", "first", None, when)]
    assert metrics["refused_by_reason"] == {"no worker id": 1}


def test_bad_cells_of_a_csv_file_are_refused_one_by_one(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"worker,prompt,chosen,rejected\na,p,x,y\na,p,x\n\na,p,\xff,y\nb,p,x,y\n")
    metrics, out = run(tmp_path, str(path), max_refused=1)
    assert brief(out) == [("a", "p", "x", "y"), ("b", "p", "x", "y")]
    assert metrics["refused_by_reason"] == {"3 cells, the header has 4": 1, "chosen is not valid Unicode": 1}


# -------------------------------------------------------------------------------------------------------- bad sources
def votes(number, worker="a"):
    return [{"worker": worker, "prompt": f"p{n}", "chosen": "x", "rejected": "y"} for n in range(number)]


def test_missing_columns_are_named_with_those_found_and_the_remedy(tmp_path):
    source = lines(tmp_path / "a.jsonl", [{"prompt": "p", "chosen": "x", "rejected": "y", "rated_by": "a"}])
    with pytest.raises(BadData, match=r"no column for worker_id.*found: chosen, prompt, rated_by, rejected.*--columns"):
        run(tmp_path, source)
    assert brief(run(tmp_path, source, columns={"worker_id": "rated_by"})[1]) == [("a", "p", "x", "y")]
    with pytest.raises(BadData, match="no column rater"):
        run(tmp_path, source, columns={"worker_id": "rater"})
    with pytest.raises(BadConfiguration, match="wroker not known"):
        run(tmp_path, source, columns={"wroker": "rated_by"})
    with pytest.raises(BadData, match="not in the openai format: no choice"):
        run(tmp_path, source, format="openai")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b"", "the file is empty"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), "no rows"),
        ("a.jsonl", b"\n\n", "no rows"),
        ("a.csv", b"worker,prompt,chosen,rejected\n", "no rows"),
        ("a.jsonl", b"no json\nat all\n", "none of the first 2 rows can be read"),
        ("a.json", b'[{"a": 1}]', "one JSON array"),
        ("a.parquet", b"PAR1 and then rubbish", "not a readable Parquet file"),
        ("a.parquet", b"rubbish", "named Parquet, but it is not"),
        ("a.bin", b"\x00\x01\x02\x03", "neither line JSON"),
        ("a.csv", b"worker,worker\n1,2\n", "two columns of one name"),
    ],
)
def test_unusable_files_are_refused_in_words(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadData, match=words):
        run(tmp_path, str(tmp_path / name))
    assert not list((tmp_path / "out").glob("*comparisons*"))


def test_a_broken_gzip_names_file_and_line(tmp_path):
    whole = gzip.compress("".join(json.dumps(vote) + "\n" for vote in votes(20_000)).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadData, match=r"cut.jsonl.gz: broken gzip after line \d+,\d+ .*again"):
        run(tmp_path, str(tmp_path / "cut.jsonl.gz"))
    (tmp_path / "bad.jsonl.gz").write_bytes(whole[:50] + bytes(50) + whole[100:])
    with pytest.raises(BadData, match=r"bad.jsonl.gz: broken gzip"):
        run(tmp_path, str(tmp_path / "bad.jsonl.gz"))


def test_nothing_there(tmp_path):
    for pattern in (tmp_path / "nothing.jsonl", tmp_path / "*.jsonl"):
        with pytest.raises(BadData, match="no such file"):
            run(tmp_path, str(pattern))
    with pytest.raises(BadData, match="a folder"):
        run(tmp_path, str(tmp_path))
    lines(tmp_path / "odd[1].jsonl", votes(1))
    assert len(run(tmp_path, str(tmp_path / "odd[1].jsonl"))[1]) == 1


# -------------------------------------------------------------------------------------------------------------- places
def test_several_files_and_globs_of_several_formats(tmp_path):
    lines(tmp_path / "b.jsonl", [*votes(2, "b"), 1])
    lines(tmp_path / "a.jsonl.gz", [*votes(2, "a"), 1, 2])
    other = lines(tmp_path / "o.json", [openai_row()])
    metrics, out = run(tmp_path, str(tmp_path / "*.jsonl*"), other, other, max_refused=1)
    assert [row["worker_id"] for row in out] == ["a", "a", "b", "b", "w"]
    assert [source["format"] for source in metrics["sources"]] == ["coterie", "coterie", "openai"]
    assert [(source["rows"], source["refused"]) for source in metrics["sources"]] == [(4, 2), (3, 1), (1, 0)]


def test_without_a_telling_name(tmp_path):
    (tmp_path / "lines").write_bytes(gzip.compress(b"\xef\xbb\xbf" + json.dumps(votes(1)[0]).encode()))
    (tmp_path / "cells").write_text("worker\tprompt\tchosen\trejected\nb\tp\tx\ty\n")
    _, out = run(tmp_path, str(tmp_path / "lines"), str(tmp_path / "cells"))
    assert [row["worker_id"] for row in out] == ["a", "b"]


def test_s3(tmp_path):
    with s3() as (store, end):
        store.mkdir("votes")
        store.put(lines(tmp_path / "1.jsonl.gz", votes(3, "a")), "votes/2024/1.jsonl.gz")
        pq.write_table(pa.Table.from_pylist(votes(2, "b")), tmp_path / "2.parquet")
        store.put(str(tmp_path / "2.parquet"), "votes/2024/2.parquet")
        metrics, out = run(tmp_path, "s3://votes/2024/*")
        assert [row["worker_id"] for row in out] == ["a"] * 3 + ["b"] * 2
        assert [source["source"] for source in metrics["sources"]] == [
            "s3://votes/2024/1.jsonl.gz",
            "s3://votes/2024/2.parquet",
        ]
        with pytest.raises(BadData, match="s3://votes/nothing"):
            run(tmp_path, "s3://votes/nothing.jsonl")
        with pytest.raises(BadData, match="a folder"):
            run(tmp_path, "s3://votes/2024")
        end()
        for name in ("s3://votes/2024/1.jsonl.gz", "s3://votes/*.parquet"):
            with pytest.raises(BackendUnavailable, match=re.escape(name)):
                run(tmp_path, name)


def test_a_data_set_through_datasets(tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="datasets is not installed")
    folder = tmp_path / "dataset"
    folder.mkdir()
    for split, choice in (("train", 0), ("validation", 1)):
        pq.write_table(pa.Table.from_pylist([openai_row(choice)] * 1), folder / f"{split}-00000-of-00001.parquet")
    metrics, out = run(tmp_path, f"hf://{folder}")
    assert [source["format"] for source in metrics["sources"]] == ["openai", "openai"]
    assert brief(out, ("chosen", "source")) == [
        (" first", f"hf://{folder}?split=train"),
        (" second", f"hf://{folder}?split=validation"),
    ]
    _, out = run(tmp_path, f"hf://{folder}?split=validation")
    assert brief(out, ("chosen",)) == [(" second",)]
    with pytest.raises(BadData, match="colour not known"):
        run(tmp_path, f"hf://{folder}?colour=red")
    with pytest.raises(BadData, match="nosplit"):
        run(tmp_path, f"hf://{folder}?split=nosplit")
