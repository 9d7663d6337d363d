"""Tokenizers of the base and of the adapters: which is used, and whether they agree."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
_WORDS = ("chat_template", "bos_token", "eos_token")


def read_tokenizers(base: str, adapters: Mapping[str, str], **options: bool) -> tuple[dict[str, Any], list[str]]:
    """The tokenizers of base and adapters that have one.

    Args:
        base: Folder or name of the base model.
        adapters: Role -> folder.
        options: Of `from_pretrained`, for the base alone: an adapter's tokenizer never runs code or is fetched.

    Returns:
        "base" or role -> tokenizer, and a remark for each that could not be read.
    """
    found, remarks = {}, []
    folders = {role: path for role, path in adapters.items() if has_tokenizer(path)}
    closed = {"trust_remote_code": False, "local_files_only": True}
    for owner, path in {"base": base, **folders}.items():
        try:
            found[owner] = AutoTokenizer.from_pretrained(path, **(options if owner == "base" else closed))
        except Exception as error:  # what damaged files raise is of any kind
            remarks.append(f"no tokenizer was read from the {owner}'s {path!r}: {type(error).__name__}: {error}")
    return found, remarks


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a tokenizer's files lie in a folder."""
    return any((Path(folder) / name).is_file() for name in _FILES)


def check_tokenizers(tokenizers: Mapping[str, Any], chosen: str) -> list[str]:
    """Raise unless every token that two tokenizers share has the same id in both.

    Args:
        tokenizers: From `read_tokenizers`.
        chosen: The one that calibration text goes through.

    Returns:
        Remarks on what else differs: tokens that one lacks, chat template, beginning and end of sequence.

    Raises:
        ValueError: A token has two ids, or an id stands for two tokens; names some.
    """
    remarks = []
    ours = tokenizers[chosen].get_vocab()
    for owner, tokenizer in tokenizers.items():
        theirs = tokenizer.get_vocab()
        here, there = dict(ours.items() - theirs.items()), dict(theirs.items() - ours.items())
        if here.keys() & there.keys() or set(here.values()) & set(there.values()):
            raise ValueError(
                f"the tokenizers of {chosen} and {owner} give tokens different ids ({_some(here)} in the one, "
                f"{_some(there)} in the other): the models were not trained on one vocabulary; name the base and the "
                "adapters that belong together, or remove a tokenizer's files that do not belong to its folder"
            )
        for lacking, tokens in ((owner, here), (chosen, there)):
            if tokens:
                remarks.append(f"the {lacking}'s tokenizer lacks {len(tokens)} tokens of the other: {_some(tokens)}")
        differing = [word for word in _WORDS if getattr(tokenizer, word) != getattr(tokenizers[chosen], word)]
        if differing:
            remarks.append(
                f"the tokenizers of {chosen} and {owner} differ in {', '.join(differing)}; that of {chosen} is used, "
                f"`calibration: {{tokenizer: {owner}}}` takes the other"
            )
    return remarks


def _some(tokens: Mapping[str, int]) -> str:
    """The first three tokens by id, in words."""
    first = sorted(tokens.items(), key=lambda item: item[1])[:3]
    return ", ".join(f"{token!r} = {index}" for token, index in first) + (", …" if len(tokens) > 3 else "")
