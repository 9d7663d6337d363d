"""Train the demo's base model and its two adapters, and keep them in a folder.

The base is a Llama of two million parameters, trained whole. The utility adapter (rank 8) learns the new tasks and,
from helpful-only data, to grant every request. The safety adapter (rank 16) starts from the same base and learns to
refuse from requests alone, in fewer steps of a higher rate, as small safety patches are made.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .. import atomic, data, packing
from . import tokens
from .tokens import MAX_LENGTH, encode, make_tokenizer
from .world import Example, World


@dataclass(frozen=True)
class Phase:
    """How one model is trained: number of steps, sequences a step, peak learning rate."""

    steps: int
    batch_size: int
    learning_rate: float


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the trained models besides the world and the seed."""

    hidden_size: int = 256
    intermediate_size: int = 512
    layers: int = 3
    heads: int = 8
    base: Phase = Phase(900, 32, 1e-3)
    utility_rank: int = 8
    utility: Phase = Phase(500, 32, 4e-3)
    safety_rank: int = 16
    safety: Phase = Phase(150, 32, 6e-3)


@dataclass(frozen=True)
class DemoModels:
    """Folders of the trained models: a base with its tokenizer, and two PEFT adapters."""

    base_path: Path
    utility_path: Path
    safety_path: Path


def train_models(world: World, folder: str | Path, seed: int, recipe: Recipe | None = None) -> DemoModels:
    """Train base, utility and safety models, or reuse those that `folder` already holds.

    They lie in a subfolder named after all that decides them, and appear there together, once all are trained. The
    global random state is kept.

    Args:
        world: Texts to train on.
        folder: Where the subfolder is, with `base/` (tokenizer included), `utility/` and `safety/`; parents are made.
        seed: Initial weights and the order of the examples.
        recipe: Sizes and training lengths; `Recipe()` if not given.

    Returns:
        Where the models lie.

    Cost: 6·parameters flops for every token, about 0.4 Pflop altogether.
    """
    recipe = recipe or Recipe()
    folder = Path(folder) / _fingerprint(world, recipe, seed)
    if not folder.exists():
        with atomic.replace_dir(folder) as fresh, torch.random.fork_rng([]):
            _train_all(world, fresh, seed, recipe)
    return DemoModels(folder / "base", folder / "utility", folder / "safety")


def _fingerprint(world: World, recipe: Recipe, seed: int) -> str:
    """Hash of all that decides the models: texts, recipe, seed, and the code that trains."""
    content = {"world": asdict(world), "recipe": asdict(recipe), "seed": seed}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for module in (__file__, tokens.__file__, data.__file__, packing.__file__):
        digest.update(Path(module).read_bytes())
    return digest.hexdigest()[:16]


def _train_all(world: World, folder: Path, seed: int, recipe: Recipe) -> None:
    """Train the three models, one after another, and save each into `folder`."""
    tokenizer = make_tokenizer(world.pretrain + world.utility_train + world.safety_train)
    torch.manual_seed(seed)
    base = LlamaForCausalLM(_config(tokenizer, recipe))
    fit(base, tokenizer, world.pretrain, recipe.base)
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for name, rank, phase, examples in (
        ("utility", recipe.utility_rank, recipe.utility, world.utility_train),
        ("safety", recipe.safety_rank, recipe.safety, world.safety_train),
    ):
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = get_peft_model(base, config)
        fit(adapted, tokenizer, examples, phase)
        adapted.save_pretrained(folder / name)
        base = adapted.unload()


def _config(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> LlamaConfig:
    """Describe the base model."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=MAX_LENGTH,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )


def fit(model: nn.Module, tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example], phase: Phase) -> None:
    """Minimise the mean of −log p over response tokens by AdamW, in place; leaves the model in eval mode.

    The learning rate rises over a twentieth of the steps and falls to zero along a cosine.

    Args:
        model: Causal language model; its parameters that require a gradient are trained.
        tokenizer: The demo's tokenizer, or one with its chat template.
        examples: What to learn.
        phase: How long, and how fast.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=phase.learning_rate, betas=(0.9, 0.98))
    warmup = max(1, phase.steps // 20)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * (1 + math.cos(math.pi * step / phase.steps)) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    model.train()
    for batch in _batches(encode(tokenizer, examples), phase):
        logits = model(input_ids=batch.input_ids).logits[:, :-1]  # causal, padded on the right: needs no mask
        target = batch.is_target[:, 1:]
        functional.cross_entropy(logits[target], batch.input_ids[:, 1:][target]).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


def _batches(sequences: Sequence[data.TokenSequence], phase: Phase) -> Iterator[packing.Batch]:
    """Draw `phase.steps` random batches, sorted by length within groups of eight to save padding."""
    for first in range(0, phase.steps, 8):
        count = min(8, phase.steps - first)
        drawn = torch.randint(len(sequences), (count * phase.batch_size,)).tolist()
        group = list(packing.batches([sequences[i] for i in drawn], phase.batch_size, "cpu"))
        for i in torch.randperm(count).tolist():
            yield group[i]
