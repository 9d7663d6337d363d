"""Calibration data: what is a target, what is padding, what is refused."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sst_merge.data import TokenSequence, read_examples, split_held_out, tokenize
from sst_merge.packing import batches

WORDS = ["<pad>", "<s>", "</s>", "<user>", "<bot>", "a", "b", "c", "d", "e", "f", "g"]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}<user> {{ m.content }} "
    "{% else %}<bot> {{ m.content }} </s> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<bot> {% endif %}"
)


def make_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = template
    return tokenizer


def words(sequence, chosen=None):
    return [WORDS[i] for t, i in enumerate(sequence.input_ids) if chosen is None or chosen[t]]


def write(path, *records):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))
    return path


def test_chat_template_marks_every_assistant_turn(tmp_path):
    turns = [("user", "a b"), ("assistant", "c"), ("user", "d"), ("assistant", "e f")]
    record = {"messages": [{"role": role, "content": text} for role, text in turns]}
    (sequence,) = tokenize(read_examples(write(tmp_path / "x", record)), make_tokenizer(TEMPLATE), 100)
    assert words(sequence) == [
        "<user>",
        "a",
        "b",
        "<bot>",
        "c",
        "</s>",
        "<user>",
        "d",
        "<bot>",
        "e",
        "f",
        "</s>",
    ]
    assert words(sequence, sequence.is_target) == ["c", "</s>", "e", "f", "</s>"]


def test_prompt_and_response_are_a_chat(tmp_path):
    examples = read_examples(write(tmp_path / "x", {"prompt": "a b", "response": "c"}))
    (sequence,) = tokenize(examples, make_tokenizer(TEMPLATE), 100)
    assert words(sequence) == ["<user>", "a", "b", "<bot>", "c", "</s>"]
    assert words(sequence, sequence.is_target) == ["c", "</s>"]


def test_without_template_the_text_is_plain_with_bos_and_eos(tmp_path):
    examples = read_examples(write(tmp_path / "x", {"prompt": "a b", "response": "c"}))
    (sequence,) = tokenize(examples, make_tokenizer(None), 100)
    assert words(sequence) == ["<s>", "a", "b", "c", "</s>"]
    assert words(sequence, sequence.is_target) == ["c", "</s>"]


def test_truncation_drops_what_bears_no_loss(tmp_path):
    path = write(
        tmp_path / "x",
        {"prompt": "a b", "response": "c d"},
        {"prompt": "a b c d e f", "response": "g"},
    )
    (sequence,) = tokenize(read_examples(path), make_tokenizer(TEMPLATE), 5)
    assert sequence.index == 0 and words(sequence, sequence.is_target) == ["c"]
    assert tokenize(read_examples(path), make_tokenizer(TEMPLATE), 3) == []


def test_template_that_rewrites_earlier_turns_is_refused(tmp_path):
    turns = [
        {"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    path = write(tmp_path / "x", {"messages": turns})
    rewriting = "{{ messages|length }} " + TEMPLATE
    with pytest.raises(ValueError, match="line 1 does not fit.*renders earlier turns differently"):
        tokenize(read_examples(path), make_tokenizer(rewriting), 100)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no example"),
        ("\n\n", "holds no example"),
        (
            '{"prompt": "a", "response": "b"}\n{"prompt": "a", "answer": "b"}',
            r"x, line 2: expected an object of one of the forms.*got an object with the keys \['answer', 'prompt'\]",
        ),
        ('{"prompt": "a", "response": 3}', "type string"),
        ('{"messages": [{"role": "user"}]}', "type string"),
        ("not json", "line 1"),
    ],
)
def test_bad_files_name_the_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_examples(write(tmp_path / "x", text))
    with pytest.raises(ValueError, match="does not exist"):
        read_examples(tmp_path / "absent")


def test_line_separators_inside_strings_do_not_split_lines(tmp_path):
    path = tmp_path / "x"
    path.write_text('\ufeff{"prompt": "a \u2028 b", "response": "c \x85"}\r\n{"prompt": "d", "response": "e"}\n')
    assert [e.messages[0]["content"] for e in read_examples(path)] == ["a \u2028 b", "d"]


def test_template_that_refuses_is_an_error_with_the_example(tmp_path):
    path = write(tmp_path / "x", {"prompt": "a", "response": "b"})
    with pytest.raises(ValueError, match="line 1 does not fit.*no users here"):
        tokenize(read_examples(path), make_tokenizer("{{ raise_exception('no users here') }}"), 100)


def test_batches_hold_every_sequence_once_right_padded(tmp_path):
    records = [{"prompt": "a " * n, "response": "b"} for n in (3, 9, 1, 5, 2)]
    sequences = tokenize(read_examples(write(tmp_path / "x", *records)), make_tokenizer(TEMPLATE), 100)
    seen = {}
    for batch in batches(sequences, 2, "cpu"):
        assert batch.input_ids.shape == batch.attention_mask.shape == batch.is_target.shape
        for i, index in enumerate(batch.index.tolist()):
            length = int(batch.attention_mask[i].sum())
            assert batch.attention_mask[i, :length].all() and not batch.input_ids[i, length:].any()
            assert not batch.is_target[i, length:].any()
            seen[index] = batch.input_ids[i, :length].tolist()
    assert seen == {s.index: s.input_ids for s in sequences}


@pytest.mark.parametrize(("count", "share", "held"), [(2, 0.01, 1), (2, 0.99, 1), (10, 0.25, 2), (100, 0.25, 25)])
def test_held_out_split(count, share, held):
    sequences = [TokenSequence(i, [7, i], [False, True]) for i in range(count)]
    found, kept_apart = split_held_out(sequences, share, seed=0)
    assert len(kept_apart) == held and sorted(found + kept_apart, key=lambda s: s.index) == sequences
    assert (found, kept_apart) == split_held_out(sequences, share, seed=0)
    with pytest.raises(ValueError, match="at least 2"):
        split_held_out(sequences[:1] * 3, share, seed=0)
