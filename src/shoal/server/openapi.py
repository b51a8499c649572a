"""`/openapi.json`: the request types as they are checked, and the shapes of answers."""

from __future__ import annotations

import functools
from typing import Any

from pydantic.json_schema import models_json_schema

import shoal
from shoal.server.protocol import Body
from shoal.server.protocol_chat import ChatRequest
from shoal.server.protocol_text import CompletionRequest, DetokenizeRequest, EmbeddingRequest, TokenizeRequest

REF = "#/components/schemas/{model}"
POSTS: dict[str, tuple[type[Body], str, list[str]]] = {
    "/v1/chat/completions": (ChatRequest, "Answer a conversation", ["id", "choices", "usage", "timings"]),
    "/v1/completions": (CompletionRequest, "Continue a text, or score it", ["id", "choices", "usage", "timings"]),
    "/v1/embeddings": (EmbeddingRequest, "Vectors of texts", ["object", "data", "usage"]),
    "/tokenize": (TokenizeRequest, "Text to token ids", ["tokens", "count", "max_model_len"]),
    "/detokenize": (DetokenizeRequest, "Token ids to text", ["prompt", "content"]),
}
GETS = {
    "/v1/models": ("The model that is served", ["object", "data"]),
    "/v1/models/{name}": ("One model by its name", ["id", "object", "created", "owned_by"]),
    "/health": ("200 once the model is loaded", ["status", "running", "waiting"]),
    "/version": ("Shoal's version", ["version"]),
}
# One server-sent event; its data is a chunk as JSON, or [DONE].
EVENT = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
PROBLEMS = {
    "400": "The request is wrong; `param` names the field",
    "401": "No valid key",
    "403": "From another site, or under a foreign name",
    "404": "No such model",
    "408": "The body took too long to arrive, or the answer to write",
    "413": "The body is too large",
    "415": "The body is compressed",
    "429": "The queue is full; `Retry-After` says when to come back",
    "500": "A fault of the server",
    "503": "The model is loading or the server is stopping",
}


@functools.cache
def document() -> dict[str, Any]:
    _, schemas = models_json_schema([(kind, "validation") for kind, _, _ in POSTS.values()], ref_template=REF)
    paths: dict[str, Any] = {}
    for path, (kind, summary, fields) in POSTS.items():
        content = {"application/json": {"schema": {"$ref": REF.format(model=kind.__name__)}}}
        streams = "stream" in kind.model_fields
        operation = _operation(summary, fields, ["400", "408", "413", "415", "429"], streams=streams)
        paths[path] = {"post": {**operation, "requestBody": {"required": True, "content": content}}}
    for path, (summary, fields) in GETS.items():
        operation = _operation(summary, fields, [])
        if "{name}" in path:
            operation["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
        if path == "/health":
            operation["security"] = []
        paths[path] = {"get": operation}
    paths["/metrics"] = {"get": _operation("Prometheus metrics", [], [])}
    paths["/metrics"]["get"]["responses"]["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Shoal", "version": shoal.__version__},
        "paths": paths,
        "components": {
            "schemas": {**schemas["$defs"], "Error": ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _operation(summary: str, fields: list[str], problems: list[str], *, streams: bool = False) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object", "required": fields}}}
    if streams:
        content["text/event-stream"] = {"schema": EVENT}
    responses: dict[str, Any] = {"200": {"description": "Done", "content": content}}
    for status in sorted({*problems, "401", "403", "404", "500", "503"}):
        error = {"application/json": {"schema": {"$ref": REF.format(model="Error")}}}
        responses[status] = {"description": PROBLEMS[status], "content": error}
    return {"summary": summary, "responses": responses}
