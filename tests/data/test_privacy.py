"""Planted personal data is masked, with recall and precision stated, and ordinary text is left alone."""

from __future__ import annotations

import random

import pytest
from tests.data import texts

from shoal.data.pii import mask

PLANTED = {
    "EMAIL": [
        "jane.doe+news@mail.company.co.uk", "x@y.io", "first_last@sub.domain.org", "_jane@company.org",
        "ümit@bücher.de",
    ],
    "IP": ["8.8.8.8", "93.184.216.34", "2001:4860:4860::8888", "2a00:1450:4001:81b::200e", "2a01::1", "2600::"],
    "KEY": [
        "AKIAIOSFODNN7EXAMPLQ", "ghp_" + "a1B2c3D4e5" * 4, "xoxb-1234567890-abcdefghij", "sk-" + "Ab3" * 10,
        "AIza" + "B" * 35, "glpat-abcdefghij0123456789", "api_key = 'q8Jx2vLmP0zR7tYw4kNs'",
        'password: "h7Gk2Lp9Qw3Zx8Vb"',
    ],
    "CARD": ["4539 1488 0343 6467", "5425-2334-3010-9903", "4539148803436467", "3782 822463 10005"],
    "IBAN": ["DE89 3704 0044 0532 0130 00", "GB82WEST12345698765432", "BE68 5390 0754 7034"],
    "PHONE": ["+49 30 1234567", "+1 (415) 555-2671"],
    "PRIVATE_KEY": ["-----BEGIN RSA PRIVATE KEY-----\nMIIE\nabc=\n-----END RSA PRIVATE KEY-----"],
}  # fmt: skip
HARMLESS = [
    "127.0.0.1", "192.168.0.10", "10.1.2.3", "255.255.255.0", "version 1.2.3.4.5", "user@example.com",
    "4111 1111 1111 1112",
    "12:30:45", "DE89 3704 0044 0532 0130 01", "key = 'configuration_value_name'", "a@b", "0x41414141414141414",
    "x@self.weight", "x@self.weight.T", "a@b.inv()", "git@github.com:user/repo", "sk-toggleable__label-arrow",
    "opencv-python==4.8.0.74", "linux-5.4.0.42.tar.gz", "version 1.2.3.4", "dead::beef::cafe", "fe80::1", "2001:db8::1",
    "3 7 8 2 8 2 2 4 6 3 1 0 0 0 5", "+12.3456789",
    "password = 'changeme'", "std::vector::iterator", "@decorator", "1234567890123456", "2026-11-24 10:00:00",
]  # fmt: skip


@pytest.mark.parametrize(("kind", "value"), [(kind, value) for kind, values in PLANTED.items() for value in values])
def test_planted_data_is_masked(kind, value):
    text, counts = mask(f"Write to {value}, please.\nThe next line stays.")
    assert counts == {kind: 1}
    assert f"<{kind}>" in text
    assert text.endswith("The next line stays.")
    secret = value.split(" = ")[-1].split(": ")[-1].strip("'\"")
    assert secret not in text


@pytest.mark.parametrize("value", HARMLESS)
def test_what_belongs_to_nobody_stays(value):
    assert mask(f"We saw {value} there.") == (f"We saw {value} there.", {})


def test_words_in_capitals_after_an_account_number():
    text, counts = mask("Pay to BE68 5390 0754 7034 BIC GKCCBEBB by Friday.")
    assert (text, counts) == ("Pay to <IBAN> BIC GKCCBEBB by Friday.", {"IBAN": 1})


def test_recall_and_precision_in_running_text():
    rng = random.Random(5)
    values = [(kind, value) for kind, rows in PLANTED.items() for value in rows if kind != "PRIVATE_KEY"]
    hits = planted = 0
    for text in texts.english()[:100]:
        clean = mask(text)[1].total()
        words = text.split()
        kind, value = rng.choice(values)
        words.insert(rng.randrange(len(words)), value)
        planted += 1
        hits += mask(" ".join(words))[1][kind] > mask(text)[1][kind]
        assert clean == 0, mask(text)
    assert hits == planted  # recall 1; precision 1: nothing in 100 texts of a language reference is touched


def test_code_of_the_standard_library_is_nearly_untouched():
    counts = [mask(text)[1] for text in texts.code().values()]
    touched = sum(row.total() - row["EMAIL"] for row in counts)  # authors' addresses are there and are masked
    assert len(counts) > 50
    assert touched <= 6  # four addresses that really stand there, two section numbers of a standard
