"""The paged cache's book-keeping: which page belongs to whom, and which full pages later requests may share.

A page holds the cache of 64 neighbouring tokens in all layers. A full page is known by a digest of its tokens and of
everything before them, so two requests that start alike read the same pages. Pages that nobody uses keep their content
until the space is needed.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

from shoal.engine.plan import PAGE_TOKENS


def page_key(before: bytes, tokens: Sequence[int]) -> bytes:
    """What a full page is known by: its own tokens and, through the key of the page before (empty for the first),
    all earlier ones. 256 bits, so that nobody can craft a prompt that is mistaken for another."""
    assert len(tokens) == PAGE_TOKENS
    return hashlib.blake2b(before + np.asarray(tokens, np.int32).tobytes(), digest_size=32).digest()


class PagePool:
    """Pages 0 … count − 1 with reference counts and a least-recently-used order of the shareable idle ones."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._uses = [0] * count
        self._key_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Pages that can be handed out now, idle shareable ones included."""
        return len(self._free) + len(self._idle)

    def take(self) -> int | None:
        """A page of unknown content, or None when all are in use."""
        if self._free:
            page = self._free.pop()
        elif self._idle:
            page, _ = self._idle.popitem(last=False)
            del self._page_of[self._key_of.pop(page)]
        else:
            return None
        self._uses[page] = 1
        return page

    def release(self, pages: Iterable[int]) -> None:
        """Give back pages in the order of a text. Later ones are forgotten first: without the beginning of a text its
        continuation is of no use."""
        for page in reversed(list(pages)):
            assert self._uses[page] > 0
            self._uses[page] -= 1
            if self._uses[page] > 0:
                continue
            if page in self._key_of:
                self._idle[page] = None
            else:
                self._free.append(page)

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The pages that hold the longest known beginning of a text."""
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more user of pages that `find` gave."""
        for page in pages:
            self._uses[page] += 1
            self._idle.pop(page, None)

    def publish(self, page: int, key: bytes) -> None:
        """Make a full page findable. If an equal one is known already, this one stays private."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def check(self, held: Iterable[Sequence[int]]) -> None:
        """Assert that the books agree with the pages that sequences hold; for tests."""
        uses = [0] * self.count
        for pages in held:
            assert len(set(pages)) == len(pages)
            for page in pages:
                uses[page] += 1
        assert self._uses == uses
        assert sorted([*self._free, *self._idle]) == [page for page, count in enumerate(uses) if count == 0]
        assert all(page in self._key_of for page in self._idle)
        assert not any(page in self._key_of for page in self._free)
        assert {key: page for page, key in self._key_of.items()} == self._page_of
