"""Which natural language a text is in, by py3langid (a naive Bayes model over byte n-grams, 97 languages, 4.6 MB)."""

from __future__ import annotations

import functools
from typing import Any

from shoal.errors import MissingExtraError

SAMPLE = 1000  # characters from the middle: beginnings are headings and licences
MIN_CONFIDENCE = 0.5


def identify(text: str) -> tuple[str, float]:
    """(ISO 639-1 code, probability between 0 and 1); `und` where the text says too little."""
    start = max(0, (len(text) - SAMPLE) // 2)
    sample = text[start : start + SAMPLE].strip()
    if not any(map(str.isalpha, sample)):
        return "und", 0.0
    code, probability = _identifier().classify(sample)
    return (code if probability >= MIN_CONFIDENCE else "und"), round(float(probability), 4)


@functools.cache
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise MissingExtraError("data", "identifying languages") from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
