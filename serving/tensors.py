"""Requests and predictions as tensors of the Open Inference Protocol (contracts.INPUT_TENSORS and OUTPUT_TENSORS)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
from kserve import InferInput, InferOutput, InferRequest, InferResponse
from kserve.utils.numpy_codec import to_np_dtype

from coterie.contracts import OUTPUT_TENSORS, Prediction, RoutedRequest
from serving.failures import Refused

_JSON = ("comparisons", "routes")  # a text of JSON an instance
_FLAGS = ("explain", "next_pair")


def metadata(tensors: dict[str, tuple[str, list[int]]]) -> list[dict[str, Any]]:
    """What the protocol's model metadata says of tensors."""
    return [{"name": name, "datatype": kind, "shape": shape} for name, (kind, shape) in tensors.items()]


def read_request(request: InferRequest, tensors: dict[str, tuple[str, list[int]]]) -> dict[str, Any]:
    """The V1 body that says the same as `request`; `tensors` are those that the model knows.

    Raises:
        Refused: a tensor that is not known, missing, of another type, or of another length than the others.
    """
    try:
        (request.id or "").encode()
    except UnicodeError:
        raise Refused("id: not a text in UTF-8") from None
    given: dict[str, list[Any]] = {}
    for tensor in request.inputs:
        if tensor.name not in tensors or tensor.name in given:
            what = "twice" if tensor.name in given else f"no input of this model; it has {', '.join(tensors)}"
            raise Refused(f"{tensor.name[:60]}: {what}")
        given[tensor.name] = _values(tensor, tensors[tensor.name][0])
    for output in request.request_outputs or []:
        if output.name not in OUTPUT_TENSORS:
            raise Refused(f"{output.name[:60]}: no output of this model; it has {', '.join(OUTPUT_TENSORS)}")
    for name in ("prompt", "response"):
        if name not in given:
            raise Refused(f"{name}: this input is missing")
    prompts, responses = given["prompt"], given["response"]
    counts = given.get("response_count", [len(responses)] if len(prompts) == 1 else [])
    for name in given.keys() - {"response", "response_count"}:
        if len(given[name]) != len(prompts):
            raise Refused(f"{name}: {len(given[name])} values for {len(prompts)} prompts")
    if len(counts) != len(prompts) or min(counts, default=0) < 0 or sum(counts) != len(responses):
        raise Refused(
            f"response_count: give one number a prompt, how many of the {len(responses)} responses are that prompt's"
        )
    instances, end = [], 0
    for i, prompt in enumerate(prompts):
        start, end = end, end + counts[i]
        instance: dict[str, Any] = {"prompt": prompt, "responses": responses[start:end]}
        if given.get("worker_id", [""] * len(prompts))[i]:
            instance["worker_id"] = given["worker_id"][i]
        for name in _JSON:
            if name in given and given[name][i]:
                instance[name] = _json(name, given[name][i])
        instances.append(instance)
    return {"instances": instances} | _flags(request)


def write_request(name: str, request: RoutedRequest, binary: bool) -> InferRequest:
    """A router's request as tensors: `binary` for gRPC, else as JSON."""
    asked = request.instances
    columns: dict[str, tuple[str, list[Any]]] = {
        "prompt": ("BYTES", [one.prompt for one in asked]),
        "response": ("BYTES", [text for one in asked for text in one.responses]),
        "response_count": ("INT32", [len(one.responses) for one in asked]),
        "comparisons": ("BYTES", [_dumps([example.model_dump() for example in one.comparisons]) for one in asked]),
        "routes": ("BYTES", [_dumps([route.model_dump() for route in one.routes]) for one in asked]),
    }
    inputs = []
    for column, (kind, values) in columns.items():
        data = np.array([text.encode() for text in values], dtype=np.object_) if kind == "BYTES" else np.int32(values)
        tensor = InferInput(column, [len(values)], kind)
        tensor.set_data_from_numpy(data, binary_data=binary)
        inputs.append(tensor)
    return InferRequest(name, inputs, parameters={flag: getattr(request, flag) for flag in _FLAGS})


def write_response(name: str, request: InferRequest, predictions: Sequence[Prediction]) -> InferResponse:
    """Predictions as the answer to `request`, with the outputs that it asks for, or all."""
    width = max((len(one.posterior) for one in predictions if one.posterior is not None), default=0)
    columns: dict[str, Any] = {
        "score": [score for one in predictions for score in one.scores],
        "response_count": [len(one.scores) for one in predictions],
        "best": [one.best for one in predictions],
        "coterie": [-1 if one.coterie is None else one.coterie for one in predictions],
        "posterior": [one.posterior or [0.0] * width for one in predictions],
        "source": [one.source for one in predictions],
        "reason": [one.reason or "" for one in predictions],
        "model_version": [one.model_version for one in predictions],
        "mixture_version": [one.mixture_version for one in predictions],
    }
    if any(one.next_pair for one in predictions):
        columns["next_pair"] = [one.next_pair or (-1, -1) for one in predictions]
    if any(one.explanation for one in predictions):
        columns["explanation"] = [one.explanation.model_dump_json() if one.explanation else "" for one in predictions]
    wanted = [output.name for output in request.request_outputs or []]
    outputs = []
    for column, values in columns.items():
        if wanted and column not in wanted:
            continue
        kind = OUTPUT_TENSORS[column][0]
        texts = kind == "BYTES"
        data = np.array(
            [text.encode() for text in values] if texts else values, np.object_ if texts else to_np_dtype(kind)
        )
        tensor = InferOutput(column, list(data.shape), kind)
        tensor.set_data_from_numpy(data, binary_data=request.use_binary_outputs)
        outputs.append(tensor)
    return InferResponse(
        request.id or "",
        name,
        outputs,
        model_version=predictions[0].model_version,
        use_binary_outputs=request.use_binary_outputs,
        requested_outputs=[output for output in request.request_outputs or [] if output.name in columns],
    )


def read_response(response: InferResponse) -> list[Prediction]:
    """The predictions that `write_response` made, from all of its outputs."""
    given = {tensor.name: _values(tensor, OUTPUT_TENSORS[tensor.name][0], flat=False) for tensor in response.outputs}
    explanations = given.get("explanation", [""] * len(given["best"]))
    pairs = given.get("next_pair", [(-1, -1)] * len(given["best"]))
    counts = given["response_count"]
    predictions, end = [], 0
    for i, count in enumerate(counts):
        start, end = end, end + count
        predictions.append(
            Prediction(
                scores=given["score"][start:end],
                best=given["best"][i],
                coterie=None if given["coterie"][i] < 0 else given["coterie"][i],
                posterior=given["posterior"][i] if given["coterie"][i] >= 0 else None,
                source=given["source"][i],
                reason=given["reason"][i] or None,
                model_version=given["model_version"][i],
                mixture_version=given["mixture_version"][i],
                next_pair=None if pairs[i][0] < 0 else tuple(pairs[i]),
                explanation=_json("explanation", explanations[i]) if explanations[i] else None,
            )
        )
    return predictions


def _values(tensor: InferInput | InferOutput, kind: str, flat: bool = True) -> list[Any]:
    """Values of a tensor, texts decoded. Raises Refused."""
    if tensor.datatype != kind:
        raise Refused(f"{tensor.name}: datatype {tensor.datatype[:20]}, not {kind}")
    try:
        array = tensor.as_numpy()
        if math.prod(tensor.shape) != array.size or min(tensor.shape, default=0) < 0:
            raise ValueError
    except Exception:  # numpy and struct, each with its own
        raise Refused(f"{tensor.name}: the data are not of the shape that is declared, or not {kind}") from None
    values: list[Any] = (array.ravel() if flat else array).tolist()
    if kind != "BYTES":
        return values
    try:
        return [text.decode() if isinstance(text, bytes) else _text(text) for text in values]
    except (UnicodeError, TypeError):
        raise Refused(f"{tensor.name}: not texts in UTF-8") from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    value.encode()  # a lone surrogate is no text
    return value


def _json(name: str, text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        raise Refused(f"{name}: not JSON") from None


def _dumps(value: Any) -> str:
    return orjson.dumps(value).decode()


def _flags(request: InferRequest) -> dict[str, Any]:
    parameters = request.parameters or {}
    found = {flag: parameters[flag] for flag in _FLAGS if flag in parameters}
    return {flag: getattr(value, "bool_param", value) for flag, value in found.items()}  # gRPC's have a type each
