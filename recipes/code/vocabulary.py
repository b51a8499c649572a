"""The tokenizer: byte-level BPE learned from the training part.

    python recipes/code/vocabulary.py --corpus DIR --out DIR/tokenizer

Text is cut as Qwen2's tokenizer does it, because that cut suits code (indentation is one token and leaves the last
space to the word, a colon takes its line end along, digits stand alone) and has a name in GGUF, so llama.cpp,
transformers and Shoal give the same ids. The markers have DeepSeek-V3's names.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, processors, trainers

from shoal.formats import tokenizer_json
from shoal.formats.gguf_pretokenizers import PRE_TOKENIZERS, to_json
from shoal.formats.tokenizer import Tokenizer

VOCABULARY = 4096
BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
FIM_BEGIN, FIM_HOLE, FIM_END = "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"
MARKERS = (BOS, EOS, PAD, FIM_BEGIN, FIM_HOLE, FIM_END)
PRE_TOKENIZER = "qwen2"
SAMPLE_BYTES = 96 << 20


def sample(path: Path, limit: int, seed: int = 0) -> Iterator[str]:
    """Texts of about `limit` bytes in all, from lines drawn over the whole file."""
    share = min(1.0, limit / path.stat().st_size)
    draw = random.Random(seed)
    with path.open(encoding="utf-8") as file:
        for line in file:
            if draw.random() < share:
                yield json.loads(line)["text"]


def learn(texts: Iterator[str], size: int = VOCABULARY) -> Tokenizer:
    """`size` tokens: the markers, the 256 bytes, and the merges that the texts make most of."""
    model = tokenizers.Tokenizer(models.BPE())
    pre = json.dumps(to_json(PRE_TOKENIZERS[PRE_TOKENIZER]))
    blank = json.loads(model.to_str())
    model = tokenizers.Tokenizer.from_str(json.dumps(blank | {"pre_tokenizer": json.loads(pre)}))
    model.decoder = decoders.ByteLevel()
    model.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, MARKERS.index(BOS))])
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=list(MARKERS),
        initial_alphabet=list(tokenizer_json.CHAR_TO_BYTE),
        max_token_length=24,
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    data = json.loads(model.to_str())
    tokenizer_json.check(data, Path("tokenizer.json"))
    ids = {marker: MARKERS.index(marker) for marker in MARKERS}
    return Tokenizer(
        data, "tokenizer.json", bos_token_id=ids[BOS], eos_token_ids=[ids[EOS]], pad_token_id=ids[PAD], add_bos=True,
        fim_order="spm",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="holds train.jsonl")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, default=VOCABULARY)
    options = parser.parse_args()
    tokenizer = learn(sample(options.corpus / "train.jsonl", SAMPLE_BYTES), options.size)
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(options.out)
    texts = list(sample(options.corpus / "held_out.jsonl", 4 << 20, seed=1))
    tokens = sum(len(ids) for ids in tokenizer.encode_batch(texts))
    print(f"{tokenizer.vocab_size} tokens, {sum(len(t.encode()) for t in texts) / tokens:.3f} bytes a token held out")


if __name__ == "__main__":
    main()
