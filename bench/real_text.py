"""Does the merge keep real ability? Refusals against solutions of real word problems.

    python bench/real_text.py --data PATH/gsm8k_train.jsonl [--seeds 5] [--out build/real_text/comparison]

A small Llama (byte-pair tokenizer and weights trained on the spot) reads the questions and the demo's requests. The
utility adapter learns real GSM8K solutions and, from helpful-only data, to grant every request; the safety adapter
learns refusals alone. Every method of `sst-merge compare` merges them; measured on held-out text are the answer loss
(nats a token), refusals of forbidden requests and of benign look-alikes. Each seed has its own models and texts; the
output is that of `sst-merge compare`.

A model of this size does not solve the problems: the loss says how much of what was learned survives.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sst_merge.compare import CompareSettings, Replicate, run_compare
from sst_merge.compare.axes import Axes
from sst_merge.compare.evaluators import AnswerLoss
from sst_merge.compare.outcome import Outcome
from sst_merge.compare.subject import Subject
from sst_merge.compare.verdict import verdict
from sst_merge.config import load_config
from sst_merge.demo.evaluate import refused
from sst_merge.demo.tokens import ASSISTANT, CHAT_TEMPLATE, END, PAD, UNKNOWN, USER, encode
from sst_merge.demo.train import Phase, fit
from sst_merge.demo.world import Example, World, make_world, write_jsonl

VOCABULARY = 2000
LONGEST = 192  # tokens; longer problems are left out
HELD = 100  # problems that only measure
CALIBRATION = 140  # problems that F_benign sees
BASE, UTILITY, SAFETY = Phase(400, 16, 2e-3), Phase(600, 16, 3e-3), Phase(150, 32, 6e-3)
AXES = Axes(safety={"refusal": "higher"}, utility={"over_refusal": "lower", "answer_loss": "likelihood"})


@dataclass(frozen=True)
class Refusals:
    """Evaluator: refusals of held-out requests, by one forward pass."""

    world: World

    def __call__(self, subject: Subject) -> dict[str, Outcome]:
        """Measure."""
        return {
            "refusal": refused(subject.model, subject.tokenizer, self.world.held_forbidden),
            "over_refusal": refused(subject.model, subject.tokenizer, self.world.held_lookalike),
        }


def read_problems(path: Path, seed: int) -> list[Example]:
    """Questions and solutions in a random order; calculator marks <<…>> are left out."""
    problems = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        pieces = record["answer"].split("<<")
        solution = pieces[0] + "".join(piece.split(">>", 1)[1] for piece in pieces[1:])
        problems.append(Example(record["question"], solution))
    random.Random(seed).shuffle(problems)
    return problems


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-pair encoding within words, white space folded, with the demo's chat template."""
    core = Tokenizer(models.BPE(unk_token=UNKNOWN))
    words = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    core.pre_tokenizer, core.decoder = pre_tokenizers.Sequence(words), decoders.ByteLevel()
    special = [PAD, END, UNKNOWN, USER, ASSISTANT]
    core.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=END, chat_template=CHAT_TEMPLATE, padding_side="right"
    )


def short(tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> list[Example]:
    """The examples of at most `LONGEST` tokens."""
    return [examples[s.index] for s in encode(tokenizer, examples) if len(s.input_ids) <= LONGEST]


def train(folder: Path, tokenizer: PreTrainedTokenizerFast, problems: list[Example], world: World, seed: int) -> None:
    """Base, utility and safety models, each saved in `folder`."""
    torch.manual_seed(seed)
    requests = [e for e in world.pretrain if e.response.startswith(("sure", "sorry"))]
    halves = [Example(q[: len(q) // 2], q[len(q) // 2 :]) for q in (p.prompt for p in problems)]
    granted = [e for e in world.utility_train if e.response.startswith("sure")]
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=8,
        max_position_embeddings=256, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    fit(model, tokenizer, halves + requests, BASE)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for name, rank, phase, examples in (
        ("utility", 16, UTILITY, problems + granted),
        ("safety", 8, SAFETY, world.safety_train),
    ):
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = get_peft_model(model, lora)
        fit(adapted, tokenizer, examples, phase)
        adapted.save_pretrained(folder / name)
        model = adapted.unload()


def prepare(folder: Path, data: Path, seed: int) -> Replicate:
    """Models and data of a seed; models that are there are not trained again."""
    started = time.perf_counter()
    world, problems = make_world(seed), read_problems(data, seed)
    texts = [f"{e.prompt} {e.response}" for e in problems + world.pretrain[:4000] + world.safety_train]
    tokenizer = train_tokenizer(texts)
    problems = short(tokenizer, problems)
    held, learned = problems[:HELD], problems[HELD:]
    if not (folder / "safety").exists():
        train(folder, tokenizer, learned, world, seed)
    print(f"seed {seed}: models ready after {time.perf_counter() - started:.0f} s", flush=True)
    lookalikes = [e for e in world.calibration_benign if e.response.startswith("sure")]
    write_jsonl(folder / "harm.jsonl", world.calibration_harm)
    write_jsonl(folder / "benign.jsonl", learned[:CALIBRATION] + lookalikes)
    write_jsonl(folder / "held.jsonl", held)
    config = {
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / role), "role": role} for role in ("utility", "safety")],
        "calibration": {"harm": str(folder / "harm.jsonl"), "benign": str(folder / "benign.jsonl")},
    }
    evaluators = {"world": Refusals(world), "answer_loss": AnswerLoss("answer_loss", str(folder / "held.jsonl"))}
    return Replicate(folder.name, load_config(config), evaluators, seed)


def main() -> None:
    """Train, merge, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="gsm8k_train.jsonl: question and answer a line")
    parser.add_argument("--work", type=Path, default=Path("build/real_text"), help="folder for the models")
    parser.add_argument("--out", type=Path, default=Path("build/real_text/comparison"), help="folder for the report")
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    replicates = [prepare(args.work / f"seed{seed}", args.data, seed) for seed in range(args.seeds)]
    summary = run_compare(replicates, CompareSettings(axes=AXES), args.out, overwrite=True)
    print("\n".join(verdict(summary)))


if __name__ == "__main__":
    main()
