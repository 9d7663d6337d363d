"""Calibration data: JSONL of chats, completions, plain text, bare prompts or token ids, tokenised with a loss mask."""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

CONTENT_MASK = "answers, completions and plain text bear the loss; prompts and blank answers do not"
FORMS = (
    '{"prompt", "response"}, {"prompt", "completion"}, {"text"}, {"messages"}, {"prompt"} with no other key (its '
    'answer is generated) or {"input_ids", "labels"}'
)
NO_LOSS = -100


@dataclass(frozen=True)
class Example:
    """One calibration example as it is given; one of `messages`, `pieces` and `tokens` is not None.

    Attributes:
        index: Its number in the data, from 0.
        origin: Where it comes from, for error messages, as "line 3".
        messages: Turns of a chat, each {"role": …, "content": …}.
        pieces: Texts in order, and whether each bears the loss; no chat template is applied.
        tokens: Token ids, and whether each bears the loss, used as they are.
        weight: ω ≥ 0 of the example among those of its data.
    """

    index: int
    origin: str
    messages: list[dict[str, str]] | None = None
    pieces: list[tuple[str, bool]] | None = None
    tokens: tuple[list[int], list[bool]] | None = None
    weight: float = 1.0

    @property
    def is_answered(self) -> bool:
        """False for a chat that does not end with the assistant's turn: its answer is to be generated."""
        return self.messages is None or self.messages[-1]["role"] == "assistant"


@dataclass(frozen=True)
class TokenSequence:
    """One tokenised calibration example.

    Attributes:
        index: Number of the example in its data, from 0; the counter of its sampled labels.
        input_ids: Token ids, length T.
        is_target: Length T; True where the token bears the loss (is to be predicted). Never at position 0.
        weight: ω > 0 of the sequence among those of its data.
    """

    index: int
    input_ids: list[int]
    is_target: list[bool]
    weight: float = 1.0


def read_examples(path: str | Path) -> list[Example]:
    """The examples of a JSONL file, one record a line; see `parse_records` for their forms.

    Args:
        path: The file, UTF-8. Blank lines are skipped.

    Returns:
        At least one example, in the file's order.

    Raises:
        ValueError: The file is missing or empty, or a line is of no known form; names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"calibration file {path} does not exist")
    with path.open("rb") as file:
        lines = (
            (f"line {number}", line) for number, line in enumerate(file, start=1) if line.strip(b"\xef\xbb\xbf \t\r\n")
        )
        try:
            examples = parse_records((origin, _record(origin, line)) for origin, line in lines)
        except ValueError as error:
            raise ValueError(f"{path}, {error}") from None
    if not examples:
        raise ValueError(f"calibration file {path} holds no example; write one JSON object a line: {FORMS}")
    return examples


def _record(origin: str, line: bytes) -> Any:
    """The JSON value of one line."""
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{origin}: not UTF-8 ({error}); save the file as UTF-8") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{origin}: not one JSON object a line ({error})") from None


def parse_records(records: Iterable[tuple[str, Any]]) -> list[Example]:
    """Examples from records of any of these forms, which may be mixed.

    - {"prompt", "response"}: a chat of two turns.
    - {"messages": [{"role", "content"}, …]}: a chat. If its last turn is not the assistant's, its answer is generated.
    - {"prompt"}, with no other key: a chat of one turn; its answer is generated.
    - {"prompt", "completion"}: plain text, never through a chat template; the completion bears the loss.
    - {"text"}: plain text; every token but the first bears the loss.
    - {"input_ids"}, with "labels" (the ids themselves, not shifted; −100 where there is no loss) and, where several
      documents are packed in a record, "seq_lens" or "position_ids": token ids, one example a document.

    Each may have a "weight", the example's importance ω ≥ 0 (1 where there is none).

    Args:
        records: Where each comes from, for error messages, and the record.

    Returns:
        The examples, numbered in this order.

    Raises:
        ValueError: A record is of no form; names where it comes from.

    Example:
        >>> records = [{"text": "Once upon a time."}, {"prompt": "How are you?"}]
        >>> [example.is_answered for example in parse_records([("line 1", records[0]), ("line 2", records[1])])]
        [True, False]
        >>> parse_records([("line 3", {"question": "Why?"})])
        Traceback (most recent call last):
        ValueError: line 3: expected an object of one of the forms ... got an object with the keys ['question']
    """
    examples: list[Example] = []
    for origin, record in records:
        try:
            weight = _weight(record)
            for content in _contents(record):
                examples.append(Example(len(examples), origin, **content, weight=weight))
        except ValueError as error:
            raise ValueError(f"{origin}: {error}") from None
    return examples


def _weight(record: Any) -> float:
    """The importance weight of a record."""
    weight = record.get("weight", 1.0) if isinstance(record, Mapping) else 1.0
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
        raise ValueError(f'"weight" must be a finite number >= 0, got {weight!r}')
    return float(weight)


def _contents(record: Any) -> list[dict[str, Any]]:
    """The field of `Example` that a record fills; several where it holds packed documents."""
    keys = record.keys() if isinstance(record, Mapping) else set()
    if "input_ids" in keys:
        return [{"tokens": document} for document in _documents(record)]
    if "messages" in keys:
        return [{"messages": _turns(record["messages"])}]
    if {"prompt", "response"} <= keys:
        turns = [("user", record["prompt"]), ("assistant", record["response"])]
        return [{"messages": _turns([{"role": role, "content": content} for role, content in turns])}]
    if {"prompt", "completion"} <= keys:
        return [{"pieces": [(_text(record, "prompt"), False), (_text(record, "completion"), True)]}]
    if "text" in keys:
        return [{"pieces": [(_text(record, "text"), True)]}]
    if keys - {"weight"} == {"prompt"}:
        return [{"messages": _turns([{"role": "user", "content": record["prompt"]}])}]
    given = f"an object with the keys {sorted(keys)}" if keys else repr(record)[:80]
    raise ValueError(f"expected an object of one of the forms {FORMS}; got {given}")


def _turns(messages: Any) -> list[dict[str, str]]:
    """The messages, checked."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'"messages" must be a list of at least one object, got {messages!r}')
    for turn in messages:
        if not isinstance(turn, Mapping):
            raise ValueError(f'every message needs a "role" and a "content" of type string, got {turn!r}')
        for key in ("role", "content"):
            _text(turn, key)
    return messages


def _text(record: Mapping[str, Any], key: str) -> str:
    """A string of a record; one that no tokenizer takes is refused."""
    value = record.get(key)
    if not isinstance(value, str):
        raise ValueError(f'"{key}" must be of type string, got {value!r}')
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f'"{key}" holds half a surrogate pair ({error}); remove or mend the character') from None
    return value


def _documents(record: Mapping[str, Any]) -> Iterator[tuple[list[int], list[bool]]]:
    """Token ids and loss mask of every document of a record of tokens; the first token of each bears no loss."""
    ids = _integers(record, "input_ids")
    labels = ids if record.get("labels") is None else _integers(record, "labels", len(ids))
    if not ids or min(ids) < 0:
        raise ValueError('"input_ids" must hold at least one token, none of them negative')
    for t, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if label not in (token, NO_LOSS):
            raise ValueError(
                f'"labels" must hold the token itself (labels are not shifted) or {NO_LOSS} at every position; at '
                f"{t} the token is {token}, the label {label}"
            )
    for start, end in pairwise(_bounds(record, len(ids))):
        yield ids[start:end], [False, *(label != NO_LOSS for label in labels[start + 1 : end])]


def _bounds(record: Mapping[str, Any], length: int) -> list[int]:
    """Where documents of a record of tokens begin, and its length."""
    if record.get("seq_lens") is not None:
        lengths = _integers(record, "seq_lens")
        if min(lengths, default=0) < 1 or sum(lengths) != length:
            raise ValueError(f'"seq_lens" must be positive and add up to the {length} tokens, got {lengths}')
        return [0, *accumulate(lengths)]
    if record.get("position_ids") is None:
        return [0, length]
    positions = _integers(record, "position_ids", length)
    bounds = [*(t for t, position in enumerate(positions) if position == 0), length]
    if positions != [t - start for start, end in pairwise(bounds) for t in range(start, end)]:
        raise ValueError('"position_ids" must count 0, 1, 2, … and begin again at 0 with every document')
    return bounds


def _integers(record: Mapping[str, Any], key: str, length: int | None = None) -> list[int]:
    """A list of integers of a record."""
    value = record[key]
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise ValueError(f'"{key}" must be a list of integers')
    if length is not None and len(value) != length:
        raise ValueError(f'"{key}" must have {length} entries as "input_ids" has, got {len(value)}')
    return value


def tokenize(examples: Sequence[Example], tokenizer: Any, max_length: int) -> list[TokenSequence]:
    """Token ids and loss mask of each answered example; chats through the tokenizer's chat template.

    With a chat template, each assistant turn bears the loss, from where `add_generation_prompt` ends. Without one, and
    for plain text, the contents come one after another between the beginning-of-sequence and end-of-sequence tokens
    (added where they are not there yet); the latter bears the loss if the last piece does. Blank answers bear none.

    Text that a template or a completion makes one is tokenised at once, as in training (tokenizers that know no
    offsets take it piece by piece); a token over an answer's edge belongs to where it ends. Turns without a template
    are tokenised one by one.

    Args:
        examples: As from `read_examples`, answered.
        tokenizer: A transformers tokenizer.
        max_length: Longer sequences are cut at the end.

    Returns:
        Sequences with at least one loss-bearing token; others are left out (their number is the difference).

    Raises:
        ValueError: A chat does not fit the chat template, or it rewrites earlier turns.
    """
    sequences = []
    for example in examples:
        ids, targets = _encode(example, tokenizer)
        if any(targets[1:max_length]):
            targets = [False, *targets[1:max_length]]
            sequences.append(TokenSequence(example.index, ids[:max_length], targets, example.weight))
    return sequences


def tokenize_prompts(examples: Sequence[Example], tokenizer: Any) -> list[TokenSequence]:
    """Token ids of chats up to where the model's answer begins; nothing bears the loss.

    Args:
        examples: Not answered.
        tokenizer: A transformers tokenizer.

    Returns:
        A sequence for each.

    Raises:
        ValueError: A chat does not fit the chat template.
    """
    return [TokenSequence(e.index, *_encode(e, tokenizer), e.weight) for e in examples]


def _encode(example: Example, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Token ids and loss mask of one example."""
    if example.tokens is not None:
        return example.tokens
    try:
        pieces = list(_rendered(example, tokenizer) if _is_chat(example, tokenizer) else _plain(example))
    except (TemplateError, ValueError) as error:
        raise ValueError(f"{example.origin} does not fit the tokenizer's chat template: {error}") from None
    is_one_text = example.pieces is not None or _is_chat(example, tokenizer)
    ids, targets = _tokenize_pieces(pieces, tokenizer, jointly=is_one_text and tokenizer.is_fast)
    if not _is_chat(example, tokenizer):
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        if bos is not None and ids[:1] != [bos]:
            ids, targets = [bos, *ids], [False, *targets]
        if example.is_answered and eos is not None and ids[-1:] != [eos]:
            ids, targets = [*ids, eos], [*targets, pieces[-1][1]]
    return ids, targets


def _is_chat(example: Example, tokenizer: Any) -> bool:
    """Whether a chat template is applied."""
    return example.messages is not None and bool(tokenizer.chat_template)


def _plain(example: Example) -> Iterator[tuple[str, bool]]:
    """Pieces of a text without chat template, and whether each bears the loss."""
    turns = ((turn["content"], turn["role"] == "assistant") for turn in example.messages or ())
    for text, is_target in turns if example.pieces is None else example.pieces:
        yield text, is_target and example.is_answered and bool(text.strip())


def _rendered(example: Example, tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """Pieces of the text that the chat template makes, in order, and whether each bears the loss."""
    messages = example.messages
    if not example.is_answered:
        yield tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True), False
        return
    done = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        for turns, is_answer in ((messages[:i], False), (messages[: i + 1], True)):
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=not is_answer)
            if not text.startswith(done):
                raise ValueError(
                    "it renders earlier turns differently when later ones are added (or its generation prompt is not "
                    "how an answer begins), so the assistant's tokens are not found"
                )
            yield text[len(done) :], is_answer and bool(message["content"].strip())
            done = text


def _tokenize_pieces(pieces: Sequence[tuple[str, bool]], tokenizer: Any, jointly: bool) -> tuple[list[int], list[bool]]:
    """Ids of the pieces, or of the joined text, each marked by the piece that its last character is in."""
    options = {"add_special_tokens": False, "verbose": False}
    if not jointly:
        encoded = [(tokenizer(text, **options)["input_ids"], is_target) for text, is_target in pieces]
        return [i for ids, _ in encoded for i in ids], [is_target for ids, is_target in encoded for _ in ids]
    ends = list(accumulate(len(text) for text, _ in pieces))
    encoded = tokenizer("".join(text for text, _ in pieces), return_offsets_mapping=True, **options)
    last = (max(end - 1, 0) for _, end in encoded["offset_mapping"])
    return encoded["input_ids"], [pieces[bisect_right(ends, character)][1] for character in last]
