"""The chart's files without helm: nothing in them has drifted from the code, the values or the docs."""

import json
import os
import re
import subprocess
import sys
from typing import get_args

import yaml
from jsonschema import Draft7Validator

from charts.readme import CHART, README, read_values, readme
from coterie.config import DeploySettings, FeedbackSettings, ServeSettings

ROOT = CHART.parents[1]
VALUES = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
SCHEMA = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
CI = sorted((CHART / "ci").glob("*-values.yaml"))
DASHBOARD = json.loads((CHART / "dashboards" / "coterie.json").read_text(encoding="utf-8"))
RULES = (CHART / "templates" / "monitoring.yaml").read_text(encoding="utf-8")
OPERATE = (ROOT / "docs" / "operate.md").read_text(encoding="utf-8")


def test_the_values_are_what_the_schema_says_and_it_knows_no_other():
    Draft7Validator.check_schema(SCHEMA)
    validator = Draft7Validator(SCHEMA)
    assert not list(validator.iter_errors(VALUES))
    for file in CI:
        own = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert not list(validator.iter_errors(merged(VALUES, own))), file.name

    def closed(schema, path):
        if "properties" in schema:
            assert schema.get("additionalProperties") is False, path
        for name, inside in schema.get("properties", {}).items():
            closed(inside, f"{path}.{name}")

    closed(SCHEMA, "")
    for name, inside in SCHEMA["definitions"].items():
        closed(inside, name)


def merged(values, over):
    return values | {
        name: merged(values[name], value) if isinstance(value, dict) and isinstance(values.get(name), dict) else value
        for name, value in over.items()
    }


def test_settings_have_the_names_and_bounds_of_the_servers_own():
    told = ("type", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")

    def bounds(settings, name):
        return {k: v for k, v in settings.model_json_schema()["properties"][name].items() if k in told}

    seen = set()
    for part in ("router", "predictor"):
        for name, schema in SCHEMA["properties"][part]["properties"]["settings"]["properties"].items():
            assert schema == bounds(ServeSettings, name), name
            seen.add(name)
    assert seen == ServeSettings.model_fields.keys()
    feedback = SCHEMA["properties"]["feedback"]["properties"]
    assert feedback["dailyCap"] == bounds(FeedbackSettings, "daily_cap")
    assert feedback["holdout"] == bounds(FeedbackSettings, "holdout")
    defaults = FeedbackSettings()
    assert (VALUES["feedback"]["dailyCap"], VALUES["feedback"]["holdout"]) == (defaults.daily_cap, defaults.holdout)
    assert VALUES["deploy"]["timeout"] == DeploySettings().timeout


def test_a_placement_has_the_keys_of_the_pipelines_own():
    from pipelines.placement import Place, Placement, Stage, Toleration

    placement = SCHEMA["properties"]["pipelines"]["properties"]["placement"]["properties"]
    assert placement.keys() == Placement.model_fields.keys()
    assert placement["stages"]["properties"].keys() == set(get_args(Stage))
    place = SCHEMA["definitions"]["place"]["properties"]
    assert place.keys() == Place.model_fields.keys()
    assert place["tolerations"]["items"]["properties"].keys() == Toleration.model_fields.keys()
    gpu = yaml.safe_load((ROOT / "pipelines" / "gpu.yaml").read_text(encoding="utf-8"))
    assert not list(Draft7Validator(SCHEMA).iter_errors(merged(VALUES, {"pipelines": {"placement": gpu}})))


def test_the_readme_is_fresh_and_says_what_every_value_is():
    assert README.read_text(encoding="utf-8") == readme(), "charts/coterie/README.md is stale: python -m charts.readme"
    rows = read_values((CHART / "values.yaml").read_text(encoding="utf-8"))
    assert not [row.key for row in rows if not row.comment]

    def leaves(values, path=""):
        for name, value in values.items():
            key = f"{path}{name}"
            yield from leaves(value, f"{key}.") if isinstance(value, dict) and value else [key]

    told = {row.key for row in rows}
    assert not [leaf for leaf in leaves(VALUES) if not any(leaf == key or leaf.startswith(f"{key}.") for key in told)]


def metrics():
    """Names of the series that router and predictor show, as Prometheus sees them."""
    found = set()
    for file in ("serving/metrics.py", "serving/feedback.py", "src/coterie/feedback/relay.py"):
        text = (ROOT / file).read_text(encoding="utf-8")
        for kind, name in re.findall(r'(Counter|Gauge|Histogram)\(\s*"(coterie_[a-z_]+)"', text):
            found |= {
                "Counter": {f"{name}_total"},
                "Gauge": {name},
                "Histogram": {f"{name}_{part}" for part in ("bucket", "sum", "count")},
            }[kind]
    return found


def test_the_dashboard_asks_for_metrics_that_there_are():
    asked = set(re.findall(r"coterie_[a-z_]+", json.dumps(DASHBOARD)))
    assert asked
    assert asked <= metrics()
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(target["expr"] for panel in panels for target in panel["targets"])


def test_alerts_ask_for_metrics_that_there_are_and_have_a_runbook():
    expressions = re.sub(r"coterie\.[a-zA-Z]+", "", RULES)  # the templates' own names
    asked = set(re.findall(r"\bcoterie_[a-z_]+", expressions))
    assert asked
    assert asked <= metrics()
    alerts = re.findall(r"- alert: (\w+)", RULES)
    links = re.findall(r"runbook_url: \S+ \.rules\.runbook }}#(\w+)", RULES)
    assert links == [alert.lower() for alert in alerts]
    assert set(re.findall(r"^### (\w+)$", OPERATE, re.MULTILINE)) == set(alerts)


def test_the_check_tells_what_is_wrong():
    script = CHART / "files" / "check.py"
    told = {
        "PATH": os.environ["PATH"],
        "ROUTER": "http://nobody.invalid",
        "DEPLOYED": "yes",
        "COTERIE_FEEDBACK_DATABASE": "postgresql+psycopg://coterie@127.0.0.1:9/coterie",
    }
    done = subprocess.run([sys.executable, script], env=told, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "FAILED: ROUTER: RuntimeError: there is no InferenceService" in done.stdout
    assert "FAILED: COTERIE_FEEDBACK_DATABASE: OperationalError" in done.stdout
