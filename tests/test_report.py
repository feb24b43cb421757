"""The report: one valid page that asks for nothing outside itself, says the verdict first and escapes what it shows."""

import copy
import json
import re
from html.parser import HTMLParser

import numpy as np
import pyarrow.parquet as pq
import pytest
from staged import everything

from coterie.contracts import ASSIGNMENT, COMPARISON, GLOBAL, TEST, Metrics
from coterie.discovery.votes import load_votes
from coterie.encoding.style import STYLE_NAMES, STYLE_WORDS
from coterie.report import assemble_metrics, charts, report_markdown, verdict_line, words, write_report
from coterie.report.drawing import look
from coterie.report.pairs import telling_pairs
from coterie.report.people import Direction, People, principal_directions
from coterie.rewards import RewardHead

VOID = {"meta", "link", "br", "img", "hr", "input", "col"}


class Page(HTMLParser):
    """Checks that tags nest and ids are unique, and keeps the text by tag and as it is read."""

    def __init__(self, html):
        super().__init__()
        self.open, self.ids, self.tags, self.text, self.all = [], [], set(), {}, []
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
            if "body" in self.open and "svg" not in self.open:
                self.all.append(data)

    @property
    def read(self):
        return " ".join(" ".join(self.all).replace("\u00a0", " ").split())


def records_of(staged):
    return {name: {"seconds": 1.25, "peak_memory": 123_000_000, "settings": {"seed": 7}} for name in staged.stages}


def make(staged, out, title="a run", **changes):
    """The metrics and the page; `changes` are of the metrics, and of evaluate's where they lie there alone."""
    metrics = assemble_metrics(staged.stages, records_of(staged), {"coterie": "0.1", "python": "3.11"})
    metrics = changed(metrics, changes)
    write_report(staged.stages, metrics, out, title)
    return metrics, out.read_text(encoding="utf-8")


def changed(metrics, changes):
    metrics = copy.deepcopy(metrics)
    for name, value in changes.items():
        metrics[name] = metrics[name] | value if isinstance(value, dict) and metrics.get(name) else value
    return metrics


def number(value, low=None, high=None):
    return {"value": value, "low": low, "high": high, "level": 0.95}


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    return everything(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def made(staged):
    return make(staged, staged.root / "report.html")


@pytest.fixture(scope="module")
def one_taste(tmp_path_factory):
    return everything(tmp_path_factory.mktemp("one"), coteries=1, groups=False)


# ---------------------------------------------------------------------------------------------------------------- page
def test_the_page_is_valid_and_asks_for_nothing_outside_itself(made):
    page = Page(made[1])
    assert len(page.ids) == len(set(page.ids))
    assert not page.tags & {"script", "link", "img", "iframe", "object"}
    assert not re.search(r"https?://|@import|src=|url\((?!#)", made[1])
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', made[1])) <= set(page.ids)


def test_its_first_line_is_the_verdict(made):
    metrics, html = made
    page = Page(html)
    assert page.text["h1"].startswith("Your 40 annotators fall into 2 coteries that want different things")
    assert page.read.startswith(verdict_line(metrics))
    assert page.text["title"] == verdict_line(metrics)
    assert "longer answers" in html
    assert words.share(metrics["heldout"]["seen"]["accuracy"]) in page.read


def test_every_part_is_there(made):
    titles = re.findall(r"<h2>(.*?)</h2>", made[1])
    assert titles == [
        "Map of the annotators",
        "What each coterie likes",
        "Own, global and wrong reward",
        "What was tried, and what lost",
        "New annotators",
        "Can its probabilities be believed?",
        "Who is served worst",
        "How far to trust it",
        "The data",
        "Words used here",
        "How it was made",
    ]
    drawn = re.findall(r'aria-label="([^"]*)"', made[1])
    for chart in ("Map", "Tree", "Own against global", "Held-out gain", "What new annotators gain"):
        assert any(label.startswith(chart) for label in drawn)


def test_the_metrics_are_those_of_the_contract(made):
    metrics, _ = made
    assert Metrics(**metrics).model_dump(mode="json") == metrics
    assert metrics["seed"] == 7
    assert metrics["data"] == {"workers": 40, "comparisons": 1600, "refused": 3}
    assert metrics["truth"] is None


def test_what_ships_is_what_the_gates_left(staged, tmp_path):
    path = staged.evaluate / "metrics.json"
    good = path.read_text()
    path.write_text(json.dumps(json.loads(good) | {"ships": "one-reward"}))
    try:
        metrics = assemble_metrics(staged.stages, records_of(staged), {})
    finally:
        path.write_text(good)
    assert metrics["selection"]["ships"] == "one-reward"


def test_the_same_run_makes_the_same_bytes(staged, made, tmp_path):
    assert make(staged, tmp_path / "again.html")[1] == made[1]


def test_every_number_of_the_matrix_is_on_the_page(staged, made):
    accuracy = json.loads((staged.evaluate / "metrics.json").read_text())["matrix"]["accuracy"]
    assert {cell["kind"] for row in _cells(made[1]) for cell in row} == {"own", "global", "wrong"}
    assert [[cell["kind"] for cell in row].index("own") for row in _cells(made[1])] == [1, 2]
    shown = [[cell["text"].replace("\u00a0", " ") for cell in row] for row in _cells(made[1])]
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


def test_one_taste_is_a_result_and_not_an_empty_page(one_taste, tmp_path):
    gain = number(-0.002, -0.006, 0.004) | {"level": 0.9}
    selection = {"verdict": "one-taste", "ships": "one-reward", "gain": gain, "confidence": 0.97}
    metrics, html = make(one_taste, tmp_path / "report.html", selection=selection)
    page = Page(html)
    assert page.text["h1"].replace("\u00a0", " ") == (
        "One reward serves all 40 annotators: splitting them would predict their choices at most 0.4 % better (90 % sure)."
    )
    assert "gains −2.0 [−6.0, +4.0] thousandths of a nat a comparison" in page.read
    assert "97 % give the same verdict" in page.read
    assert 'class="heat"' not in html
    assert "nobody has a wrong reward" in page.read
    assert "They get the one reward, as everybody does" in page.read
    assert "Where it parts from the others" not in html
    assert "| coterie |" not in report_markdown(metrics)


def test_chance_is_not_drawn_as_a_tree(one_taste, made, tmp_path):
    _, html = make(one_taste, tmp_path / "report.html")
    assert "Tree of the annotators" in made[1]
    assert "Tree of the annotators" not in html
    assert "A tree of likeness is not drawn" in Page(html).read


def test_what_is_not_there_is_said_and_breaks_nothing(staged, tmp_path):
    """An older run, or one with too little of everything."""
    metrics, _ = make(staged, tmp_path / "full.html")
    nothing = {"accuracy": number(None), "log_loss": number(None)}
    for coterie in metrics["coteries"]:
        coterie.pop("style", None)
        coterie |= {"likes": [], "own_vs_global": nothing}
    for name in ("ships", "size", "insisted", "confidence", "gain"):
        metrics["selection"].pop(name, None)
    metrics["selection"]["candidates"] = []
    metrics["heldout"] = {"seen": {"accuracy": None, "log_loss": None, "difference_to_pooled": nothing}}
    metrics |= {"heterogeneity": None, "stability": {}, "worst": {}, "calibration": {}}

    path, ingest = staged.evaluate / "metrics.json", staged.ingest / "metrics.json"
    good, data = path.read_text(), ingest.read_text()
    evaluated = json.loads(good)
    evaluated.pop("calibration_curve", None)
    evaluated["matrix"]["accuracy"] = [[number(None)] * len(row) for row in evaluated["matrix"]["accuracy"]]
    path.write_text(json.dumps(evaluated))
    bare = json.loads(data)
    bare["agreement"] = {"rate": None, "shared_pairs": 0}
    bare["length_bias"] = {"longer_chosen": None, "comparisons": 0}
    ingest.write_text(json.dumps(bare))
    try:
        write_report(staged.stages, metrics, tmp_path / "bare.html", "bare")
    finally:
        path.write_text(good)
        ingest.write_text(data)
    read = Page((tmp_path / "bare.html").read_text()).read
    for reason in (
        "how sure that is was not measured",
        "Whether tastes differ at all was not tested",
        "Its readable features were not measured",
        "Nothing but one reward for everybody was tried: too few prompts to hold some out",
        "Not measured: it takes ten annotators with held-out comparisons",
        "Not measured: every held-out comparison is a tie",
        "not measured: there were no two halves",
        "not measured: nothing could be held out",
        "here nobody has as many",
        "unknown: no pair was judged by two annotators",
        "unknown: all are equally long",
        "unknown: the order was not recorded",
    ):
        assert reason in read
    assert "None" not in read
    assert "nan" not in read
    assert report_markdown(metrics).startswith("# Your 40 annotators")


def test_everybody_by_their_own_place_with_the_coteries_as_a_summary(tmp_path):
    staged = everything(tmp_path, ships="embedding")
    selection = {"verdict": "continuous", "member": "lowrank", "confidence": 0.93}
    metrics, html = make(staged, tmp_path / "report.html", selection=selection)
    page = Page(html)
    assert verdict_line(metrics) == (
        "Your 40 annotators differ by degrees, not in groups (confidence 93 %): each is served by their own place among "
        "all tastes, and 2 coteries only sum them up."
    )
    assert "Here coteries only sum people up" in page.read
    assert "gate everybody is served by their own place among all tastes: it beats the global reward" in page.read
    assert "The question to ask first" not in page.read


def test_new_annotators_by_the_number_of_their_comparisons(made):
    shots = re.search(r"comparisons known.*?</table>", made[1], re.DOTALL)[0]
    known = [int(k) for k in re.findall(r"<tr><th>(\d+)</th>", shots)]
    assert known == sorted(known)
    assert known == sorted(map(int, made[0]["heldout"]["unseen_by_shots"]))
    assert len(known) > 1


def test_data_quality_is_told(staged, tmp_path):
    path = staged.ingest / "metrics.json"
    good = path.read_text()
    data = json.loads(good) | {
        "warnings": ["half of them sleep"],
        "refused_by_reason": {"no worker": 2, "no prompt": 1},
    }
    path.write_text(json.dumps(data))
    try:
        read = Page(make(staged, tmp_path / "report.html")[1]).read
    finally:
        path.write_text(good)
    for told in (
        "To keep in mind: half of them sleep.",
        "refused 2: no worker",
        "refused 1: no prompt",
        "61.0 % of cases",
    ):
        assert told in read


def test_how_reward_adapters_were_trained_is_told_where_there_are_some(staged, made, tmp_path):
    assert "adapters" not in made[1]
    folders = {**staged.rewards, "evaluate": staged.evaluate}
    good = {name: (folder / "metrics.json").read_text() for name, folder in folders.items()}
    trained = {
        "global": {
            "adapter_validation_log_loss": 0.61, "validation_log_loss": 0.62, "steps": 20, "over_long": 21,
            "comparisons": 1200.0, "over_long_by_worker": {f"w{i:03}": i for i in range(1, 7)},
            "curve": [[step, 0.7 - 0.01 * step] for step in range(1, 21)],
        },
        "coterie-0": {
            "adapter_validation_log_loss": 0.51, "adapter_global_validation_log_loss": 0.57, "validation_log_loss": 0.52,
            "steps": 10, "over_long": 0, "over_long_by_worker": {}, "curve": [[1, 0.6], [2, 0.5]],
        },
        "coterie-1": {
            "adapter_global_validation_log_loss": 0.58, "validation_log_loss": 0.53, "steps": 0, "over_long": 0,
            "over_long_by_worker": {}, "curve": [], "served_by": "the global adapter: there are 3 training comparisons",
        },
    }  # fmt: skip
    evaluated = json.loads(good["evaluate"])
    evaluated["heldout"]["seen"]["difference_to_linear"] = {
        "accuracy": number(0.012, -0.003, 0.027), "log_loss": number(-0.011, -0.02, -0.002),
    }  # fmt: skip
    try:
        for name, told in trained.items():
            (folders[name] / "metrics.json").write_text(json.dumps(json.loads(good[name]) | told))
        (staged.evaluate / "metrics.json").write_text(json.dumps(evaluated))
        _, html = make(staged, tmp_path / "report.html")
    finally:
        for name, text in good.items():
            (folders[name] / "metrics.json").write_text(text)
    page = Page(html)
    assert len(page.ids) == len(set(page.ids))
    assert 'aria-label="Training of the reward adapters"' in html
    assert "everybody 0.6100 – 0.6200 20 coterie 0 0.5100 0.5700 0.5200 10 coterie 1 – 0.5800 0.5300 0" in page.read
    assert "It is served by the global adapter: there are 3 training comparisons." in page.read
    assert "accuracy +1.2 [−0.3, +2.7] points, log-loss −0.011 [−0.020, −0.002]" in page.read
    assert "21 of 1,200 training comparisons have a side with more tokens" in page.read
    assert "Those who lost most: w006 (6), w005 (5), w004 (4), w003 (3), w002 (2)." in page.read


def test_simulated_annotators_are_held_against_the_truth(staged, tmp_path):
    group = {f"w{i:03}": 0 for i in range(40)}
    for row in ASSIGNMENT.read(staged.cluster / "assignments.parquet").to_pylist():
        group[row["worker_id"]] = row["coterie"]
    truth = {"workers": {w: {"group": g} for w, g in group.items()}, "groups": [{}, {}], "oracle_accuracy": 0.76}
    (staged.ingest / "truth.json").write_text(json.dumps(truth))
    try:
        metrics, html = make(staged, tmp_path / "report.html")
    finally:
        (staged.ingest / "truth.json").unlink()
    assert metrics["truth"]["ari"] == 1
    assert "adjusted Rand index of 1.00" in html


# --------------------------------------------------------------------------------------------------------------- likes
def style(liked, value, low, high):
    return {"name": liked, "words": liked, "weight": number(value, low, high)}


def test_style_features_are_bars_on_one_scale_that_start_at_zero(staged, made, tmp_path):
    coteries = copy.deepcopy(made[0]["coteries"])
    coteries[0]["style"] = [style("longer answers", 0.5, 0.4, 0.6), style("no lists", -0.3, -0.7, 0.1)]
    coteries[1]["style"] = [style("prose", -0.1, -0.2, -0.05), style("figures", 0.001, -0.1, 0.1)]
    _, html = make(staged, tmp_path / "report.html", coteries=coteries)
    bars = re.findall(
        r'<div(?: class="(unsure)")?><span>([^<]*)</span>\s*<span class="whisker"[^>]*>'
        r'<i style="left: ([\d.]+)%; width: ([\d.]+)%"></i><b style="left: ([\d.]+)%"></b></span>\s*<span class="n">([^<]*)',
        html,
    )
    read = {liked: (unsure, float(at), number.strip()) for unsure, liked, _, _, at, number in bars}
    # From -0.1, which "no lists" may be, to +0.7.
    assert read == {
        "longer answers": ("", 75.0, "+0.50"),
        "no lists": ("unsure", 50.0, "+0.30"),
        "prose": ("", 25.0, "+0.10"),
    }
    assert [float(left) for _, _, left, *_ in bars] == [62.5, 0.0, 18.8]


def test_a_coterie_too_small_for_intervals_has_dots_alone(staged, made, tmp_path):
    coteries = copy.deepcopy(made[0]["coteries"])
    coteries[0]["style"] = [style("longer answers", 0.5, None, None)]
    _, html = make(staged, tmp_path / "report.html", coteries=coteries)
    bar = re.search(r'<div class="unsure"><span>longer answers</span>.*?</div>', html, re.DOTALL)[0]
    assert "<i" not in bar
    assert "<b" in bar


def test_pairs_divide_each_coterie_from_the_others_and_the_question_informs_most(staged):
    shares = np.array([0.7, 0.3])
    pairs = telling_pairs(staged.stages, shares)
    heads = [RewardHead.load(staged.rewards[f"coterie-{k}"]) for k in range(2)]
    votes = load_votes(staged.embed / "differences.parquet", TEST)
    p = 1 / (1 + np.exp(-np.stack([head.margin(votes.x) for head in heads], axis=1)))
    prompts = [pair.prompt for found in pairs.divisive for pair in found]
    assert len(prompts) == len(set(prompts)) == 6
    for k, found in enumerate(pairs.divisive):
        leads = [pair.prefers_a[k] - pair.prefers_a[1 - k] for pair in found]
        assert leads == sorted(leads, reverse=True)
        assert all(lead > 0 for lead in leads)
    assert pairs.divisive[0][0].prefers_a[0] - pairs.divisive[0][0].prefers_a[1] == pytest.approx(
        np.abs(p[:, 0] - p[:, 1]).max()
    )
    # The one likes long answers and the other short ones.
    longer = [np.sign(len(found[0].a) - len(found[0].b)) for found in pairs.divisive]
    assert sorted(longer) == [-1, 1]

    def entropy(q):
        return -q * np.log(q) - (1 - q) * np.log(1 - q)

    information = entropy(p @ shares) - entropy(p) @ shares
    asked = np.array(pairs.question.prefers_a)
    assert entropy(asked @ shares) - entropy(asked) @ shares == pytest.approx(information.max(), abs=1e-6)


# --------------------------------------------------------------------------------------------------------------- words
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"confidence": 0.987},
            "Your 40 annotators fall into 2 coteries that want different things (confidence 99 %).",
        ),
        ({"confidence": 1.0}, "(confidence over 99 %)."),
        (
            {"verdict": "continuous", "confidence": 0.8},
            "differ by degrees, not in groups (confidence 80 %): 2 coteries only",
        ),
        (
            {"verdict": "continuous", "ships": "one-reward"},
            "too little to be served apart, and 2 coteries only sum them up.",
        ),
        (
            {"verdict": "continuous", "ships": "embedding", "coteries": 1, "confidence": 0.9},
            "(confidence 90 %): each is served by their own place among all tastes.",
        ),
        (
            {"insisted": True, "confidence": 0.9},
            "are served in 2 coteries because the recipe insisted; the data say that there are groups who want different "
            "things (confidence 90 %).",
        ),
        (
            {"insisted": True, "verdict": "one-taste", "ships": "embedding"},
            "by their own place among all tastes because the recipe insisted; the data say that one reward serves everybody",
        ),
        ({"insisted": True, "ships": "one-reward", "coteries": 1}, "Your 40 annotators share one reward because"),
        (
            {"verdict": "one-taste", "ships": "one-reward", "coteries": 1, "confidence": 0.9},
            "annotators (confidence 90 %).",
        ),
        (
            {"verdict": "one-taste", "gain": number(-0.02, -0.03, -0.01)},
            "One reward serves all 40 annotators: splitting them would predict their choices no better (95 % sure).",
        ),
    ],
)
def test_each_verdict_has_its_own_words(made, change, says):
    metrics = made[0] | {"selection": made[0]["selection"] | change}
    assert says in verdict_line(metrics)


def test_the_evidence_is_in_words(made):
    metrics = made[0] | {"heterogeneity": {"statistic": 0.02, "p_value": 1 / 60, "replicates": 59, "null": "n"}}
    metrics["heldout"] = {
        "seen": {"accuracy": 0.75, "log_loss": 0.5, "difference_to_pooled": {"accuracy": number(0.035, 0.015, 0.053)}}
    }
    told = words.evidence(metrics)
    assert "more than chance and carelessness explain" in told[0]
    assert told[0].endswith("at most 1 of 60 cases.")
    assert told[1] == (
        "On prompts kept out of training, personal scores predict 75.0 % of the choices: +3.5 points against one reward "
        "for all (95 % sure: between +1.5 and +5.3)."
    )
    assert "agree by 0.62" in told[2]
    assert "they are stable" in told[2]
    assert told[4].endswith(f"see {words.share(metrics['worst']['decile'])} of their choices predicted.")
    same = metrics | {"heterogeneity": metrics["heterogeneity"] | {"p_value": 0.42}}
    assert words.evidence(same)[0].endswith("about 42 of 100 cases.")


@pytest.mark.parametrize(
    ("own", "says"),
    [
        (["own", "own", "own"], "All coteries are served by rewards of their own."),
        (
            ["own", "global", "global"],
            "1 of the 3 coteries is served by a reward of its own, the others by the global one.",
        ),
        (["global"] * 3, "No coterie has proved a reward of its own: all are served by the global one."),
    ],
)
def test_who_is_served_what(made, own, says):
    coteries = [made[0]["coteries"][0] | {"id": k, "serves": serves} for k, serves in enumerate(own)]
    selection = made[0]["selection"] | {"coteries": 3}
    assert says in words.evidence(made[0] | {"coteries": coteries, "selection": selection})


@pytest.mark.parametrize(
    ("member", "size", "says"),
    [
        ("pooled", 1, "everybody wants the same"),
        ("mixture", 3, "3 groups who want different things"),
        ("lowrank", 1, "tastes differ by degrees, along 1 direction"),
        ("lowrank", 2, "tastes differ by degrees, along 2 directions"),
        ("slopes", 46, "everybody differs from everybody, in all 46 features"),
    ],
)
def test_what_was_tried_is_told_as_what_people_would_be_like(member, size, says):
    assert words.tried({"member": member, "size": size}) == says


def test_numbers_in_words():
    assert words.points({"value": 0.0214, "low": -0.003, "high": 0.05}) == "+2.1 [−0.3, +5.0]"
    assert words.nats({"value": -0.0136, "low": None, "high": None}) == "−0.014"
    assert words.signed(-0.0001, 1) == "0.0"
    assert words.share(float("nan")) == "–"
    assert words.duration(245) == "4 min 05 s"
    assert words.chances(0.25) == "25 of 100"
    assert words.chances(0.001) == "1 of 1,000"


def test_the_summary_names_the_finding_and_each_coterie(made):
    text = report_markdown(made[0])
    assert text.startswith("# Your 40 annotators fall into 2 coteries")
    assert re.search(r"^\| 0 \| \d+ \| own \| \+\d", text, re.MULTILINE)
    assert re.search(r"^\| New annotators after 5 comparisons, points \| \+\d", text, re.MULTILINE)


# -------------------------------------------------------------------------------------------------------------- charts
def people(rank=2, workers=30, coteries=3, seed=0):
    """Workers around the corners of their coteries, in a space of 2 + style features."""
    rng = np.random.default_rng(seed)
    names = ("pc1", "pc2", *STYLE_NAMES)
    coterie = np.arange(workers) % coteries
    place = np.zeros((workers, len(names)))
    place[:, :rank] = rng.standard_normal((coteries, rank))[coterie] * 3 + 0.3 * rng.standard_normal((workers, rank))
    posterior = np.eye(coteries)[coterie] * 0.8 + 0.2 / coteries
    return People(place, principal_directions(place, names), coterie, posterior, np.full(workers, 9))


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("draw", [charts.worker_map, charts.dendrogram])
def test_pictures_of_workers_mark_each_coterie_by_name_and_shape_as_well_as_colour(rank, draw):
    svg = draw(people(rank), [0, 3, 4])
    # A circle, a diamond and a triangle, by the commands that draw them.
    assert {"MCCCCCCCCz", "MLLLz", "MLLz"} <= {re.sub(r"[^A-Za-z]", "", d) for d in re.findall(r' d="([^"]*)"', svg)}
    for name in (0, 3, 4):
        assert look(name)[0].lower() in svg.lower()
        assert re.search(rf">(coterie )?{name}</text>", svg)
    assert len({look(k)[1] for k in range(8)}) == 8
    assert len({look(k) for k in range(40)}) == 40


def test_surer_workers_are_filled_more():
    vague = people(coteries=2)
    vague.posterior[:2] = [[0.5, 0.5], [0.6, 0.4]]
    svg = charts.worker_map(vague, [0, 1])
    filled = [float(opacity) for opacity in re.findall(r"fill-opacity: ([\d.]+)", svg)]
    assert sorted(filled) == pytest.approx([0.16] + 28 * [0.64])  # and one that is not filled at all


def test_the_tree_joins_who_is_alike():
    """Coteries that lie apart are branches of their own: all but the topmost links have one coterie's colour."""
    svg = charts.dendrogram(people(workers=60), [0, 1, 2])
    drawn = [colour.lower() for colour in re.findall(r"fill: none; stroke: (#\w+); stroke-width: 0.8", svg)]
    of_one = [drawn.count(look(k)[0].lower()) for k in range(3)]
    assert of_one == [19, 19, 19]


def test_a_large_crowd_is_drawn_as_a_sample_that_a_page_can_hold():
    crowd = people(workers=5000)
    for draw, most in ((charts.worker_map, 3_000_000), (charts.dendrogram, 500_000)):
        svg = draw(crowd, [0, 1, 2])
        assert len(svg) < most
        assert svg == draw(crowd, [0, 1, 2])


def test_workers_who_do_not_differ_have_no_map():
    same = People(
        np.ones((12, 3)),
        principal_directions(np.ones((12, 3)), ("a", "b", "c")),
        np.zeros(12, int),
        np.ones((12, 1)),
        np.ones(12),
    )
    assert same.directions == []
    assert charts.worker_map(same, [0]) is None
    assert charts.dendrogram(same, [0]) is None


def test_directions_have_the_words_of_the_features_along_which_people_differ():
    rng = np.random.default_rng(0)
    names = ("pc1", "words", "lists", "hedging")
    tastes = 0.02 * rng.standard_normal((50, 4)) + np.outer(rng.standard_normal(50), [0, 1.0, -0.7, 0.01])
    first, second = principal_directions(tastes, names)
    more, less = ("longer answers", "prose"), ("shorter answers", "lists")
    assert set(first.ends) == {", ".join(more), ", ".join(less)}
    assert first.share > 0.99
    high = np.corrcoef(first.place, tastes[:, 1])[0, 1] > 0
    assert first.ends[int(high)] == ", ".join(more)
    assert second.ends == ("", "")  # a spread that nobody would notice


def test_long_words_give_way():
    names = ("contractions", "overlap")
    (direction, *_) = principal_directions(np.outer([1.0, -1.0, 0.5], [1.0, 0.9]), names)
    assert set(direction.ends) == set(STYLE_WORDS["contractions"])
    assert isinstance(direction, Direction)


def candidate(member, size, gain, error=0.002, chosen=False):
    return {
        "member": member, "size": size, "log_loss": 0.6 - gain, "gain": gain, "standard_error": error, "chosen": chosen,
    }  # fmt: skip


def test_gain_over_k_shows_the_band_and_does_not_let_one_failure_flatten_the_rest():
    candidates = [
        candidate("reliability", 1, 0.0, 0.0),
        candidate("mixture", 2, 0.010, chosen=True),
        candidate("mixture", 3, 0.011),
        candidate("lowrank", 1, -0.9),
    ]
    svg = charts.selection(candidates)
    assert "one standard error from the best" in svg
    assert "↓ −900" in svg
    assert "chosen" in svg
    ticks = [int(t.replace("−", "-")) for t in re.findall(r">([−\d]+)</text>", svg) if t not in "123"]
    assert min(ticks) > -200
    assert charts.selection(candidates[:1]) is None
    lost = charts.selection([candidate("reliability", 1, 0.0, 0.0, chosen=True), candidate("mixture", 2, -0.003)])
    assert "one standard error from the best" not in lost


def test_new_annotators_need_two_points():
    def point(value, low, high):
        return {"difference_to_pooled": {"accuracy": number(value, low, high)}}

    shots = {0: point(0.0, 0.0, 0.0), 10: point(0.02, 0.01, 0.03), 5: point(0.01, None, None)}
    svg = charts.newcomers(shots, 0.03)
    assert [int(k) for k in re.findall(r">(\d+)</text>", svg) if k in ("0", "5", "10")][:3] == [0, 5, 10]
    assert "those it was learned from" in svg
    assert charts.newcomers({0: shots[0], 5: point(None, None, None)}, None) is None


def test_calibration_bars_are_wide_where_little_is_known():
    curve = [{"confidence": c, "accuracy": c, "comparisons": n} for c, n in ((0.6, 20), (0.8, 2000))]
    bar = r'd="M ([\d.]+) ([\d.]+) \nL \1 ([\d.]+) \n" clip-path="[^"]*" style="fill: none; stroke: #0072b2'
    little, much = (abs(float(low) - float(high)) for _, low, high in re.findall(bar, charts.calibration(curve, 0.95)))
    assert little > 5 * much > 0
    assert charts.calibration(curve[:1], 0.95) is None


def test_names_of_rewards_follow_the_coteries(made):
    header = re.search(r'<table class="heat">.*?</thead>', made[1], re.DOTALL)[0]
    assert re.findall(r"<th>([^<]+)</th>", header) == ["people of", f"{GLOBAL} reward", "reward of 0", "reward of 1"]
