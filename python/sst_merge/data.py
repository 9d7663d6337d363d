"""Calibration data: JSONL with prompts and responses or chat messages, tokenised with a mask of what bears the loss."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

CONTENT_MASK = "assistant turns (or the response and the end-of-sequence token) bear the loss; prompts do not"


@dataclass(frozen=True)
class TokenSequence:
    """One tokenised calibration example.

    Attributes:
        index: Number of the example in its file, from 0; the counter of its sampled labels.
        input_ids: Token ids, length T.
        is_target: Length T; True where the token bears the loss (is to be predicted). Never at position 0.
    """

    index: int
    input_ids: list[int]
    is_target: list[bool]


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences.

    Attributes:
        index: (S,), int64, of each sequence in its file.
        input_ids: (S, T), int64.
        attention_mask: (S, T), int64, 1 for tokens, 0 for padding.
        is_target: (S, T), bool.
    """

    index: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    is_target: Tensor


def read_examples(path: str | Path) -> list[list[dict[str, str]]]:
    """Chat messages of each line of a JSONL file.

    Args:
        path: Each line is an object with "prompt" and "response", or with "messages" (a list of role and content).

    Returns:
        For each line a list of {"role": …, "content": …}.

    Raises:
        ValueError: The file is missing or empty, or a line is not of either form; names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"calibration file {path} does not exist")
    examples = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"calibration file {path} is not UTF-8: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            examples.append(_messages(json.loads(line)))
        except (json.JSONDecodeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    if not examples:
        raise ValueError(
            f"calibration file {path} holds no example; write one JSON object with prompt and response a line"
        )
    return examples


def _messages(record: Any) -> list[dict[str, str]]:
    """The messages of one record."""
    if isinstance(record, dict) and {"prompt", "response"} <= record.keys():
        turns = [
            {"role": "user", "content": record["prompt"]},
            {"role": "assistant", "content": record["response"]},
        ]
    elif isinstance(record, dict) and isinstance(record.get("messages"), list):
        turns = record["messages"]
    else:
        raise ValueError('expected an object with "prompt" and "response", or with "messages"')
    for turn in turns:
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise ValueError(f'every message needs a "role" and a "content" of type string, got {turn!r}')
    return turns


def tokenize(examples: Sequence[list[dict[str, str]]], tokenizer: Any, max_length: int) -> list[TokenSequence]:
    """Token ids and loss mask of each example, through the model's own chat template.

    With a chat template, each assistant turn bears the loss, from where `add_generation_prompt` ends. Without one, the
    text is the contents one after another, then the end-of-sequence token, and assistant turns bear the loss.

    Args:
        examples: As from `read_examples`.
        tokenizer: A transformers tokenizer.
        max_length: Longer sequences are cut at the end.

    Returns:
        Sequences with at least one loss-bearing token; others are left out (their number is the difference).

    Raises:
        ValueError: No sequence bears loss, or the chat template rewrites earlier turns.
    """
    sequences = []
    for index, messages in enumerate(examples):
        ids: list[int] = []
        targets: list[bool] = []
        try:
            for text, is_target in _segments(messages, tokenizer):
                piece = tokenizer(text, add_special_tokens=False)["input_ids"]
                ids += piece
                targets += [is_target] * len(piece)
        except (TemplateError, ValueError) as error:
            raise ValueError(f"example {index + 1} does not fit the tokenizer's chat template: {error}") from None
        if not tokenizer.chat_template:
            bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
            ids, targets = (
                ([] if bos is None else [bos]) + ids,
                ([] if bos is None else [False]) + targets,
            )
            if eos is not None and targets:
                ids, targets = [*ids, eos], [*targets, targets[-1]]
        if any(targets[1:max_length]):
            sequences.append(TokenSequence(index, ids[:max_length], [False, *targets[1:max_length]]))
    if not sequences:
        raise ValueError(
            f"none of the {len(examples)} calibration examples has a token that bears loss within "
            f"max_length={max_length} ({CONTENT_MASK}): add responses or raise max_length"
        )
    return sequences


def _segments(messages: list[dict[str, str]], tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """Pieces of the rendered text, in order, and whether each bears the loss."""
    if not tokenizer.chat_template:
        for message in messages:
            yield message["content"], message["role"] == "assistant"
        return
    done = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        for turns, is_target in ((messages[:i], False), (messages[: i + 1], True)):
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=not is_target)
            if not text.startswith(done):
                raise ValueError(
                    "it renders earlier turns differently when later ones are added (or its generation prompt is not "
                    "how an answer begins), so the assistant's tokens are not found"
                )
            yield text[len(done) :], is_target
            done = text


def batches(sequences: Sequence[TokenSequence], batch_size: int, device: torch.device | str) -> Iterator[Batch]:
    """Right-padded batches of sequences of like length, longest first (so that memory runs out at once or never).

    Args:
        sequences: From `tokenize`.
        batch_size: Sequences a batch; the last may have fewer.
        device: Where the tensors go.

    Yields:
        Batches that hold every sequence once.
    """
    ordered = sorted(sequences, key=lambda s: (-len(s.input_ids), s.index))
    for start in range(0, len(ordered), batch_size):
        chunk = ordered[start : start + batch_size]
        shape = len(chunk), max(len(s.input_ids) for s in chunk)
        ids, mask, target = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
        for row, s in enumerate(chunk):
            ids[row, : len(s.input_ids)] = torch.tensor(s.input_ids)
            mask[row, : len(s.input_ids)] = 1
            target[row, : len(s.input_ids)] = torch.tensor(s.is_target)
        index = torch.tensor([s.index for s in chunk])
        yield Batch(index.to(device), ids.to(device), mask.to(device), target.bool().to(device))


def split_held_out(
    sequences: Sequence[TokenSequence], share: float, seed: int
) -> tuple[list[TokenSequence], list[TokenSequence]]:
    """Sequences to find directions with, and held-out ones to judge them by; both keep at least one.

    Args:
        sequences: From `tokenize`.
        share: Share held out, in (0, 1).
        seed: Seed of the draw.

    Returns:
        (found, held), disjoint, together all sequences.

    Raises:
        ValueError: Fewer than two sequences.
    """
    if len(sequences) < 2:
        raise ValueError(
            f"{len(sequences)} usable calibration sequence: at least 2 are needed, one of them to check the "
            "directions on text they were not found with; give more examples (some hundreds are usual)"
        )
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(seed)).tolist()
    held = max(1, min(len(sequences) - 1, round(share * len(sequences))))
    return [sequences[i] for i in sorted(order[held:])], [sequences[i] for i in sorted(order[:held])]
