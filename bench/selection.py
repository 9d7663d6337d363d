"""Which damping, shrinkage and share of directions? The demo's frontier over a grid of SST's own settings.

    python bench/selection.py [--demo demo-out] [--seeds 1] [--out bench/results/selection.json]

Needs the models that `sst-merge demo --out DIR --seeds N` left in DIR (it trains those that are missing). Per setting
and seed: the best score over strengths, and the most utility at 90% refusal. Scores are measured on the demo's held-out
prompts, so a setting chosen here is chosen on them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean

import torch
from torch import nn
from transformers import AutoTokenizer

from harness import provenance
from sst_merge.demo.evaluate import evaluate
from sst_merge.demo.frontier import summarise, sweep
from sst_merge.demo.run import write_config
from sst_merge.demo.train import train_models
from sst_merge.demo.world import make_world

ALPHAS = (0.7, 0.85, 1.0, 1.2, 1.5)
SETTINGS = [
    (s, e, k, scope)
    for s, e, scope in ((0.0, 1.0, "global"), (0.0, 5.0, "global"), (0.0, 1.0, "module"), (0.3, 1.0, "global"))
    for k in (0.05, 0.15, 0.4)
]
RUNS = {
    f"top_k, s={s} eps={e} k={k} {scope}": ("sst", {"shrinkage": s, "damping": e, "k": k, "scope": scope})
    for s, e, k, scope in SETTINGS
} | {
    f"soft, s=0.0 eps={e} mu={mu}": ("sst", {"shrinkage": 0.0, "damping": e, "select": "soft", "mu": mu})
    for e in (1.0, 5.0)
    for mu in (0.01, 0.03, 0.1)
}


def grid(folder: Path, seed: int) -> list[dict]:
    """Summary of every setting on one seed's models."""
    world = make_world(seed)
    models = train_models(world, folder / "models", seed)
    tokenizer = AutoTokenizer.from_pretrained(models.base_path)

    def measure(model: nn.Module) -> dict[str, float]:
        return evaluate(model, tokenizer, world).as_row()

    return summarise(sweep(write_config(folder, models, world), measure, ALPHAS, RUNS))


def main() -> None:
    """Runs the grid on every seed, prints the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("demo-out"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    tables = [grid(args.demo / f"seed{seed}", seed) for seed in range(args.seeds)]
    for rows in zip(*tables, strict=True):
        utility = [row["utility at 90% refusal"] for row in rows]
        best = mean(row["best score"] for row in rows)
        print(f"{rows[0]['method']:28s} best score {best:.3f}  utility at 90% refusal {utility}")
    if args.out:
        result = {"question": __doc__.splitlines()[0], "seeds": tables, "provenance": provenance(torch.device("cpu"))}
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
