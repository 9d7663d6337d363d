"""Answers to prompts that have none, by a model's own greedy decoding."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GenerationConfig

from .data import TokenSequence


def generate_answers(
    model: nn.Module, prompts: Sequence[TokenSequence], stop: Collection[int], max_new_tokens: int, batch_size: int
) -> list[TokenSequence]:
    """ŷ_t = argmax p(y_t | x, ŷ_<t), from where each prompt ends to a stop token or `max_new_tokens`.

    The tokens generated, stop token included, are the sequence's own: nothing is decoded and tokenised again. Prompts
    are padded on the left, so what a prompt travels with changes no answer but by rounding.

    Args:
        model: A causal language model of transformers, in eval mode.
        prompts: From `tokenize_prompts`.
        stop: Tokens that end an answer.
        max_new_tokens: Longest answer.
        batch_size: Prompts a forward pass.

    Returns:
        Prompt and answer, whose tokens bear the loss, in the prompts' order; a prompt whose answer is a stop token
        alone is left out.

    Cost: at most `max_new_tokens` forward passes a batch, with the model's key-value cache.
    """
    ordered = sorted(prompts, key=lambda s: (-len(s.input_ids), s.index))
    device = model.get_input_embeddings().weight.device
    answers: dict[int, list[int]] = {}
    with _greedy(model, stop, max_new_tokens) as config, tqdm(total=len(ordered), desc="answers", leave=False) as bar:
        for start in range(0, len(ordered), batch_size):
            chunk = ordered[start : start + batch_size]
            ids, mask = (t.to(device) for t in _pad_left(chunk))
            generated = model.generate(ids, attention_mask=mask, generation_config=config)[:, ids.shape[1] :]
            for prompt, tokens in zip(chunk, generated.tolist(), strict=True):
                answers[prompt.index] = _until(tokens, stop)
            bar.update(len(chunk))
    return [_join(prompt, answers[prompt.index]) for prompt in prompts if answers[prompt.index][0] not in stop]


@contextmanager
def _greedy(model: nn.Module, stop: Collection[int], max_new_tokens: int) -> Iterator[GenerationConfig]:
    """Plain greedy decoding; the model's own defaults (penalties, temperature) are put aside meanwhile."""
    ends = sorted(stop) or None
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=ends[0] if ends else 0
    )
    own = model.generation_config
    model.generation_config = config
    try:
        yield config
    finally:
        model.generation_config = own


def _pad_left(prompts: Sequence[TokenSequence]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, (S, T), int64."""
    shape = len(prompts), max(len(s.input_ids) for s in prompts)
    ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    for row, s in enumerate(prompts):
        ids[row, -len(s.input_ids) :] = torch.tensor(s.input_ids)
        mask[row, -len(s.input_ids) :] = 1
    return ids, mask


def _until(tokens: list[int], stop: Collection[int]) -> list[int]:
    """The tokens up to the first stop token, which is included."""
    end = next((t for t, token in enumerate(tokens) if token in stop), len(tokens))
    return tokens[: end + 1]


def _join(prompt: TokenSequence, answer: list[int]) -> TokenSequence:
    """Prompt and answer; the answer bears the loss."""
    targets = [False] * len(prompt.input_ids) + [True] * len(answer)
    return TokenSequence(prompt.index, prompt.input_ids + answer, targets, prompt.weight)
