"""The paged cache's book-keeping: which page belongs to whom, and which full pages later requests may share.

A page holds the cache of 64 neighbouring tokens in all layers. A full page is known by its tokens and everything before
them, so two requests that start alike read the same pages. Pages that nobody uses keep their content until needed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from shoal.engine.plan import PAGE_TOKENS

PrefixKey = tuple[object, tuple[int, ...]]  # (key of the page before, own tokens)


class PagePool:
    """Pages 0 … count − 1 with reference counts and a least-recently-used order of the shareable idle ones."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._uses = [0] * count
        self._key_of: dict[int, PrefixKey] = {}
        self._page_of: dict[PrefixKey, int] = {}
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

    def release(self, page: int) -> None:
        self._uses[page] -= 1
        if self._uses[page] > 0:
            return
        if page in self._key_of:
            self._idle[page] = None
        else:
            self._free.append(page)

    def share(self, tokens: Sequence[int]) -> tuple[list[int], PrefixKey | None]:
        """Pages that already hold the longest prefix of `tokens` (whole pages, at least one token left over), now in
        use by the caller too, and the key of the last one."""
        pages: list[int] = []
        key: PrefixKey | None = None
        for start in range(0, (len(tokens) - 1) // PAGE_TOKENS * PAGE_TOKENS, PAGE_TOKENS):
            next_key: PrefixKey = (_short(key), tuple(tokens[start : start + PAGE_TOKENS]))
            page = self._page_of.get(next_key)
            if page is None:
                break
            self._uses[page] += 1
            self._idle.pop(page, None)
            pages.append(page)
            key = next_key
        return pages, key

    def publish(self, page: int, before: PrefixKey | None, tokens: Sequence[int]) -> PrefixKey:
        """Make a full page findable. If an equal one is known already, this one stays private."""
        key: PrefixKey = (_short(before), tuple(tokens))
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key
        return key


def _short(key: PrefixKey | None) -> object:
    """A chain of keys would nest without end; what stands for everything before is a 128-bit digest."""
    if key is None:
        return None
    import hashlib

    return hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
