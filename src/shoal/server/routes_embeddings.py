"""POST /v1/embeddings: the network's final states, pooled and scaled to length 1 (`engine.embedding`).

Decoder models are not trained for this; how good their states are for it varies. `mean` is the usual choice for them.
"""

from __future__ import annotations

import base64
from typing import Any

import anyio.to_thread
import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from shoal.engine import LLM
from shoal.engine.embedding import Embedding, Floats
from shoal.errors import RequestError
from shoal.server.body import read_json
from shoal.server.embedding_job import EmbeddingJob
from shoal.server.protocol import parse_request
from shoal.server.protocol_text import EmbeddingRequest, each_prompt
from shoal.server.service import service_of, whole_answer
from shoal.server.worker import Piece


async def embeddings(request: Request) -> Response:
    body = parse_request(EmbeddingRequest, await read_json(request))
    service = service_of(request)
    llm = service.engine_for(body.model)
    texts = await anyio.to_thread.run_sync(_prepare, llm, body)
    results = service.worker.submit(
        [EmbeddingJob(service.embeddings, llm, texts, body.pooling, service.adapter_of(body.model))]
    )
    found: list[Embedding] = []

    def add(piece: Piece) -> None:
        found.extend(piece[1])

    return await whole_answer(request, results, add, lambda: _answer(body.model or service.name, body, found))


def _prepare(llm: LLM, body: EmbeddingRequest) -> list[list[int]]:
    """Token ids of every text; all that can be wrong shows here."""
    width = llm.config.hidden_size
    if body.dimensions is not None and body.dimensions > width:
        raise RequestError("dimensions", f"must be at most {width}, the model's own width")
    texts = []
    for text in each_prompt(body.input):
        ids = llm.tokenizer.encode(text) if isinstance(text, str) else text
        if not ids:
            raise RequestError("input", "must hold at least one token each")
        if len(ids) > llm.max_embedding:
            problem = f"holds {len(ids)} tokens, which is more than {llm.max_embedding}"
            raise RequestError("input", problem, code="context_length_exceeded")
        if not all(0 <= token < llm.tokenizer.vocab_size for token in ids):
            raise RequestError("input", f"token ids must lie below {llm.tokenizer.vocab_size}")
        texts.append(ids)
    return texts


def _answer(name: str, body: EmbeddingRequest, found: list[Embedding]) -> dict[str, Any]:
    data = [
        {"object": "embedding", "index": index, "embedding": _shown(_cut(embedding.vector, body.dimensions), body)}
        for index, embedding in enumerate(found)
    ]
    tokens = sum(embedding.tokens for embedding in found)
    return {"object": "list", "data": data, "model": name, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}


def _cut(vector: Floats, dimensions: int | None) -> Floats:
    if dimensions is None:
        return vector
    kept = vector[:dimensions]
    return (kept / (np.linalg.norm(kept) or 1.0)).astype(np.float32)


def _shown(vector: Floats, body: EmbeddingRequest) -> str | list[float]:
    """Base64 of little-endian float32, as the OpenAI client asks for by default, or numbers."""
    if body.encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    numbers: list[float] = vector.tolist()
    return numbers
