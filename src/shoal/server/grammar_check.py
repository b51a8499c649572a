"""Trying grammars in a process of its own, with bounds on time and memory.

A grammar comes from outside, and a hostile one makes its compiler run for minutes or overflow the stack, which would
end the server. So each new one is compiled in a helper process first, on a stack smaller than any of the server's
threads, and reaches the server only if that went well. A helper that hangs is killed; the next grammar gets a new one.
"""

from __future__ import annotations

import hashlib
import json
import re
import select
import subprocess
import sys
import threading
from collections import OrderedDict

MAX_GRAMMAR_CHARS = 1 << 18
CHECK_SECONDS = 1.0
KEPT = 1024
START_SECONDS = 30.0
MEMORY_BYTES = 1 << 30
STACK_BYTES = 2 << 20
READY = "ready"
_TOKEN = re.compile(r"<\[\d+\]>")  # a control token by its id, of which the helper has one


class GrammarChecker:
    """Safe to use from several threads; grammars are tried one after another."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._helper: subprocess.Popen[str] | None = None
        self._good: OrderedDict[bytes, None] = OrderedDict()  # digests of what went well

    def problem(self, grammar: str) -> str | None:
        """What is wrong with a grammar, or None."""
        if len(grammar) > MAX_GRAMMAR_CHARS:
            return f"may be written in at most {MAX_GRAMMAR_CHARS} characters, not {len(grammar)}"
        digest = hashlib.sha256(grammar.encode("utf-8", "surrogatepass")).digest()
        with self._lock:
            if digest in self._good:
                return None
            found = self._try(_TOKEN.sub("<[256]>", grammar))
            if found is None:
                self._good[digest] = None
                while len(self._good) > KEPT:
                    self._good.popitem(last=False)
            return found

    def close(self) -> None:
        with self._lock:
            self._end()

    def _try(self, grammar: str) -> str | None:
        helper = self._started()
        assert helper.stdin is not None
        try:
            helper.stdin.write(json.dumps(grammar) + "\n")
            helper.stdin.flush()
            answer = self._line(helper, CHECK_SECONDS)
        except OSError:
            answer = None
        if answer is None:
            self._end()
            return "is too deep or too large to compile"
        return json.loads(answer) or None

    def _started(self) -> subprocess.Popen[str]:
        if self._helper is None or self._helper.poll() is not None:
            self._helper = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            if self._line(self._helper, START_SECONDS) is None:
                self._end()
                raise OSError("the process that tries grammars does not start")
        return self._helper

    def _line(self, helper: subprocess.Popen[str], seconds: float) -> str | None:
        assert helper.stdout is not None
        if not select.select([helper.stdout], [], [], seconds)[0]:
            return None
        return helper.stdout.readline().strip() or None

    def _end(self) -> None:
        if self._helper is not None:
            self._helper.kill()
            self._helper.communicate()
            self._helper = None


def _serve() -> None:
    """The helper: a grammar a line in, its fault or an empty string a line out."""
    import resource

    import llguidance

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    vocabulary = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes()))
    limits = llguidance.LLParserLimits(verbose_errors=False)
    print(READY, flush=True)
    for line in sys.stdin:
        matcher = llguidance.LLMatcher(vocabulary, json.loads(line), limits=limits, log_level=0)
        if not matcher.is_error():
            matcher.compute_bitmask()
        print(json.dumps(matcher.get_error()), flush=True)


class _Bytes:
    """The smallest vocabulary: what a grammar costs does not depend on it."""

    eos_token_id = 256
    bos_token_id = None
    special_token_ids = (256,)
    tokens = [*(bytes([byte]) for byte in range(256)), b"<end>"]  # noqa: RUF012

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose modules would stand in for others of the same name
    threading.stack_size(STACK_BYTES)
    runner = threading.Thread(target=_serve)
    runner.start()
    runner.join()
