"""The book-keeping of cache pages."""

from __future__ import annotations

import pytest

from shoal.engine.pages import PagePool, page_key
from shoal.engine.plan import PAGE_TOKENS

PAGE = list(range(PAGE_TOKENS))


def keys(count: int, salt: int = 0) -> list[bytes]:
    out: list[bytes] = []
    for index in range(count):
        out.append(page_key(out[-1] if out else b"", [salt + index] * PAGE_TOKENS))
    return out


def take(pool: PagePool, count: int) -> list[int]:
    pages = [pool.take() for _ in range(count)]
    assert None not in pages
    return pages  # type: ignore[return-value]


def fill(pool: PagePool, names: list[bytes]) -> list[int]:
    pages = take(pool, len(names))
    for page, key in zip(pages, names, strict=True):
        pool.publish(page, key)
    return pages


def test_a_key_stands_for_the_page_and_everything_before_it() -> None:
    first = page_key(b"", PAGE)
    assert page_key(b"", list(PAGE)) == first
    assert page_key(first, PAGE) != first
    assert page_key(b"", PAGE[::-1]) != first
    assert page_key(page_key(b"", PAGE[::-1]), PAGE) != page_key(first, PAGE)
    assert len(first) == 32


def test_pages_are_handed_out_once_and_run_out() -> None:
    pool = PagePool(3)
    pages = take(pool, 3)
    assert sorted(pages) == [0, 1, 2]
    assert pool.take() is None
    assert pool.available == 0
    pool.release(pages[:1])
    assert pool.take() == pages[0]
    pool.check([pages])


def test_a_page_is_free_when_its_last_user_has_left() -> None:
    pool = PagePool(2)
    (page,) = fill(pool, keys(1))
    pool.share([page])
    pool.release([page])
    assert pool.available == 1
    pool.check([[page]])
    pool.release([page])
    assert pool.available == 2
    with pytest.raises(AssertionError):
        pool.release([page])


def test_idle_pages_are_found_until_they_are_needed() -> None:
    pool = PagePool(3)
    names = keys(2)
    pages = fill(pool, names)
    pool.release(pages)
    assert pool.find(names) == pages
    assert pool.find([keys(1, salt=9)[0], *names]) == []  # from the beginning only
    take(pool, 1)  # the one that was never used
    assert pool.find(names) == pages
    pool.check([[2]])


def test_the_end_of_the_longest_unused_text_is_forgotten_first() -> None:
    pool = PagePool(4)
    old, new = keys(2), keys(2, salt=50)
    old_pages, new_pages = fill(pool, old), fill(pool, new)
    pool.release(old_pages)
    pool.release(new_pages)
    found = pool.find(old)
    pool.share(found)  # used again: now the other one is older
    pool.release(found)
    take(pool, 1)
    assert pool.find(new) == new_pages[:1]
    take(pool, 1)
    assert pool.find(new) == []
    assert pool.find(old) == old_pages
    take(pool, 1)
    assert pool.find(old) == old_pages[:1]


def test_a_second_copy_of_a_page_stays_private() -> None:
    pool = PagePool(2)
    names = keys(1)
    first, second = fill(pool, names)[0], fill(pool, names)[0]
    assert pool.find(names) == [first]
    pool.release([second])
    assert pool.take() == second  # not kept: it is of no use to anyone
    pool.check([[first], [second]])


def test_a_page_keeps_its_first_name() -> None:
    pool = PagePool(1)
    one, other = keys(1), keys(1, salt=9)
    (page,) = fill(pool, one)
    pool.publish(page, other[0])
    assert pool.find(one) == [page]
    assert pool.find(other) == []
    pool.check([[page]])
