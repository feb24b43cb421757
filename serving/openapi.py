"""docs/openapi.json and docs/schemas/: what the router answers, made of contracts.py.

    python -m serving.openapi

writes them; a test fails where they are stale.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from coterie import __version__
from coterie.contracts import (
    OUTPUT_TENSORS,
    ROUTE_TENSORS,
    WORKER_TENSORS,
    Manifest,
    PredictRequest,
    PredictResponse,
    RoutedRequest,
    write_text,
)

DOCS = Path(__file__).parents[1] / "docs"
_SHOWN: tuple[type[BaseModel], ...] = (PredictRequest, PredictResponse, RoutedRequest, Manifest)
_REFUSALS = {
    "400": "The request is wrong: which instance, which field, what is wrong with it.",
    "401": "No token, or a wrong one.",
    "404": "There is no such model.",
    "413": "The body is too large.",
    "429": "Too many texts wait already; Retry-After says when to come back.",
    "503": "Not ready, or something behind does not answer.",
    "504": "The request's time is over.",
}
_ERROR = {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]}


def document() -> dict[str, Any]:
    """The OpenAPI document of the router and of the repository API."""
    _, schemas = models_json_schema(
        [(kind, "validation") for kind in _SHOWN], ref_template="#/components/schemas/{model}"
    )
    error = {"$ref": "#/components/schemas/Error"}
    failures = {
        status: {"description": words, "content": {"application/json": {"schema": error}}}
        for status, words in _REFUSALS.items()
    }

    def operation(summary: str, answer: dict[str, Any], body: dict[str, Any] | None = None) -> dict[str, Any]:
        told = {"200": {"description": "The answer.", "content": {"application/json": {"schema": answer}}}} | failures
        asked = {"requestBody": {"required": True, "content": {"application/json": {"schema": body}}}} if body else {}
        return {"summary": summary, "responses": told, **asked}

    def reference(kind: type[BaseModel]) -> dict[str, str]:
        return {"$ref": f"#/components/schemas/{kind.__name__}"}

    name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "default": "coterie"}}
    paths: dict[str, dict[str, Any]] = {
        "/v1/models/{model}:predict": {
            "post": operation(
                "Score responses as a person would", reference(PredictResponse), reference(PredictRequest)
            )
        },
        "/v1/models/{model}:explain": {
            "post": operation("The same with explain: true", reference(PredictResponse), reference(PredictRequest))
        },
        "/v2/models/{model}/infer": {
            "post": operation(
                "The same in the Open Inference Protocol",
                {"$ref": "#/components/schemas/InferResponse"},
                {"$ref": "#/components/schemas/InferRequest"},
            )
        },
        "/v2/models/{model}/ready": {
            "get": operation("Whether it can answer: the readiness probe", {"type": "object"})
        },
        "/v2/models/{model}/manifest": {"get": operation("Which bundle answers", reference(Manifest))},
        "/v2/repository/models/{model}/load": {
            "post": operation("Serve the bundle that lies in the folder now", {"type": "object"})
        },
        "/v2/repository/models/{model}/unload": {"post": operation("Serve nothing", {"type": "object"})},
    }
    for path in paths.values():
        path["parameters"] = [name]
    paths["/v2/health/live"] = {"get": operation("Whether the process lives: the liveness probe", {"type": "object"})}
    schemas["$defs"] |= {
        "Error": _ERROR,
        "InferRequest": _message("inputs", WORKER_TENSORS, ["prompt", "response"]),
        "InferResponse": _message("outputs", OUTPUT_TENSORS, []),
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "coterie", "version": __version__, "license": {"name": "Apache-2.0"}},
        "paths": paths,
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"token": []}],
    }


def schemas() -> dict[str, dict[str, Any]]:
    """JSON Schemas by file name: the bodies, the manifest, and the tensors of the Open Inference Protocol."""
    tensors = {"WorkerTensors": WORKER_TENSORS, "RouteTensors": ROUTE_TENSORS}
    found = {kind.__name__: kind.model_json_schema() for kind in _SHOWN}
    found |= {name: _message("inputs", of, ["prompt", "response"]) for name, of in tensors.items()}
    found["OutputTensors"] = _message("outputs", OUTPUT_TENSORS, [])
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return {f"{name}.json": dialect | schema for name, schema in found.items()}


def files() -> dict[Path, str]:
    """Every file with its text."""
    made = {DOCS / "openapi.json": document()} | {DOCS / "schemas" / name: one for name, one in schemas().items()}
    options = orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE
    return {path: orjson.dumps(content, option=options).decode() for path, content in made.items()}


def _message(side: str, tensors: dict[str, tuple[str, list[int]]], required: list[str]) -> dict[str, Any]:
    """A message of the protocol: each tensor with its name, datatype and number of dimensions."""
    kinds = [
        {
            "properties": {
                "name": {"const": name},
                "datatype": {"const": kind},
                "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": len(shape)},
                "data": {"type": "array"},
            },
            "required": ["name", "datatype", "shape", "data"],
        }
        for name, (kind, shape) in tensors.items()
    ]
    present = [{"contains": {"properties": {"name": {"const": name}}}} for name in required]
    listed: dict[str, Any] = {"type": "array", "items": {"anyOf": kinds}}
    flags = {"type": "object", "properties": {flag: {"type": "boolean"} for flag in ("explain", "next_pair")}}
    return {
        "type": "object",
        "properties": {side: listed | ({"allOf": present} if present else {}), "id": {"type": "string"}}
        | ({"parameters": flags} if side == "inputs" else {}),
        "required": [side],
    }


if __name__ == "__main__":
    for path, text in files().items():
        write_text(path, text)
        print(path.relative_to(DOCS.parent))
