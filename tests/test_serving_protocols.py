"""V1, the Open Inference Protocol over REST and over gRPC: the same questions, the same answers, the same refusals."""

import asyncio
import json

import grpc
import httpx
import numpy as np
import orjson
import pytest

from coterie import contracts
from coterie.bundle import Bundle
from coterie.scoring import Scorer
from tests.served import HashingEncoder, grpc_address, make_bundle, publish_profiles, serving

PROMPT = "Shall I take the earlier train?"
RESPONSES = ["Yes.", "No! Take the later one, perhaps; it is emptier.", "That depends.\n- cost\n- comfort"]
EXAMPLES = [{"prompt": PROMPT, "chosen": "boat early.", "rejected": "cheap train!"}]
QUESTIONS = [
    {"worker_id": "ann", "prompt": PROMPT, "responses": RESPONSES},
    {"worker_id": "nobody", "prompt": "🙂\n", "responses": RESPONSES[:1], "comparisons": EXAMPLES},
    {"prompt": "", "responses": ["", "a\u202e"]},
    {"worker_id": "émile 🙂", "prompt": PROMPT, "responses": RESPONSES[1:]},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("protocols")
    make_bundle(root)
    publish_profiles(root)
    return root


@pytest.fixture(scope="module")
def server(run):
    with serving(run) as (_, url, log):
        yield url, grpc_address(log)


def columns(questions):
    """Questions as tensors of text and numbers."""
    return {
        "prompt": [q["prompt"] for q in questions],
        "worker_id": [q.get("worker_id", "") for q in questions],
        "response": [text for q in questions for text in q["responses"]],
        "response_count": [len(q["responses"]) for q in questions],
        "comparisons": [orjson.dumps(q["comparisons"]).decode() if "comparisons" in q else "" for q in questions],
    }


def kind(name):
    return contracts.WORKER_TENSORS[name][0]


def infer_body(questions, **parameters):
    inputs = [
        {"name": name, "shape": [len(values)], "datatype": kind(name), "data": values}
        for name, values in columns(questions).items()
    ]
    return {"inputs": inputs, "parameters": parameters}


def infer_request(questions, raw=True, **parameters):
    from kserve import InferInput, InferRequest

    inputs = []
    for name, values in columns(questions).items():
        data = [value.encode() for value in values] if kind(name) == "BYTES" else values
        tensor = InferInput(name, [len(values)], kind(name), data=None if raw else data)
        if raw:
            tensor.set_data_from_numpy(np.array(data, dtype=object if kind(name) == "BYTES" else np.int32))
        inputs.append(tensor)
    return InferRequest("coterie", inputs, parameters=parameters)


def over_grpc(address, request, headers=()):
    from kserve import InferenceGRPCClient

    async def ask():
        return await InferenceGRPCClient(address).infer(request, headers=headers)

    return asyncio.run(ask())


def outputs_of(body):
    """Outputs of a V2 answer by name, in their shapes."""
    return {
        one["name"]: np.array(one["data"], dtype=object if one["datatype"] == "BYTES" else None).reshape(one["shape"])
        for one in body["outputs"]
    }


def as_columns(predictions):
    """What a V2 answer to the same questions says."""
    return {
        "score": [score for p in predictions for score in p["scores"]],
        "response_count": [len(p["scores"]) for p in predictions],
        "best": [p["best"] for p in predictions],
        "coterie": [-1 if p["coterie"] is None else p["coterie"] for p in predictions],
        "posterior": [p["posterior"] or [0.0] * 3 for p in predictions],
        "source": [p["source"] for p in predictions],
        "reason": [p["reason"] or "" for p in predictions],
        "model_version": [p["model_version"] for p in predictions],
        "mixture_version": [p["mixture_version"] for p in predictions],
        "next_pair": [p["next_pair"] or [-1, -1] for p in predictions],
        "explanation": [p["explanation"] for p in predictions],
    }


def test_the_protocols_give_the_same_answers(server, run):
    url, address = server
    body = {"instances": QUESTIONS, "explain": True, "next_pair": True}
    v1 = httpx.post(f"{url}/v1/models/coterie:predict", json=body, timeout=60).json()["predictions"]
    assert [p["source"] for p in v1] == ["profile", "comparisons", "global", "profile"]
    expected = as_columns(v1)

    rest = httpx.post(
        f"{url}/v2/models/coterie/infer", json=infer_body(QUESTIONS, explain=True, next_pair=True), timeout=60
    ).json()
    found = outputs_of(rest)
    flags = {"explain": True, "next_pair": True}
    of_grpc = [over_grpc(address, infer_request(QUESTIONS, raw, **flags)) for raw in (True, False)]
    assert found.keys() == contracts.OUTPUT_TENSORS.keys()
    for name, values in expected.items():
        told = [found[name]] + [next(o for o in r.outputs if o.name == name).as_numpy() for r in of_grpc]
        assert len(told) == 3
        for array in told:
            if name == "explanation":
                assert [json.loads(text) for text in array] == values
            elif array.dtype == object:
                assert [t.decode() if isinstance(t, bytes) else t for t in array] == values
            else:
                np.testing.assert_allclose(array, values, rtol=1e-12)
    # And they are those of the library, asked without a server.
    offline = Scorer(Bundle.load(run / "bundle"), HashingEncoder())
    np.testing.assert_allclose(v1[2]["scores"], offline.score("", ["", "a\u202e"]).by_global, atol=1e-6)
    placed = offline.place([contracts.Example(**EXAMPLES[0])])
    np.testing.assert_allclose(v1[1]["posterior"], placed.posterior)


def test_an_explanation_says_each_coteries_scores_and_every_reason(server, run):
    body = {"instances": QUESTIONS, "explain": True}
    answers = httpx.post(f"{server[0]}/v1/models/coterie:predict", json=body, timeout=60).json()["predictions"]
    offline = Scorer(Bundle.load(run / "bundle"), HashingEncoder()).score(PROMPT, RESPONSES)
    known, placed, stranger, _ = (answer["explanation"] for answer in answers)
    np.testing.assert_allclose(np.transpose([c["scores"] for c in known["coteries"]]), offline.by_coterie, atol=1e-6)
    np.testing.assert_allclose(known["by_global"], offline.by_global, atol=1e-6)
    assert [c["serves"] for c in known["coteries"]] == ["own", "own", "global"]
    assert sum(c["share"] for c in known["coteries"]) == pytest.approx(1)
    assert known["refused"] == []
    assert placed["refused"] == [{"mixture_version": None, "reason": "unknown-worker"}]
    assert stranger["refused"] == [{"mixture_version": None, "reason": "no-worker"}]
    assert {c["share"] for c in stranger["coteries"]} == {None}
    unasked = httpx.post(f"{server[0]}/v1/models/coterie:predict", json={"instances": QUESTIONS}).json()["predictions"]
    assert {p["explanation"] for p in unasked} == {p["next_pair"] for p in unasked} == {None}
    verb = httpx.post(f"{server[0]}/v1/models/coterie:explain", json={"instances": QUESTIONS}).json()["predictions"]
    assert verb[0]["explanation"] == known


def test_the_next_pair_is_the_one_that_tells_the_coteries_apart(server, run):
    from coterie.discovery.mixture import MixtureReward
    from coterie.discovery.newcomers import next_pair

    question = {"prompt": PROMPT, "responses": [*RESPONSES, RESPONSES[0]]}
    body = {"instances": [question], "next_pair": True}
    (answer,) = httpx.post(f"{server[0]}/v1/models/coterie:predict", json=body).json()["predictions"]
    scorer, mixture = Scorer(Bundle.load(run / "bundle"), HashingEncoder()), None
    mixture = MixtureReward.load(run / "bundle" / contracts.MIXTURE_FILE)
    h = scorer.features([PROMPT] * 4, question["responses"])
    i, j = answer["next_pair"]
    _, all_pairs = next_pair(mixture.weights_, mixture.theta_, (h[:, None] - h[None]).reshape(16, -1))
    _, this = next_pair(mixture.weights_, mixture.theta_, (h[i] - h[j])[None])
    assert this[0] == pytest.approx(all_pairs.max())
    assert this[0] > 0


def test_metadata_names_the_tensors(server):
    for model, tensors in (("coterie", contracts.WORKER_TENSORS), ("coterie-predictor", contracts.ROUTE_TENSORS)):
        told = httpx.get(f"{server[0]}/v2/models/{model}").json()
        assert {i["name"]: (i["datatype"], i["shape"]) for i in told["inputs"]} == tensors
        assert {o["name"]: (o["datatype"], o["shape"]) for o in told["outputs"]} == contracts.OUTPUT_TENSORS


# ------------------------------------------------------------------------------------------------------------- refusals
def changed(**changes):
    """A V2 body with one input changed: its data, shape and datatype."""
    body = infer_body(QUESTIONS)
    for one in body["inputs"]:
        one |= changes.get(one["name"], {})
    return body


BAD = {
    "a shape that the data have not": (changed(prompt={"shape": [3]}), "prompt: the data are not of the shape"),
    "a negative shape": (changed(prompt={"shape": [-1]}), "prompt: the data are not of the shape"),
    "another datatype": (changed(response_count={"datatype": "FP32"}), "response_count: datatype FP32, not INT32"),
    "numbers for texts": (changed(prompt={"data": [1, 2, 3, 4]}), "prompt: not texts"),
    "counts that do not add up": (changed(response_count={"data": [1, 1, 1, 1]}), "the 8 responses"),
    "a negative count": (changed(response_count={"data": [9, -1, 0, 0]}), "the 8 responses"),
    "no responses of one": (changed(response_count={"data": [4, 4, 0, 0]}), "instances[2].responses: list should"),
    "too few workers": (changed(worker_id={"data": ["a"], "shape": [1]}), "worker_id: 1 values for 4 prompts"),
    "comparisons no JSON": (changed(comparisons={"data": ["{"] * 4}), "comparisons: not JSON"),
    "comparisons no comparisons": (changed(comparisons={"data": ['[{"a": 1}]'] * 4}), "instances[0].comparisons[0].pr"),
    "an input that is none": (changed(prompt={"name": "posterior"}), "posterior: no input of this model"),
    "an input twice": (changed(worker_id={"name": "prompt"}), "prompt: twice"),
    "nothing": ({"inputs": []}, "prompt: this input is missing"),
    "inputs no list": ({"inputs": 3}, "inputs: input should be a valid list"),
    "no object": ([1], "input should be"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_v2_request_is_told_what_where_and_nothing_more(server, name):
    body, words = BAD[name]
    response = httpx.post(f"{server[0]}/v2/models/coterie/infer", json=body)
    assert response.status_code == 400
    said = response.json()["error"]
    assert words.lower() in said.lower()
    assert len(said) < 900
    assert "Traceback" not in said


def test_grpc_refuses_with_the_same_words_and_its_own_status(server):
    from kserve import InferRequest

    full = infer_request(QUESTIONS)
    lacking = InferRequest("coterie", [i for i in full.inputs if i.name != "response"])
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        over_grpc(server[1], lacking)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.value.details() == "response: this input is missing"
    full.inputs[0]._raw_data = b"\xff\xff\xff\x7fabc"  # a length that is not there
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        over_grpc(server[1], full)
    assert refused.value.details().startswith("prompt: the data are not of the shape")
    with pytest.raises(grpc.aio.AioRpcError) as unknown:
        over_grpc(server[1], InferRequest("nothing", []))
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND


ODD = {
    "deep": ("/v2/models/coterie/infer", b"[" * 100_000, 400),
    "no UTF-8": ("/v2/models/coterie/infer", b"\xff\xfe", 400),
    "a lone surrogate in the id": ("/v2/models/coterie/infer", infer_body(QUESTIONS) | {"id": "\ud800"}, 400),
    "a lone surrogate for a field": ("/v2/models/coterie/infer", infer_body(QUESTIONS, **{"\ud800": [1]}), 400),
    "a flag that is none": ("/v2/models/coterie/infer", infer_body(QUESTIONS, explain="x"), 400),
    "an output that is none": (
        "/v2/models/coterie/infer",
        infer_body(QUESTIONS) | {"outputs": [{"name": "x"}]},
        400,
    ),
    "a version": ("/v2/models/coterie/versions/3/infer", infer_body(QUESTIONS), 404),
    "a model that is no text": ("/v1/models/%ff:predict", {"instances": QUESTIONS}, 404),
    "half a cloud event": ("/v1/models/coterie:predict", {"specversion": "1.0", "data": {}}, 400),
    "a repository's model": ("/v2/repository/models/%F0/load", b"", 404),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_requests_are_the_askers_fault(client, name):
    path, body, status = ODD[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = client.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code == status
    assert response.json()["error"]
    assert "Traceback" not in response.text


def test_outputs_come_in_the_form_that_was_asked_for(client):
    body = infer_body(QUESTIONS) | {"outputs": [{"name": "best"}, {"name": "score"}]}
    plain = client.post("/v2/models/coterie/infer", json=body).json()
    assert [one["name"] for one in plain["outputs"]] == ["best", "score"]
    binary = client.post("/v2/models/coterie/infer", json=infer_body(QUESTIONS, binary_data_output=True))
    from kserve import InferResponse

    made = InferResponse.from_bytes(binary.content, int(binary.headers["inference-header-content-length"]))
    scores = next(one for one in made.outputs if one.name == "score").as_numpy()
    np.testing.assert_array_equal(scores, plain["outputs"][1]["data"])


def test_a_binary_body_that_is_none_is_a_bad_request(server):
    for length in ("soon", "-1", "5", "99"):
        headers = {"inference-header-content-length": length, "content-type": "application/octet-stream"}
        response = httpx.post(f"{server[0]}/v2/models/coterie/infer", content=b'{"inputs": 1}', headers=headers)
        assert response.status_code == 400
        assert "Traceback" not in response.text


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=server[0], timeout=60) as client:
        yield client
