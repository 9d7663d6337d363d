"""Calibration data: what is a target, what is padding, what is refused."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sst_merge.data import TokenSequence, read_examples, tokenize, tokenize_prompts
from sst_merge.packing import batches
from sst_merge.tasks import split_held_out

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
        ('{"messages": []}', "at least one"),
        ('{"messages": "a"}', "must be a list"),
        ('{"prompt": "a", "completion": null}', '"completion" must be of type string, got None'),
        ('{"text": ["a"]}', '"text" must be of type string'),
        ('{"text": "\\ud800"}', "line 1: .*surrogate"),
        ('["a"]', "expected an object of one of the forms"),
        ("not json", "line 1: not one JSON object a line"),
        ("[" * 100_000, "line 1: not one JSON object a line"),
        ('{"input_ids": []}', "at least one token"),
        ('{"input_ids": [3, -1]}', "none of them negative"),
        ('{"input_ids": [3, 4.5]}', '"input_ids" must be a list of integers'),
        ('{"input_ids": [3, true]}', '"input_ids" must be a list of integers'),
        ('{"input_ids": "34"}', '"input_ids" must be a list of integers'),
        ('{"input_ids": [3, 4], "labels": [4]}', '"labels" must have 2 entries'),
        ('{"input_ids": [3, 4], "labels": [4, -100]}', "not shifted.*at 0 the token is 3, the label 4"),
        ('{"input_ids": [3, 4], "seq_lens": [1]}', r"add up to the 2 tokens, got \[1\]"),
        ('{"input_ids": [3, 4], "seq_lens": [2, 0]}', "positive"),
        ('{"input_ids": [3, 4], "position_ids": [0, 2]}', "count 0, 1, 2"),
        ('{"input_ids": [3, 4], "position_ids": [1, 2]}', "count 0, 1, 2"),
        ('{"input_ids": [3, 4], "position_ids": [0]}', '"position_ids" must have 2 entries'),
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


def test_completions_and_text_never_see_the_chat_template(tmp_path):
    path = write(tmp_path / "x", {"prompt": "a b", "completion": " c d"}, {"text": "e f g"})
    completion, text = tokenize(read_examples(path), make_tokenizer(TEMPLATE), 100)
    assert words(completion) == ["<s>", "a", "b", "c", "d", "</s>"]
    assert words(completion, completion.is_target) == ["c", "d", "</s>"]
    assert words(text) == ["<s>", "e", "f", "g", "</s>"]
    assert words(text, text.is_target) == ["e", "f", "g", "</s>"]


def test_special_tokens_that_are_there_are_not_doubled(tmp_path):
    """Neither by us, nor by a tokenizer that adds them to whatever it is given."""
    adding = make_tokenizer("<s> " + TEMPLATE)
    adding.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert adding("a")["input_ids"] == [1, 5, 2]  # it does add them
    records = [{"prompt": "a", "response": "b"}, {"text": "<s> c d </s>"}, {"text": "c d"}]
    chat, *texts = tokenize(read_examples(write(tmp_path / "x", *records)), adding, 100)
    assert words(chat) == ["<s>", "<user>", "a", "<bot>", "b", "</s>"]
    for text in texts:
        assert words(text) == ["<s>", "c", "d", "</s>"] and words(text, text.is_target) == ["c", "d", "</s>"]


def test_text_without_special_tokens_has_no_loss_at_its_first_token(tmp_path):
    tokenizer = make_tokenizer(None)
    tokenizer.bos_token = tokenizer.eos_token = None
    (sequence,) = tokenize(read_examples(write(tmp_path / "x", {"text": "a b c"})), tokenizer, 100)
    assert words(sequence, sequence.is_target) == ["b", "c"]


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_blank_answers_bear_no_loss(tmp_path, template):
    turns = [("user", "a"), ("assistant", ""), ("user", "b"), ("assistant", "c")]
    half = {"messages": [{"role": role, "content": text} for role, text in turns]}
    records = [{"prompt": "a", "response": r} for r in ("", " \n")] + [
        {"prompt": "a", "completion": "  "},
        {"text": ""},
    ]
    (sequence,) = tokenize(read_examples(write(tmp_path / "x", *records, half)), make_tokenizer(template), 100)
    assert sequence.index == 4 and words(sequence, sequence.is_target) == ["c", "</s>"]


def test_prompts_without_answers_end_where_the_answer_begins(tmp_path):
    turns = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    examples = read_examples(write(tmp_path / "x", {"prompt": "a b"}, {"messages": turns}, {"text": "a"}))
    assert [e.is_answered for e in examples] == [False, False, True]
    first, second = tokenize_prompts(examples[:2], make_tokenizer(TEMPLATE))
    assert words(first) == ["<user>", "a", "b", "<bot>"] and not any(first.is_target)
    assert words(second) == ["<user>", "a", "<bot>", "b", "</s>", "<user>", "c", "<bot>"] and not any(second.is_target)
    assert words(tokenize_prompts(examples[:1], make_tokenizer(None))[0]) == ["<s>", "a", "b"]


def test_token_ids_are_used_as_they_are_and_split_into_documents(tmp_path):
    ids = [5, 6, 7, 8, 9, 10]
    records = [
        {"input_ids": ids, "labels": [-100, -100, 7, 8, 9, 10], "attention_mask": [1] * 6},
        {"input_ids": ids, "labels": [5, 6, 7, -100, 9, 10], "seq_lens": [3, 3]},
        {"input_ids": ids, "position_ids": [0, 1, 0, 1, 2, 0]},
    ]
    sequences = tokenize(read_examples(write(tmp_path / "x", *records)), make_tokenizer(TEMPLATE), 5)
    assert [(s.index, s.input_ids, s.is_target) for s in sequences] == [
        (0, ids[:5], [False, False, True, True, True]),
        (1, ids[:3], [False, True, True]),
        (2, ids[3:], [False, True, True]),
        (3, ids[:2], [False, True]),
        (4, ids[2:5], [False, True, True]),
    ]  # document 5 is a single token: nothing to predict


def llama_like_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """As SentencePiece does: a space is put before whatever is tokenised, and spaces become "▁"."""
    pieces = ["<unk>", "<s>", "</s>", *"▁abc[]/INSTyes.", "▁[", "▁a", "▁b", "▁y", "es", "▁yes"]
    merges = [("▁", "["), ("▁", "a"), ("▁", "b"), ("e", "s"), ("▁", "y"), ("▁y", "es")]
    core = Tokenizer(
        models.BPE({p: i for i, p in enumerate(dict.fromkeys(pieces))}, merges, unk_token="<unk>", fuse_unk=True)
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = template
    return tokenizer


def test_tokens_are_those_of_the_whole_text_also_where_pieces_meet(tmp_path):
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
    )
    tokenizer = llama_like_tokenizer(template)
    turns = [("user", "a b"), ("assistant", "yes"), ("user", "b"), ("assistant", "yes.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    records = [{"messages": messages}, {"prompt": "a b", "completion": " yes"}]
    chat, completion = tokenize(read_examples(write(tmp_path / "x", *records)), tokenizer, 100)
    assert chat.input_ids == tokenizer.apply_chat_template(messages, return_dict=False)
    assert completion.input_ids == [1, *tokenizer("a b yes", add_special_tokens=False)["input_ids"], 2]
    answers = [tokenizer.convert_ids_to_tokens(i) for i, t in zip(chat.input_ids, chat.is_target, strict=True) if t]
    assert answers == ["▁yes", "</s>", "▁yes", ".", "</s>"]
    targets = [i for i, t in zip(completion.input_ids, completion.is_target, strict=True) if t]
    assert tokenizer.convert_ids_to_tokens(targets) == ["▁yes", "</s>"]


def test_a_file_that_is_not_utf8_names_the_line(tmp_path):
    path = tmp_path / "x"
    path.write_bytes('{"text": "a"}\r\n\r\n{"text": "é"}\r\n'.encode("latin-1"))
    with pytest.raises(ValueError, match="x, line 3: not UTF-8.*save the file as UTF-8"):
        read_examples(path)


def test_equal_sequences_are_held_out_together_or_not_at_all():
    ids = [[7, i % 5] for i in range(20)] + [[8, i] for i in range(20)]
    sequences = [TokenSequence(i, x, [False, True]) for i, x in enumerate(ids)]
    for seed in range(20):
        found, held = split_held_out(sequences, 0.25, seed)
        assert sorted(s.index for s in found + held) == list(range(40))
        assert not {tuple(s.input_ids) for s in found} & {tuple(s.input_ids) for s in held}
        assert 7 <= len(held) <= 10
    heavy = [TokenSequence(i, [7, max(i, 8)], [False, True]) for i in range(10)]  # nine alike, and one
    assert [s.index for s in split_held_out(heavy, 0.5, 0)[1]] == [9]
