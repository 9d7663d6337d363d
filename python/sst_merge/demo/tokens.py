"""Tokenizer of the demo, trained on its own text, and examples encoded with it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .. import data
from .world import Example

MAX_LENGTH = 256
PAD, END, UNKNOWN = "<|pad|>", "<|end|>", "<|unknown|>"
USER, ASSISTANT = "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|> ' + message['content'] + ' ' }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(examples: Iterable[Example]) -> PreTrainedTokenizerFast:
    """Train a tokenizer with one token a word, and give it the demo's chat template.

    Args:
        examples: Text that holds every word to be known.

    Returns:
        The tokenizer; the same text gives the same ids.
    """
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [PAD, END, UNKNOWN, USER, ASSISTANT]
    trainer = trainers.WordLevelTrainer(special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator((f"{e.prompt} {e.response}" for e in examples), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        padding_side="right",
    )


def encode(tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example]) -> list[data.TokenSequence]:
    """Token ids of prompt, response and end, as calibration data are encoded; only the response bears the loss.

    Args:
        tokenizer: From `make_tokenizer`.
        examples: At least one.

    Returns:
        One sequence an example.
    """
    records = ((f"example {i}", {"prompt": e.prompt, "response": e.response}) for i, e in enumerate(examples))
    return data.tokenize(data.parse_records(records), tokenizer, MAX_LENGTH)
