"""Ingest as a whole: what goes in comes out once, refused or counted; nothing half-written is left."""

import gzip
import json
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coterie.config import IngestSettings
from coterie.contracts import COMPARISON, QUARANTINE, content_id
from coterie.errors import BadConfiguration, BadData
from coterie.ingest import data_report_markdown, ingest
from coterie.ingest.duplicates import Seen
from coterie.ingest.identifiers import comparison_id, pair_id
from coterie.ingest.openai import OpenAIReader
from coterie.ingest.pseudonyms import fingerprint, pseudonym
from coterie.ingest.readers import Naming
from coterie.ingest.table import TableReader
from coterie.ingest.validation import Refused

KEY = b"0123456789abcdef0123456789abcdef"
DATA = Path(__file__).parents[2] / "shared" / "data"


def write(path, rows):
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8").write(text)
    return str(path)


def vote(worker="anna", prompt="p", chosen="good", rejected="bad", **more):
    return {"worker": worker, "prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def run(tmp_path, source, key=KEY, quarantine=None, **options):
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    sources = source if isinstance(source, list) else [str(source)]
    metrics = ingest(IngestSettings.of(source=sources, **options), out, key, quarantine)
    return metrics, COMPARISON.read(out / "comparisons.parquet").to_pylist()


def refused(tmp_path):
    return QUARANTINE.read(tmp_path / "out" / "quarantine.parquet").to_pylist()


# ------------------------------------------------------------------------------------------------------- ids and rows
def test_a_row_becomes_a_comparison(tmp_path):
    source = write(tmp_path / "a.jsonl", [vote(created_at="2024-05-01T12:00:00+02:00", confidence=0.5)])
    metrics, [row] = run(tmp_path, source)
    who, chosen, rejected = pseudonym(KEY, "anna"), content_id("p", "good"), content_id("p", "bad")
    assert row["created_at"].isoformat() == "2024-05-01T10:00:00+00:00"
    del row["created_at"]
    assert row == {
        "comparison_id": comparison_id(who, chosen, rejected, 1.0),
        "worker_id": who,
        "prompt": "p",
        "prompt_id": content_id("p"),
        "chosen": "good",
        "rejected": "bad",
        "chosen_id": chosen,
        "rejected_id": rejected,
        "pair_id": pair_id(rejected, chosen),
        "label": 1.0,
        "ranking_id": None,
        "shown_first": None,
        "split": "train",
        "confidence": 0.5,
        "source": source,
    }
    assert metrics["key_fingerprint"] == fingerprint(KEY)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics


def test_golden_ids():
    first, second = content_id("prompt", "one"), content_id("prompt", "two")
    assert pair_id(first, second) == pair_id(second, first) == "71983addf7c341100b49beca0dc60818"
    assert comparison_id("w_1", first, second, 1.0) == "66b4e74e4984e9a89630779ba2c48d82"
    assert comparison_id("w_1", first, second, 0.5) == "9549a517dc078b58317b35ac77725464"


def test_ids_tell_workers_orders_and_labels_apart():
    a, b = content_id("p", "a"), content_id("p", "b")
    ids = {comparison_id(*vote) for vote in [("u", a, b, 1.0), ("u", b, a, 1.0), ("v", a, b, 1.0), ("u", a, b, 0.5)]}
    assert len(ids) == 4


def test_duplicates_are_dropped_and_contradictions_kept(tmp_path):
    rows = [vote(), vote(), vote(chosen="bad", rejected="good"), vote(worker="ben"), vote(label=0.5)]
    metrics, out = run(tmp_path, write(tmp_path / "a.jsonl", rows))
    assert len(out) == 4
    assert metrics["duplicates"] == 1
    assert metrics["ties"] == 1
    assert metrics["agreement"] == {
        "pairs": 1,
        "shared_pairs": 1,
        "couples": 2,  # anna's two votes with ben's; not with each other
        "rate": 0.5,
        "contradictions": 1,
    }


def test_agreement_and_biases(tmp_path):
    rows = [vote(w, chosen="long one", rejected="short", shown_first="chosen") for w in "abc"]
    rows += [vote("d", chosen="short", rejected="long one", shown_first="chosen")]
    metrics, _ = run(tmp_path, write(tmp_path / "a.jsonl", rows))
    assert metrics["agreement"]["rate"] == 3 / 6
    assert metrics["length_bias"]["longer_chosen"] == 3 / 4
    assert metrics["position_bias"] == {"comparisons": 4, "first_chosen": 1.0}


def test_pseudonyms_none_and_workers_in_quarantine(tmp_path):
    source = write(tmp_path / "a.jsonl", [vote("secret-name"), vote("secret-name", rejected=""), "{broken secret-name"])
    _, [row] = run(tmp_path, source, key=None, pseudonyms="none", max_refused=1)
    assert row["worker_id"] == "secret-name"
    run(tmp_path, source, max_refused=1)
    files = b"".join(file.read_bytes() for file in (tmp_path / "out").iterdir())
    texts = "".join(row["row"] for row in refused(tmp_path))
    assert b"secret-name" not in files
    assert "secret-name" not in texts
    assert pseudonym(KEY, "secret-name") in texts


def test_a_keyed_run_needs_a_key(tmp_path, monkeypatch):
    monkeypatch.delenv("COTERIE_PSEUDONYM_KEY", raising=False)
    monkeypatch.delenv("COTERIE_PSEUDONYM_KEY_FILE", raising=False)
    with pytest.raises(BadConfiguration, match="--pseudonyms none"):
        run(tmp_path, write(tmp_path / "a.jsonl", [vote()]), key=None)


# ------------------------------------------------------------------------------------------------------------- splits
@pytest.mark.parametrize("prompts", [3, 4, 32, 199, 1000])
def test_splits_are_by_prompt_and_never_empty(tmp_path, prompts):
    rows = [vote(worker, f"prompt {number}") for number in range(prompts) for worker in "abc"]
    metrics, out = run(tmp_path, write(tmp_path / "a.jsonl", rows))
    splits = {}
    for row in out:
        splits.setdefault(row["prompt_id"], set()).add(row["split"])
    assert all(len(found) == 1 for found in splits.values())
    counts = {name: part["prompts"] for name, part in metrics["splits"].items()}
    assert min(counts.values()) >= 1
    assert counts["test"] == pytest.approx(0.2 * prompts, abs=max(1, 0.05 * prompts))
    assert sum(part["comparisons"] for part in metrics["splits"].values()) == 3 * prompts


def test_a_prompt_stays_in_its_split_when_others_come(tmp_path):
    few = [vote(prompt=f"prompt {number}") for number in range(300)]
    _, before = run(tmp_path, write(tmp_path / "a.jsonl", few))
    _, after = run(tmp_path, write(tmp_path / "a.jsonl", few + [vote(prompt=f"new {n}") for n in range(300)]))
    old = {row["prompt_id"]: row["split"] for row in before}
    assert {row["prompt_id"]: row["split"] for row in after if row["prompt_id"] in old} == old
    _, other = run(tmp_path, write(tmp_path / "a.jsonl", few), seed=1)
    assert {row["prompt_id"]: row["split"] for row in other} != old


def test_fewer_than_three_prompts_all_train_and_it_is_said(tmp_path):
    metrics, out = run(tmp_path, write(tmp_path / "a.jsonl", [vote(prompt="a"), vote(prompt="b")]))
    assert {row["split"] for row in out} == {"train"}
    assert any("nothing is held out" in warning for warning in metrics["warnings"])


def test_the_sources_split_counts_when_mapped_and_a_prompt_is_in_one(tmp_path):
    rows = [vote(prompt="a", fold="train"), vote("ben", prompt="a", fold="test"), vote(prompt="b", fold="validation")]
    rows += [vote(prompt="c", fold="train"), vote(prompt="c", fold="validation")]  # one vote, but in two splits
    source = write(tmp_path / "a.jsonl", rows)
    metrics, out = run(tmp_path, source, columns={"split": "fold"})
    assert {row["prompt"]: row["split"] for row in out} == {"a": "test", "b": "validation", "c": "validation"}
    assert len(out) == 4
    assert any("several of the source's splits" in warning for warning in metrics["warnings"])


@pytest.mark.parametrize(("prompts", "few"), [(100, 0), (300, 1000)], ids=["copied, as drafted", "as drafted, copied"])
def test_a_copy_of_the_draft_differs_in_the_splits_alone(tmp_path, monkeypatch, prompts, few):
    rows = [vote(worker, f"prompt {number}", f"good {number}") for number in range(prompts) for worker in "aba"]
    metrics, out = run(tmp_path, write(tmp_path / "a.jsonl", rows))
    assert metrics["duplicates"] == prompts
    monkeypatch.setattr("coterie.ingest.splits.FEW_PROMPTS", few)
    again, other = run(tmp_path, tmp_path / "a.jsonl")
    assert [row | {"split": ""} for row in other] == [row | {"split": ""} for row in out]
    assert [row["split"] for row in other] != [row["split"] for row in out]
    assert again | {"splits": {}} == metrics | {"splits": {}}
    for report, comparisons in ((metrics, out), (again, other)):
        held = Counter(row["split"] for row in comparisons)
        assert {name: part["comparisons"] for name, part in report["splits"].items()} == held


# ------------------------------------------------------------------------------------------------------------ refusals
BAD_ROWS = {
    '{"worker": "a", "prompt"': "not JSON",
    "[1, 2]": "not a JSON object",
    '{"worker": "a", "prompt": "p", "chosen": "\\ud800", "rejected": "b"}': "not JSON",
    '{"worker": NaN, "prompt": "p", "chosen": "a", "rejected": "b"}': "not JSON",
}
BAD_VOTES = [
    ({"worker": None}, "no worker id"),
    ({"worker": "  "}, "no worker id"),
    ({"worker": ["a"]}, "the worker id is not text"),
    ({"worker": True}, "the worker id is not text"),
    ({"prompt": None}, "prompt is missing"),
    ({"prompt": 3}, "prompt is not text"),
    ({"chosen": None}, "chosen is missing"),
    ({"chosen": " \n"}, "chosen is empty"),
    ({"rejected": ""}, "rejected is empty"),
    ({"rejected": {"a": 1}}, "rejected is not text"),
    ({"rejected": "good"}, "identical"),
    ({"rejected": "x" * 1_000_001}, "over 1,000,000 characters"),
    ({"label": 2}, "label is not"),
    ({"label": None}, "label is not"),
    ({"label": [1]}, "label is not"),
    ({"confidence": 7}, "confidence is not"),
    ({"confidence": "sure"}, "confidence is not"),
    ({"shown_first": "left"}, "shown_first is neither"),
    ({"created_at": "yesterday"}, "created_at is neither"),
    ({"ranking": ["only"]}, "a ranking of 1"),
]


@pytest.mark.parametrize("size", [1, 1 << 20], ids=["a block a row", "one block"])
def test_every_refused_row_has_source_line_and_reason(tmp_path, monkeypatch, size):
    monkeypatch.setattr("coterie.ingest.sources._BYTES", size)
    bad = list(BAD_ROWS.items()) + [(vote() | v, reason) for v, reason in BAD_VOTES]
    rows = [vote(prompt="fine")] + [row for row, _ in bad]
    source = write(tmp_path / "a.jsonl", rows)
    metrics, out = run(tmp_path, source, max_refused=1)
    assert [row["prompt"] for row in out] == ["fine"]
    assert metrics["refused"] == sum(metrics["refused_by_reason"].values()) == len(bad)
    quarantined = refused(tmp_path)
    assert [(row["source"], row["line"]) for row in quarantined] == [(source, n) for n in range(2, len(rows) + 1)]
    for row, (text, reason) in zip(quarantined, bad, strict=True):
        assert reason in row["reason"], text
        assert len(row["row"]) <= 10_000


def test_too_many_refused_rows_fail_and_leave_the_quarantine(tmp_path):
    source, place = (
        write(tmp_path / "a.jsonl", [vote(), vote(rejected="")] * 10),
        tmp_path / "kept" / "quarantine.parquet",
    )
    with pytest.raises(
        BadData, match=r"10 of 20 rows refused \(50.0%.*rejected is empty: 10 \(first: .*line 2\)"
    ) as error:
        run(tmp_path, source, quarantine=place)
    assert str(place) in str(error.value)
    assert "--max-refused 0.5" in str(error.value)
    assert QUARANTINE.read(place).num_rows == 10
    assert not (tmp_path / "out" / "comparisons.parquet").exists()
    metrics, _ = run(tmp_path, source, max_refused=0.5)
    assert metrics["refused"] == 10


def test_no_usable_row_fails_whatever_is_allowed(tmp_path):
    with pytest.raises(BadData, match="2 of 2 rows refused"):
        run(tmp_path, write(tmp_path / "a.jsonl", [vote(rejected="")] * 2), max_refused=1)


def test_long_texts_and_emoji_are_welcome(tmp_path):
    long = "🙂" * 100_000
    _, [row] = run(tmp_path, write(tmp_path / "a.jsonl", [vote("🦊", "¿?", long, "nul \0 here")]))
    assert (row["chosen"], row["rejected"], row["prompt"]) == (long, "nul \0 here", "¿?")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([vote(prompt=f"{n}") for n in range(5)], "one worker"),
        ([vote(f"{n}", prompt=f"{n}") for n in range(5)], "one comparison a worker"),
        ([vote(f"{n % 2}", f"{n}", shown_first="chosen") for n in range(60)], "or always the other: 2;"),
        ([vote(label=0.5), vote("ben", label="tie")], "every comparison is a tie"),
    ],
)
def test_odd_data_are_accepted_with_a_warning(tmp_path, rows, words):
    metrics, out = run(tmp_path, write(tmp_path / "a.jsonl", rows))
    assert len(out) == len(rows)
    assert any(words in warning for warning in metrics["warnings"])
    assert words in data_report_markdown(metrics)


# ---------------------------------------------------------------------------------------------------- nothing half-done
def test_same_input_same_files_whatever_the_batches(tmp_path, monkeypatch):
    source = write(tmp_path / "a.jsonl", [vote(f"{n % 7}", f"{n % 50}", f"good {n}") for n in range(2000)])
    _, rows = run(tmp_path, source)
    first = (tmp_path / "out" / "comparisons.parquet").read_bytes()
    run(tmp_path, source)
    assert (tmp_path / "out" / "comparisons.parquet").read_bytes() == first
    monkeypatch.setattr("coterie.ingest.draft.GROUP_ROWS", 300)
    monkeypatch.setattr("coterie.ingest.sources._BYTES", 1000)
    assert run(tmp_path, source)[1] == rows


@pytest.mark.parametrize(
    "place", ["data_report.DataReport.update", "draft.progress"], ids=["reading", "copying with other splits"]
)
def test_an_interrupted_run_leaves_no_result(tmp_path, monkeypatch, place):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"coterie.ingest.{place}", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, write(tmp_path / "a.jsonl", [vote(prompt=f"{n}") for n in range(30)]))
    assert {file.name for file in (tmp_path / "out").iterdir()} <= {"quarantine.parquet"}


def test_a_full_disk_is_said_in_words_and_leaves_no_result(tmp_path):
    source = write(tmp_path / "a.jsonl", [vote(prompt=np.random.default_rng(n).bytes(2000).hex()) for n in range(500)])
    (tmp_path / "out").mkdir()
    code = f"""
        import resource
        from pathlib import Path
        from coterie.config import IngestSettings
        from coterie.errors import RunFailed
        from coterie.ingest import ingest
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        try:
            ingest(IngestSettings(source=[{source!r}], pseudonyms="none"), Path({str(tmp_path / "out")!r}))
        except RunFailed as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert "no space left" in done.stdout, done.stderr
    assert not (tmp_path / "out" / "comparisons.parquet").exists()
    assert not list((tmp_path / "out").glob(".*"))


# ------------------------------------------------------------------------------------------------------ property-based
texts = st.text(st.characters(codec="utf-8"), max_size=20) | st.none() | st.integers()
rows_strategy = st.lists(
    st.fixed_dictionaries(
        {"worker": st.sampled_from(["a", "b", 3, None, ""]), "prompt": texts, "chosen": texts, "rejected": texts},
        optional={"label": st.sampled_from([0, 1, 0.5, "tie", 7]), "confidence": st.floats(0, 2)},
    )
    | st.integers(),
    max_size=30,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=rows_strategy, order=st.randoms(use_true_random=False))
def test_every_row_is_kept_refused_or_a_duplicate_in_any_order(tmp_path, rows, order):
    rows = [vote("always"), *rows]
    out = tmp_path / "out"
    metrics, kept = run(tmp_path, write(tmp_path / "a.jsonl", rows), max_refused=1)
    assert metrics["rows"] == len(rows)
    assert metrics["comparisons"] + metrics["refused"] + metrics["duplicates"] == len(rows)
    assert metrics["comparisons"] == len(kept) == len({row["comparison_id"] for row in kept})
    assert QUARANTINE.read(out / "quarantine.parquet").num_rows == metrics["refused"]
    for row in kept:
        assert row["chosen_id"] == content_id(row["prompt"], row["chosen"])
        assert row["rejected_id"] == content_id(row["prompt"], row["rejected"])
        assert row["pair_id"] == pair_id(row["rejected_id"], row["chosen_id"])
        assert row["comparison_id"] == comparison_id(
            row["worker_id"], row["chosen_id"], row["rejected_id"], row["label"]
        )
    order.shuffle(rows)
    _, again = run(tmp_path, write(tmp_path / "a.jsonl", rows), max_refused=1)
    votes = [{(r["comparison_id"], r["prompt_id"], r["split"]) for r in some} for some in (kept, again)]
    assert votes[0] == votes[1]


def test_worker_ids_that_python_takes_for_equal():
    name = Naming(None)
    assert name.column([1.0, 1]) == name.column(["1", 1.0]) == name.column(["1", "1"])
    for column in ([True], [1, True], ["1", True], [1.5]):
        with pytest.raises(Refused):
            name.column(column)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 40) | st.integers(0, 2**64 - 1), max_size=30), max_size=8))
def test_what_was_seen_before(batches):
    seen, expected = Seen(slots=2), set()
    for batch in batches:
        new = seen.add(np.array([7 * number % 2**64 for number in batch], dtype=np.uint64))
        for number, is_new in zip(batch, new, strict=True):
            number = max(7 * number % 2**64, 1)  # 0 is taken for 1
            assert is_new == (number not in expected)
            expected.add(number)


# Records that are read by columns, and odd ones of every kind, which are not.
words = st.text(st.sampled_from("ab é🙂"), min_size=1, max_size=6).filter(str.strip)
plain_row = st.fixed_dictionaries(
    {
        "worker": st.sampled_from(["a", "b", "é"]),
        "prompt": words,
        "chosen": words.map("yes {}".format),
        "rejected": words.map("no {}".format),
    },
    optional={
        "label": st.sampled_from([0, 1, 0.5, "tie", "b"]),
        "shown_first": st.sampled_from(["chosen", "rejected", None, ""]),
        "confidence": st.sampled_from([0, 0.25, "1", None]),
        "prompt_id": st.sampled_from(["x", "y", 3, None]),
        "fold": st.sampled_from(["train", "test", None]),
        "created_at": st.sampled_from(["2024-05-01", 1e9, None]),
    },
)
odd_values = st.sampled_from([None, "", " ", 3, 3.0, True, [], ["a", "b"], {}, "same", "x" * 1_000_001])
odd_row = st.builds(
    lambda row, name, value: row | {name: value}, plain_row, st.sampled_from([*vote(), "label", "fold"]), odd_values
)
plain_openai = st.builds(
    lambda texts, choice, worker, info, more: {
        "info": info,
        "summaries": [{"text": f"one {texts[0]}"}, {"text": f"two {texts[1]}"}],
        "choice": choice,
        "worker": worker,
        **more,
    },
    st.tuples(words, words),
    st.sampled_from([0, 1]),
    st.sampled_from(["a", "b"]),
    st.fixed_dictionaries(
        {"post": words}, optional={"id": st.sampled_from(["i", 7, None]), "title": words, "subreddit": words}
    ),
    st.fixed_dictionaries({}, optional={"extra": st.sampled_from([None, {}, {"confidence": 2}, {"confidence": 9}])}),
)
odd_openai = st.builds(
    lambda row, change: row | change,
    plain_openai,
    st.sampled_from(
        [
            {"choice": True},
            {"choice": -1},
            {"choice": None},
            {"worker": None},
            {"worker": 4},
            {"info": "post"},
            {"info": {"post": " ", "id": []}},
            {"info": {"title": "no text"}},
            {"summaries": "ab"},
            {"summaries": {"text": 1, "b": 2}},
            {"summaries": [{"text": "a"}] * 3},
            {"summaries": [{"text": "a"}, {"text": "a"}]},
            {"summaries": [{"text": "a"}, {}]},
            {"summaries": [{"text": "a"}, None]},
            {"extra": {"confidence": 10}},
        ]
    ),
)
broken_lines = st.sampled_from(["", "{", "[1]", "3", '"text"', "null", '{"worker": "a"} {}'])


@pytest.mark.parametrize(
    ("plain", "odd", "reader", "options"),
    [
        (plain_row, odd_row, TableReader, {"columns": {"split": "fold"}}),
        (plain_openai, odd_openai, OpenAIReader, {}),
    ],
    ids=["table", "openai"],
)
def test_by_columns_or_row_by_row_the_result_is_the_same(tmp_path, monkeypatch, plain, odd, reader, options):
    monkeypatch.setattr("coterie.ingest.sources._BYTES", 800)  # some rows a block
    monkeypatch.setattr("coterie.ingest.readers._PIECE", 2)
    by_columns, row_by_row = reader._columns, reader._votes

    def refuse(self, records):
        raise Refused("taken for odd")

    @settings(max_examples=80, deadline=None)
    @given(
        st.lists(plain, min_size=1, max_size=20),
        st.lists(odd, min_size=1, max_size=4),
        st.lists(broken_lines, max_size=1),
        st.randoms(),
    )
    def compare(rows, others, lines, order):
        if reader is TableReader:
            rows = [vote(fold="train"), *rows]
        taken = [*rows, *others, *lines]
        order.shuffle(taken)
        results = []
        for columns in (by_columns, refuse):
            monkeypatch.setattr(reader, "_columns", columns)
            metrics, kept = run(tmp_path, write(tmp_path / "a.jsonl", [rows[0], *taken]), max_refused=1, **options)
            results.append((metrics, kept, refused(tmp_path)))
        assert results[0] == results[1]
        monkeypatch.setattr(reader, "_columns", by_columns)
        monkeypatch.setattr(reader, "_votes", refuse)
        assert run(tmp_path, write(tmp_path / "a.jsonl", rows), **options)[0]["refused"] == 0  # not one row by row
        monkeypatch.setattr(reader, "_votes", row_by_row)

    compare()


# ----------------------------------------------------------------------------------------------------- real annotators
@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason="the real preferences are not beside the repository")
def test_openai_comparisons(tmp_path):
    metrics, out = run(tmp_path, str(DATA / "openai_sff_*.json.gz"))
    assert {source["format"] for source in metrics["sources"]} == {"openai"}
    assert (metrics["rows"], metrics["workers"], metrics["refused"]) == (2208, 30, 12)
    with gzip.open(DATA / "openai_sff_batch13.json.gz") as file:
        raw = [orjson.loads(line) for line in file]
    by_vote = {(row["prompt_id"], row["worker_id"], row["chosen"]) for row in out}
    for record in raw:
        chosen = record["summaries"][record["choice"]]["text"]
        assert (record["info"]["id"], pseudonym(KEY, record["worker"]), chosen) in by_vote
    assert all(0.25 <= row["confidence"] <= 1 for row in out)


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason="the real preferences are not beside the repository")
def test_ukpconvarg1_is_read_as_it_is(tmp_path):
    metrics, _ = run(tmp_path, str(DATA / "ukpconvarg1.jsonl.gz"))
    assert (metrics["rows"], metrics["workers"], metrics["prompts"]) == (65340, 3801, 32)
    assert metrics["comparisons"] + metrics["duplicates"] + metrics["refused"] == 65340
    assert min(part["prompts"] for part in metrics["splits"].values()) >= 5
    assert 0.7 < metrics["agreement"]["rate"] < 0.76


def test_simulated_annotators_and_their_truth(tmp_path):
    source = "simulated://groups?groups=2&workers=20&comparisons_per_worker=10&seed=3"
    metrics, out = run(tmp_path, source)
    truth = json.loads((tmp_path / "out" / "truth.json").read_text())
    assert {row["worker_id"] for row in out} == set(truth["workers"])
    assert metrics["workers"] == 20
    assert metrics["refused"] == 0
    with pytest.raises(BadConfiguration, match="flavours"):
        run(tmp_path, "simulated://groups?flavours=3")
    with pytest.raises(BadConfiguration, match="stands alone"):
        run(tmp_path, [source, "other.jsonl"])


def test_comparisons_can_be_ingested_again(tmp_path):
    rows = [vote(f"{n % 9}", f"{n % 40}", f"good {n}", ranking=f"r{n}") for n in range(300)]
    _, once = run(tmp_path, write(tmp_path / "a.jsonl", rows), seed=5)
    file = tmp_path / "once.parquet"
    (tmp_path / "out" / "comparisons.parquet").rename(file)
    metrics, twice = run(tmp_path, str(file))
    assert metrics["sources"][0]["format"] == "coterie"
    assert [row | {"source": ""} for row in twice] == [row | {"source": ""} for row in once]
    with pytest.raises(BadData, match="pseudonyms of another key"):
        run(tmp_path, str(file), key=KEY[::-1])
    plain = tmp_path / "plain.parquet"
    pq.write_table(pa.Table.from_pylist([{k: v for k, v in row.items() if k != "created_at"} for row in once]), plain)
    assert {row["worker_id"] for row in run(tmp_path, str(plain))[1]}.isdisjoint({row["worker_id"] for row in once})
