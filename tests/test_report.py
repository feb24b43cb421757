"""The report: one valid page that asks for nothing outside itself, says the verdict first and escapes what it shows."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pyarrow.parquet as pq
import pytest
from staged import everything

from coterie.contracts import COMPARISON, Metrics
from coterie.report import assemble_metrics, charts, report_markdown, verdict_line, words, write_report

VOID = {"meta", "link", "br", "img", "hr", "input", "col"}


class Page(HTMLParser):
    """Checks that tags nest and ids are unique, and keeps the text by tag."""

    def __init__(self, html):
        super().__init__()
        self.open, self.ids, self.tags, self.text = [], [], set(), {}
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.text[self.open[-1]] = self.text.get(self.open[-1], "") + data


def records_of(staged):
    return {name: {"seconds": 1.25, "peak_memory": 123_000_000, "settings": {"seed": 7}} for name in staged.stages}


def make(staged, out, title="a run"):
    metrics = assemble_metrics(staged.stages, records_of(staged), {"coterie": "0.1", "python": "3.11"})
    write_report(staged.stages, metrics, out, title)
    return metrics, out.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    return everything(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def made(staged):
    return make(staged, staged.root / "report.html")


def test_the_page_is_valid_and_asks_for_nothing_outside_itself(made):
    page = Page(made[1])
    assert len(page.ids) == len(set(page.ids))
    assert not page.tags & {"script", "link", "img", "iframe", "object"}
    assert not re.search(r"https?://|@import|src=|url\((?!#)", made[1])
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', made[1])) <= set(page.ids)


def test_it_says_the_verdict_first(made):
    metrics, html = made
    page = Page(html)
    assert page.text["h1"] == verdict_line(metrics) == "The 40 workers fall into 2 coteries that want different things."
    assert html.index("<h1>") < html.index("<h2>")
    assert "longer answers" in html
    assert words.share(metrics["heldout"]["seen"]["accuracy"]) in html


def test_the_metrics_are_those_of_the_contract(made):
    metrics, _ = made
    assert Metrics(**metrics).model_dump(mode="json") == metrics
    assert metrics["seed"] == 7
    assert metrics["data"] == {"workers": 40, "comparisons": 1600, "refused": 3}
    assert metrics["truth"] is None


def test_the_same_run_makes_the_same_bytes(staged, made, tmp_path):
    assert make(staged, tmp_path / "again.html")[1] == made[1]


def test_every_number_of_the_matrix_is_on_the_page(staged, made):
    accuracy = json.loads((staged.evaluate / "metrics.json").read_text())["matrix"]["accuracy"]
    assert {cell["kind"] for row in _cells(made[1]) for cell in row} == {"own", "global", "wrong"}
    shown = [[cell["text"] for cell in row] for row in _cells(made[1])]
    assert shown == [[words.share(cell["value"]) for cell in row] for row in accuracy]


def _cells(html):
    table = re.search(r'<table class="heat">.*?</table>', html, re.DOTALL)[0]
    rows = re.findall(r"<tr><th>.*?</tr>", table.split("<tbody>")[1], re.DOTALL)
    cell = re.compile(r'<td class="(\w+)"[^>]*>([^<]*)</td>')
    return [[{"kind": kind, "text": text} for kind, text in cell.findall(row)] for row in rows]


def test_text_from_outside_is_shown_and_never_markup(staged, tmp_path):
    path = staged.ingest / "comparisons.parquet"
    good = path.read_bytes()
    rows = pq.read_table(path).to_pydict()
    rows["prompt"] = [f"<script>alert(1)</script> & {prompt}" for prompt in rows["prompt"]]
    try:
        COMPARISON.write(path, rows)
        _, html = make(staged, tmp_path / "hostile.html", title="</title><b>bold</b>")
    finally:
        path.write_bytes(good)
    assert "script" not in Page(html).tags
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; Question" in html
    assert "<b>bold" not in html


def test_one_taste_is_a_result_and_not_an_empty_page(tmp_path):
    staged = everything(tmp_path, coteries=1, groups=False)
    metrics, html = make(staged, tmp_path / "report.html")
    assert Page(html).text["h1"] == "One reward serves all 40 workers."
    assert 'class="heat"' not in html
    assert "Where they part ways" not in html
    assert "| coterie |" not in report_markdown(metrics)


def test_simulated_annotators_are_held_against_the_truth(staged, tmp_path):
    group = {f"w{i:03}": 0 for i in range(40)}
    for row in _assigned(staged):
        group[row["worker_id"]] = row["coterie"]
    truth = {"workers": {w: {"group": g} for w, g in group.items()}, "groups": [{}, {}], "oracle_accuracy": 0.76}
    (staged.ingest / "truth.json").write_text(json.dumps(truth))
    try:
        metrics, html = make(staged, tmp_path / "report.html")
    finally:
        (staged.ingest / "truth.json").unlink()
    assert metrics["truth"]["ari"] == 1
    assert "adjusted Rand index of 1.00" in html


def _assigned(staged):
    from coterie.contracts import ASSIGNMENT

    return ASSIGNMENT.read(staged.cluster / "assignments.parquet").to_pylist()


def test_the_summary_names_the_finding_and_each_coterie(made):
    text = report_markdown(made[0])
    assert text.startswith("# The 40 workers fall into 2 coteries")
    assert re.search(r"^\| 0 \| \d+ \| own \| \+\d", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"verdict": "continuous"}, "differ by degrees"),
        ({"insisted": True}, "as the recipe asked"),
        ({"verdict": "one-taste", "coteries": 1}, "One reward serves all"),
    ],
)
def test_each_verdict_has_its_own_words(made, change, says):
    metrics = made[0] | {"selection": made[0]["selection"] | change}
    assert says in verdict_line(metrics)


def test_numbers_in_words():
    assert words.points({"value": 0.0214, "low": -0.003, "high": 0.05}) == "+2.1 [−0.3, +5.0]"
    assert words.nats({"value": -0.0136, "low": None, "high": None}) == "−0.014"
    assert words.signed(-0.0001, 1) == "0.0"
    assert words.share(float("nan")) == "–"
    assert words.duration(245) == "4 min 05 s"


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_the_map_marks_each_coterie_by_shape_as_well_as_colour(rank):
    rng = np.random.default_rng(0)
    coterie = np.arange(30) % 3
    posterior = np.eye(3)[coterie] * 0.8 + 0.2 / 3
    svg = charts.worker_map(rng.standard_normal((30, rank)), coterie, posterior, np.full(30, 9))
    for k in range(3):
        assert charts.look(k)[0].lower() in svg.lower()
    assert len({charts.look(k)[1] for k in range(8)}) == 8
    assert len({charts.look(k) for k in range(40)}) == 40


def test_workers_who_do_not_differ_have_no_map():
    assert charts.worker_map(np.ones((12, 2)), np.zeros(12, int), np.ones((12, 1)), np.ones(12)) is None
