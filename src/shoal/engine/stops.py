"""Stop strings in a stream: text is held back only while it may still turn into a stop string."""

from __future__ import annotations


class StopMatcher:
    """Feed text pieces, get back what is safe to show. Stop strings may span any number of pieces."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Text now certain to precede any stop string; after a match, the text before it and `stopped` is set."""
        if self.stopped or not self._stops:
            return "" if self.stopped else text
        self._held += text
        found = ((at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0)
        # The one that is complete first, so that it does not matter how the text was cut into pieces.
        _, cut = min(found, default=(0, -1))
        if cut >= 0:
            self.stopped = True
            out, self._held = self._held[:cut], ""
            return out
        keep = max(_overlap(self._held, stop) for stop in self._stops)
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out

    def flush(self) -> str:
        """What was held back and, the stream being over, can no longer become a stop string."""
        out, self._held = self._held, ""
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that ends `text`."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
