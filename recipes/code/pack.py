"""Turn the corpus into token shards, half of it as fill-in-the-middle.

    python recipes/code/pack.py --corpus DIR --out DIR

reads DIR/train.jsonl, DIR/held_out.jsonl and DIR/tokenizer, and writes DIR/tokens: the training part, then the held-out
part, in windows of `WINDOW` tokens that pieces of documents fill exactly. A piece is cut to the room of its window
before it is rearranged (context-level FIM, Bavarian et al., arXiv 2207.14255 §4.4), so that prefix, suffix and middle
are always seen together. Order and markers are DeepSeek's prefix-suffix-middle:

    bos fim_begin PREFIX fim_hole SUFFIX fim_end MIDDLE eos

DeepSeek-Coder rearranges half of its documents (arXiv 2401.14196 §3.1.2), DeepSeek-V3 a tenth (arXiv 2412.19437 §4.1);
this model is for editors, so half. Half of the holes lie anywhere; the others end with a line, as an editor asks.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from vocabulary import BOS, EOS, FIM_BEGIN, FIM_END, FIM_HOLE

from shoal.data.shards import ShardWriter
from shoal.formats.tokenizer import Tokenizer, load_tokenizer_json

WINDOW = 512
FIM_RATE, LINE_HOLES = 0.5, 0.5
MIN_FIM = 64  # tokens of a piece below which there is nothing to fill in
SEED = 0
BATCH = 256


class Packer:
    """Fills windows with pieces of documents. `pieces` yields them; their lengths add up to whole windows."""

    def __init__(self, tokenizer: Tokenizer, seed: int, window: int = WINDOW) -> None:
        self.tokenizer, self.window, self.draw = tokenizer, window, random.Random(seed)
        ids = tokenizer.control_tokens
        self.bos, self.eos, self.begin, self.hole, self.end = (
            ids[marker] for marker in (BOS, EOS, FIM_BEGIN, FIM_HOLE, FIM_END)
        )

    def pieces(self, texts: Iterable[str]) -> Iterator[list[int]]:
        room = self.window
        for ids in self._encoded(texts):
            at = 0
            while at < len(ids):
                piece, taken = self._piece(ids, at, room)
                at += taken
                room = room - len(piece) or self.window
                yield piece
        if room < self.window:  # an unfinished window would shift the next part's
            yield [self.eos] * room

    def _encoded(self, texts: Iterable[str]) -> Iterator[list[int]]:
        batch: list[str] = []
        for text in texts:
            batch.append(text)
            if len(batch) == BATCH:
                yield from self.tokenizer.encode_batch(batch, add_bos=False)
                batch = []
        yield from self.tokenizer.encode_batch(batch, add_bos=False)

    def _piece(self, ids: list[int], at: int, room: int) -> tuple[list[int], int]:
        """The next piece, at most `room` long, and how many of the document's tokens it used."""
        if room > MIN_FIM and len(ids) - at > MIN_FIM and self.draw.random() < FIM_RATE:
            taken = min(len(ids) - at, room - 5)
            piece = self._rearranged(self.tokenizer.decode(ids[at : at + taken]), room)
            if piece is not None:
                return piece, taken
        taken = min(len(ids) - at, room - 1)
        piece = [self.bos, *ids[at : at + taken]]
        if at + taken == len(ids) and len(piece) < room:
            piece.append(self.eos)
        return piece, taken

    def _rearranged(self, text: str, room: int) -> list[int] | None:
        """Prefix, suffix, middle; a suffix that has no room loses its end. None where there is nothing to rearrange."""
        if "\ufffd" in text:  # cut inside a character
            return None
        first, last = self._hole(text)
        parts = [text[:first], text[last:], text[first:last]]
        if not parts[2]:
            return None
        prefix, suffix, middle = self.tokenizer.encode_batch(parts, add_bos=False)
        left = room - 5 - len(prefix) - len(middle)
        if left < 0:
            return None
        return [self.bos, self.begin, *prefix, self.hole, *suffix[:left], self.end, *middle, self.eos]

    def _hole(self, text: str) -> tuple[int, int]:
        """Where the middle begins and ends, in characters."""
        if self.draw.random() >= LINE_HOLES:
            first, last = sorted(self.draw.randrange(len(text) + 1) for _ in range(2))
            return first, last
        first = last = self.draw.randrange(len(text))
        for _ in range(1 if self.draw.random() < 0.5 else self.draw.randint(2, 12)):
            last = text.find("\n", last + 1)
            if last < 0:
                return first, len(text)
        return first, last


def read_texts(path: Path, seed: int) -> list[str]:
    """The documents in an order of their own, for neighbours in the file come from one package."""
    with path.open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    random.Random(seed).shuffle(texts)
    return texts


def pack(
    corpus: Path,
    out: Path,
    tokenizer_folder: Path,
    *,
    seed: int = SEED,
    window: int = WINDOW,
    limit: float = math.inf,
) -> dict[str, float]:
    """Write the shards, of the training part as many windows as `limit` tokens need.

    Returns the tokens of each part, and `held_out`, the share to set in the recipe.
    """
    tokenizer = load_tokenizer_json(tokenizer_folder)
    digest = hashlib.sha256((tokenizer_folder / "tokenizer.json").read_bytes()).hexdigest()
    report = json.loads((corpus / "report.json").read_text())
    provenance = {"corpus": report, "seed": seed, "window": window, "fim_rate": FIM_RATE}
    counts: dict[str, float] = {}
    with ShardWriter(out, vocab_size=tokenizer.vocab_size, tokenizer_digest=digest, provenance=provenance) as writer:
        for part in ("train", "held_out"):
            packer = Packer(tokenizer, seed, window)
            counts[part] = 0
            for piece in packer.pieces(read_texts(corpus / f"{part}.jsonl", seed)):
                writer.add(piece)
                counts[part] += len(piece)
                if part == "train" and counts[part] >= limit and counts[part] % window == 0:
                    break
    # One token less than the part holds: the split falls at the end of the document that the share reaches into.
    total = counts["train"] + counts["held_out"]
    return counts | {"held_out_share": (counts["held_out"] + 1) / total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="CORPUS/tokens")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--limit", type=float, default=math.inf, help="tokens of the training part; default: all")
    options = parser.parse_args()
    out = options.out or options.corpus / "tokens"
    counts = pack(options.corpus, out, options.corpus / "tokenizer", seed=options.seed, limit=options.limit)
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
