"""The digest is hashlib's, in pieces, and names the file it cannot read."""

from __future__ import annotations

import hashlib

import pytest

from shoal.errors import FileError
from shoal.formats import digest


def test_it_is_sha_256_of_the_whole_whatever_the_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(digest, "PIECE", 7)
    for size in (0, 6, 7, 8, 1000):
        path = tmp_path / f"{size}"
        path.write_bytes(bytes(range(256)) * 4 if size == 1000 else b"x" * size)
        assert digest.file_digest(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(FileError, match="cannot be read"):
            digest.file_digest(missing)
