"""POST /tokenize and /detokenize, with the field names of vLLM and llama-server."""

from __future__ import annotations

from typing import Any

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import Response

from shoal.engine import LLM
from shoal.errors import RequestError
from shoal.server.body import read_json
from shoal.server.errors import json_response
from shoal.server.protocol import parse_request
from shoal.server.protocol_text import DetokenizeRequest, TokenizeRequest
from shoal.server.routes_chat import chat_ids
from shoal.server.service import service_of


async def tokenize(request: Request) -> Response:
    """Text never becomes a control token, just as in a prompt."""
    body = parse_request(TokenizeRequest, await read_json(request))
    llm = service_of(request).engine_for(body.model)
    return json_response(await anyio.to_thread.run_sync(_tokenize, llm, body))


def _tokenize(llm: LLM, body: TokenizeRequest) -> dict[str, Any]:
    if body.messages is not None:
        ids = chat_ids(llm, body.messages, body.tools or [], {})
    else:
        ids = llm.tokenizer.encode(body.prompt or "", add_bos=None if body.add_special_tokens else False)
    out: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": llm.max_context}
    if body.with_pieces:
        out["pieces"] = [_piece(llm.tokenizer.token_bytes(token)) for token in ids]
    return out


def _piece(raw: bytes) -> str | list[int]:
    """Its text, or its bytes where it is part of a character."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return list(raw)


async def detokenize(request: Request) -> Response:
    body = parse_request(DetokenizeRequest, await read_json(request))
    llm = service_of(request).engine_for(body.model)
    for token in body.tokens:
        if not 0 <= token < llm.tokenizer.vocab_size:
            raise RequestError("tokens", f"must lie from 0 to {llm.tokenizer.vocab_size - 1}, got {token}")
    text = await anyio.to_thread.run_sync(lambda: llm.tokenizer.decode(body.tokens, skip_special=False))
    return json_response({"prompt": text, "content": text})
