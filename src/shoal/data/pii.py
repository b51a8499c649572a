"""Personal data and secrets in text, replaced by a word that says what stood there.

Patterns follow StarCoder's pipeline (arXiv 2305.06161, section 4) and the published key formats of the services; where
a number carries a check (cards, IBAN) the check decides. Names and postal addresses are not found: that needs a model.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections import Counter
from collections.abc import Callable

# Not before a bracket or a further name: `a@b.weight.T` and `a@b.inv()` are products of matrices.
_EMAIL = re.compile(r"(?<![\w.+-])\w[\w.+-]{0,63}@(?:[^\W_](?:[\w-]{0,62})\.){1,8}[^\W\d_]{2,24}(?![\w(\[-]|\.\w)")
# Four numbers with points between are a version after a name, a comparison or the word.
_IPV4 = re.compile(
    r"(?<![\w.])(?<![A-Za-z]-)(?<![=<>~!]=)(?<![Vv]ersion )(?<![Ss]ection )(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)"
)
# Only 2000::/3 is given to anybody; `abc::def` is a name in C++ or Rust.
_IPV6 = re.compile(r"(?<![\w:.])[23][0-9A-Fa-f]{3}(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:])")
_PRIVATE_KEY = re.compile(r"-----BEGIN ([A-Z0-9 ]{0,40}PRIVATE KEY)-----.{1,20000}?-----END \1-----", re.S)
_KEY = re.compile(
    r"(?<![\w-])(?:"
    r"(?:AKIA|ASIA)[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{22,}|glpat-[\w-]{20,}|"
    r"xox[abprs]-[\w-]{10,}|sk-(?=[A-Za-z_-]*\d)[A-Za-z0-9_-]{20,}|[sr]k_live_[A-Za-z0-9]{20,}|AIza[\w-]{35}|"
    r"hf_[A-Za-z0-9]{30,}|pypi-[\w-]{50,}|npm_[A-Za-z0-9]{36}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"
    r")(?![\w-])"
)
_KEY_STARTS = (
    "AKIA", "ASIA", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "xox", "sk-", "k_live_", "AIza",
    "hf_", "pypi-", "npm_", "eyJ",
)  # fmt: skip
_ASSIGNED = re.compile(
    r"(?i)((?:api|access|auth|secret|private)[_-]?(?:key|token)|client[_-]?secret|passw(?:or)?d|secret)"
    r"(\"?'?\s*[:=]\s*[\"'])([A-Za-z0-9+/=_\-.]{16,200})([\"'])"
)
_ASSIGNED_HINTS = ("key", "token", "secret", "passw")
_CARD = re.compile(
    r"(?<![\w.-])(?:\d{13,19}|\d{4}([ -])\d{4}\1\d{4}\1\d{1,4}(?:\1\d{1,3})?|\d{4}([ -])\d{6}\2\d{4,5})"
    r"(?![\w-]|\.\d)"
)
_IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?(?!\w)")
_PHONE = re.compile(r"(?<![\w+.])\+[1-9]\d{0,2}(?:[ .-]?\(?\d{1,4}\)?){2,5}(?!\w)")
_DECIMAL = re.compile(r"\+\d+\.\d+")
CARD_LENGTHS = {3: (14, 15, 16), 4: (13, 16, 19), 5: (16,), 6: (16, 17, 18, 19)}  # by first digit
MIN_RANDOM = 3.3  # bits a character from which an assigned string looks like a secret rather than a word


def mask(text: str) -> tuple[str, Counter[str]]:
    """The text with each finding replaced, and how many of each kind there were."""
    counts: Counter[str] = Counter()

    def put(kind: str, fits: Callable[[str], bool] = bool) -> Callable[[re.Match[str]], str]:
        def replacement(match: re.Match[str]) -> str:
            if not fits(match[0]):
                return match[0]
            counts[kind] += 1
            return f"<{kind}>"

        return replacement

    if "PRIVATE KEY-----" in text:
        text = _PRIVATE_KEY.sub(put("PRIVATE_KEY"), text)
    if any(start in text for start in _KEY_STARTS):
        text = _KEY.sub(put("KEY"), text)
    if any(hint in text.lower() for hint in _ASSIGNED_HINTS):
        text = _in_lines(text, lambda line: '"' in line or "'" in line, _ASSIGNED, lambda m: _mask_assigned(m, counts))
    if "@" in text:
        text = _in_lines(text, lambda line: "@" in line, _EMAIL, put("EMAIL", lambda found: not _is_example(found)))
    text = _IPV4.sub(put("IP", _is_public), text)
    if text.count(":") > 1:
        text = _in_lines(text, lambda line: line.count(":") > 1, _IPV6, put("IP", _is_public))
    text = _CARD.sub(put("CARD", _is_card), text)
    text = _IBAN.sub(lambda match: _mask_iban(match, counts), text)
    if "+" in text:
        text = _PHONE.sub(put("PHONE", _is_phone), text)
    return text, counts


def _in_lines(
    text: str, has_hint: Callable[[str], bool], pattern: re.Pattern[str], put: Callable[[re.Match[str]], str]
) -> str:
    """Replace in those lines that can hold a match: a search for one character is much cheaper than for a pattern."""
    lines = text.split("\n")
    return "\n".join([pattern.sub(put, line) if has_hint(line) else line for line in lines])


def _mask_assigned(match: re.Match[str], counts: Counter[str]) -> str:
    value = match[3]
    if not any(map(str.isdigit, value)) or _bits_a_character(value) < MIN_RANDOM:
        return match[0]
    counts["KEY"] += 1
    return f"{match[1]}{match[2]}<KEY>{match[4]}"


def _bits_a_character(value: str) -> float:
    shares = [count / len(value) for count in Counter(value).values()]
    return -sum(share * math.log2(share) for share in shares)


def _is_example(address: str) -> bool:
    """Addresses of the domains that RFC 2606 sets aside belong to nobody, nor do `git@` and a product with `self.x`."""
    name, domain = address.lower().rsplit("@", 1)
    return (
        name == "git"
        or domain.startswith("self.")
        or domain.endswith(("example.com", "example.org", "example.net", ".example", ".test", ".invalid", "localhost"))
    )


def _is_public(found: str) -> bool:
    try:
        return ipaddress.ip_address(found).is_global
    except ValueError:
        return False


def _is_card(found: str) -> bool:
    digits = [int(char) for char in found if char.isdigit()]
    if len(set(digits)) < 4 or len(digits) not in CARD_LENGTHS.get(digits[0], ()):
        return False
    doubled = [
        digit if i % 2 == 0 else (2 * digit - 9 if digit > 4 else 2 * digit) for i, digit in enumerate(digits[::-1])
    ]
    return sum(doubled) % 10 == 0  # Luhn, ISO/IEC 7812


def _is_phone(found: str) -> bool:
    return 8 <= sum(map(str.isdigit, found)) <= 15 and not _DECIMAL.fullmatch(found)


def _mask_iban(match: re.Match[str], counts: Counter[str]) -> str:
    """Words in capitals may follow, which the pattern takes for groups: the longest beginning that fits is masked."""
    found = match[0]
    for end in [len(found), *(blank.start() for blank in reversed(list(re.finditer(" ", found))))]:
        if _is_iban(found[:end]):
            counts["IBAN"] += 1
            return f"<IBAN>{found[end:]}"
    return found


def _is_iban(found: str) -> bool:
    plain = found.replace(" ", "")
    return (
        15 <= len(plain) <= 34 and int("".join(str(int(c, 36)) for c in plain[4:] + plain[:4])) % 97 == 1
    )  # ISO 13616
