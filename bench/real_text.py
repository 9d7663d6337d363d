"""Does the merge keep real ability? Refusals against solutions of real word problems.

    python bench/real_text.py --data PATH/gsm8k_train.jsonl --out bench/results/real_text [--seed 0]

A small Llama (byte-pair tokenizer and weights trained on the spot) reads the questions and the demo's requests. The
utility adapter learns real GSM8K solutions and, from helpful-only data, to grant every request; the safety adapter
learns refusals alone. Every method of the demo's frontier merges them; measured on held-out text are the answer loss
(nats a token), refusals of forbidden requests and of benign look-alikes.

A model of this size does not solve the problems: the loss says how much of what was learned survives.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from dataclasses import asdict
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from harness import provenance
from sst_merge.demo import frontier
from sst_merge.demo.evaluate import refused_share
from sst_merge.demo.tokens import ASSISTANT, CHAT_TEMPLATE, END, PAD, UNKNOWN, USER, encode
from sst_merge.demo.train import Phase, fit
from sst_merge.demo.world import Example, World, make_world, write_jsonl
from sst_merge.fisher import log_likelihood
from sst_merge.packing import batches

VOCABULARY = 2000
LONGEST = 192  # tokens; longer problems are left out
HELD = 100  # problems that only measure
CALIBRATION = 140  # problems that F_benign sees
BASE, UTILITY, SAFETY = Phase(400, 16, 2e-3), Phase(600, 16, 3e-3), Phase(150, 32, 6e-3)
ALPHAS = (0.4, 0.6, 0.8, 0.9, 1.0, 1.2, 1.5)
RUNS = {
    label: frontier.RUNS[label]
    for label in (
        "task arithmetic",
        "interpolation",
        "TIES, density 0.5",
        "DARE, p 0.5",
        "diagonal SST, weights, hard, path",
        "SST diagonal",
        "SST exact",
        "SST exact, soft, mu 0.1",
    )
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


@torch.no_grad()
def answer_loss(model: nn.Module, tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> float:
    """Mean −log p of the solutions' tokens, nats."""
    total, count = 0.0, 0
    for batch in batches(encode(tokenizer, examples), 20, "cpu"):
        total -= float(log_likelihood(model, batch, seed=None)[0])
        count += int(batch.is_target.sum())
    return total / count


def main() -> None:
    """Train, merge, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="gsm8k_train.jsonl: question and answer a line")
    parser.add_argument("--out", type=Path, required=True, help="folder for the figures")
    parser.add_argument("--work", type=Path, default=Path("build/real_text"), help="folder for the models")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started = time.perf_counter()
    world, problems = make_world(args.seed), read_problems(args.data, args.seed)
    texts = [f"{e.prompt} {e.response}" for e in problems + world.pretrain[:4000] + world.safety_train]
    tokenizer = train_tokenizer(texts)
    problems = short(tokenizer, problems)
    held, learned = problems[:HELD], problems[HELD:]
    folder = args.work / f"seed{args.seed}"
    if not (folder / "safety").exists():
        train(folder, tokenizer, learned, world, args.seed)
    trained = time.perf_counter() - started
    write_jsonl(folder / "harm.jsonl", world.calibration_harm)
    lookalikes = [e for e in world.calibration_benign if e.response.startswith("sure")]
    write_jsonl(folder / "benign.jsonl", learned[:CALIBRATION] + lookalikes)

    def measure(model: nn.Module) -> dict[str, float]:
        refusal = refused_share(model, tokenizer, world.held_forbidden)
        over = refused_share(model, tokenizer, world.held_lookalike)
        kept = math.exp(-answer_loss(model, tokenizer, held))
        return {
            "refusal": refusal,
            "over_refusal": over,
            "utility": kept,
            "score": (refusal * (1 - over) * kept) ** (1 / 3),
        }

    config = {
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / role), "role": role} for role in ("utility", "safety")],
        "calibration": {"harm": str(folder / "harm.jsonl"), "benign": str(folder / "benign.jsonl")},
    }
    torch.manual_seed(args.seed)
    alone = frontier.measure_alone(config, measure)
    rows = frontier.sweep(config, measure, ALPHAS, RUNS)
    args.out.mkdir(parents=True, exist_ok=True)
    result = {
        "command": f"python bench/real_text.py --data gsm8k_train.jsonl --seed {args.seed}",
        "provenance": provenance(torch.device("cpu")),
        "seconds": {"training": round(trained), "all": round(time.perf_counter() - started)},
        "held_out": {
            "problems": len(held),
            "forbidden": len(world.held_forbidden),
            "look_alikes": len(world.held_lookalike),
        },
        "alone": [with_loss(asdict(row)) for row in alone],
        "summary": frontier.summarise(rows),
        "rows": [with_loss(asdict(row)) for row in rows],
    }
    (args.out / f"seed{args.seed}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    frontier.draw_frontier(str(args.out / f"seed{args.seed}.png"), rows, alone)
    for row in result["alone"] + result["summary"]:
        print(row)


def with_loss(row: dict) -> dict:
    """The row, with its answer loss in nats a token."""
    return {**row, "answer_loss": -math.log(row["utility"])}


if __name__ == "__main__":
    main()
