"""Which damping, shrinkage and share of directions? The demo's comparison over a grid of SST's own settings.

    python bench/selection.py [--demo demo-out] [--seeds 1] [--out build/selection]
    python bench/selection.py --methods --seeds 5       # SST's leading settings beside other methods

Needs the models that `sst-merge demo --out DIR --seeds N` left in DIR (it trains those that are missing), and writes
what `sst-merge compare` writes. All is measured on the demo's held-out prompts, so a setting chosen here is chosen on
them.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from sst_merge.compare import Variant, run_compare
from sst_merge.compare.variants import VARIANTS
from sst_merge.compare.verdict import verdict
from sst_merge.demo.run import SETTINGS, prepare

ALPHAS = (0.7, 0.85, 1.0, 1.2, 1.5)
GRID = [
    (s, e, k, scope)
    for s, e, scope in ((0.0, 1.0, "global"), (0.0, 5.0, "global"), (0.0, 1.0, "module"), (0.3, 1.0, "global"))
    for k in (0.05, 0.15, 0.4)
]
METHODS = {
    f"top_k, s={s} eps={e} k={k} {scope}": Variant("sst", {"shrinkage": s, "damping": e, "k": k, "scope": scope})
    for s, e, k, scope in GRID
} | {
    f"soft, s=0.0 eps={e} mu={mu}": Variant("sst", {"shrinkage": 0.0, "damping": e, "select": "soft", "mu": mu})
    for e in (1.0, 5.0)
    for mu in (0.01, 0.03, 0.1)
}


LEADING = {
    "SST exact, k 0.2": Variant("sst", {"k": 0.2}),
    "SST exact": Variant("sst", {"k": 0.05}),
    "SST K-FAC, k 0.2": Variant("sst", {"fisher": "kfac", "k": 0.2}),
    "SST EK-FAC, k 0.2": Variant("sst", {"fisher": "ekfac", "k": 0.2}),
    "SST exact, soft, shrunk 0.5, eps 10, mu 0.1": VARIANTS["SST exact, soft, shrunk 0.5"],
} | {
    label: VARIANTS[label]
    for label in (
        "task arithmetic",
        "diagonal SST, weights, hard, path",
        "TIES, density 0.5",
        "DELLA, p 0.3",
        "Iso-C",
        "KnOTS-TIES",
        "SafeMERGE",
        "gradient matching",
        "data-free SST-V, hard",
        "data-free SST-M, hard",
    )
}


def main() -> None:
    """Runs the grid on every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("demo-out"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--methods", action="store_true", help="SST's leading settings beside other methods")
    parser.add_argument("--out", type=Path, default=Path("build/selection"))
    args = parser.parse_args()
    replicates = [prepare(args.demo / f"seed{seed}", seed) for seed in range(args.seeds)]
    methods, alphas = (LEADING, SETTINGS.alphas) if args.methods else (METHODS, ALPHAS)
    settings = replace(SETTINGS, methods=methods, alphas=alphas)
    print("\n".join(verdict(run_compare(replicates, settings, args.out, overwrite=True))))


if __name__ == "__main__":
    main()
