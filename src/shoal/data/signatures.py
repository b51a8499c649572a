"""What duplicates are known by: a digest of the text, and MinHash values of its runs of five words (rensa)."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shoal.data.document import Document
from shoal.data.views import ngram_hashes, rensa, token_hashes
from shoal.formats.atomic import atomic_file

SHINGLE = 5  # words
BANDS, ROWS = 24, 5  # two documents meet if one band of rows agrees: 99% of pairs of similarity 0.7 do
VALUES = BANDS * ROWS
BATCH_TOKENS = 1 << 17
# A row: 4 words of the exact digest, 1 if there are shingles, the MinHash values.
WIDTH = 4 + 1 + VALUES

Signatures = NDArray[np.uint32]


class Signer:
    """Collects documents and signs them in batches, which is where the speed is."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._done: list[Signatures] = []
        self._digests: list[bytes] = []
        self._shingles: list[NDArray[np.uint64]] = []
        self._pending = 0

    def add(self, document: Document) -> None:
        self._digests.append(hashlib.blake2b(document.text.encode(), digest_size=16).digest())
        shingles = np.sort(ngram_hashes(token_hashes(document), SHINGLE))
        shingles = shingles[np.diff(shingles, prepend=shingles[:1] + np.uint64(1)) != 0]  # each once
        self._shingles.append(shingles)
        self._pending += len(shingles)
        if self._pending >= BATCH_TOKENS:
            self._sign()

    def finish(self) -> Signatures:
        """uint32 [documents, WIDTH]."""
        self._sign()
        return np.concatenate(self._done) if self._done else np.empty((0, WIDTH), np.uint32)

    def _sign(self) -> None:
        if not self._digests:
            return
        out = np.zeros((len(self._digests), WIDTH), np.uint32)
        out[:, :4] = np.frombuffer(b"".join(self._digests), "<u4").reshape(-1, 4)
        lengths = np.array([len(one) for one in self._shingles])
        full = np.flatnonzero(lengths)
        if len(full):
            offsets = [0, *np.cumsum(lengths[full]).tolist()]
            flat = np.concatenate([self._shingles[i] for i in full])
            rows = rensa().RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, VALUES, self._seed).to_rows()
            out[full, 5:] = np.array(rows, np.uint32)
            out[full, 4] = 1
        self._done.append(out)
        self._digests, self._shingles, self._pending = [], [], 0


def save(path: Path, signatures: Signatures) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as out:
        np.save(out, signatures)
