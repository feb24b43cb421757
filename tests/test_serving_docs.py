"""docs/: the OpenAPI document and the schemas are what contracts.py says, and the examples of serving.md work."""

import re
import subprocess

import httpx
import pytest
from jsonschema import Draft202012Validator

from serving.openapi import DOCS, document, files, schemas
from tests.served import make_bundle, publish_profiles, serving

QUESTION = {"worker_id": "w", "prompt": "p", "responses": ["a", "b"]}
TENSORS = [
    {"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["p"]},
    {"name": "response", "shape": [2], "datatype": "BYTES", "data": ["a", "b"]},
]


def test_the_documents_are_not_stale():
    for path, text in files().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is stale: python -m serving.openapi"
    assert {path.name for path in (DOCS / "schemas").iterdir()} == schemas().keys()


def test_the_openapi_document_is_one():
    validator = pytest.importorskip("openapi_spec_validator")
    validator.validate(document())


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    root = tmp_path_factory.mktemp("docs")
    make_bundle(root)
    publish_profiles(root)
    with serving(root) as (_, url, _):
        yield url


def test_questions_and_answers_are_what_the_schemas_say(url):
    made = schemas()
    for name, schema in made.items():
        Draft202012Validator.check_schema(schema)
        assert schema["$schema"], name

    def valid(name, value):
        return Draft202012Validator(made[name]).is_valid(value)

    body = {"instances": [QUESTION], "explain": True, "next_pair": True}
    assert valid("PredictRequest.json", body)
    assert not valid("PredictRequest.json", {"instances": [{"prompt": "p"}]})
    answer = httpx.post(f"{url}/v1/models/coterie:predict", json=body, timeout=60).json()
    assert valid("PredictResponse.json", answer)
    assert valid("Manifest.json", httpx.get(f"{url}/v2/models/coterie/manifest").json())
    infer = {"inputs": TENSORS, "parameters": {"explain": True, "next_pair": True}}
    assert valid("WorkerTensors.json", infer)
    assert not valid("WorkerTensors.json", {"inputs": TENSORS[:1]})
    assert not valid("WorkerTensors.json", {"inputs": [*TENSORS, TENSORS[0] | {"name": "routes"}]})
    assert valid("OutputTensors.json", httpx.post(f"{url}/v2/models/coterie/infer", json=infer).json())


EXAMPLES = re.findall(r"^```bash\n(.*?)^```", (DOCS / "serving.md").read_text(encoding="utf-8"), re.M | re.S)
CURL = [example for example in EXAMPLES if "curl" in example]


@pytest.mark.parametrize("example", CURL, ids=[str(i) for i in range(len(CURL))])
def test_a_curl_example_works(url, example):
    script = "set -euo pipefail\n" + example.replace("curl -s ", "curl -sf ").replace("http://127.0.0.1:8080", url)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_there_are_examples():
    assert len(CURL) == 5
