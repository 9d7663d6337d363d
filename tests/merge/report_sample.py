"""A report with every part, for the tests of how it is drawn and written; contrast of colours."""

from __future__ import annotations

from typing import Any

import numpy as np

HOSTILE = """<img src=x onerror="hacked=1">'"&</text></script><script>hacked=1</script>$x$ url(#a) id="b" |"""
ALPHAS = (0.5, 1.0, 1.5)


def sample() -> dict[str, Any]:
    """A report with every part, numbers drawn at random, a hostile name wherever a name can be."""
    draw = np.random.default_rng(0)
    names = [f"model.layers.{i}.{kind}" for i in (2, 10) for kind in ("self_attn.q_proj", "mlp.up_proj", HOSTILE)]
    modules: list[dict[str, Any]] = [
        {
            "module": name,
            "shape": [48, 32],
            "n": 8,
            "kept": 2.0,
            "kept_energy": float(draw.lognormal()),
            "ray": 4.0,
            "ray_held": float(draw.uniform(0, 4)),
            "damping_share": float(draw.uniform()),
            "solver": "CONVERGED",
        }
        for name in names
    ]
    modules[1]["kept_energy"] = modules[1]["ray_held"] = None
    modules[4]["kept_energy"] = 2e-12
    modules[0]["kept_energy"], modules[2]["kept_energy"] = 0.70002, 0.70001  # the same four digits
    modules.append({"module": "lm_head", "shape": [50, 32]})
    directions = {
        name: {
            "value": sorted(draw.lognormal(0, 2, 8).tolist(), reverse=True),
            "ray_held": draw.lognormal(0, 2, 8).tolist(),
            "damping_share": draw.uniform(size=8).tolist(),
            "cost": draw.exponential(size=8).tolist(),
            "factor": [1.0] * 2 + [0.0] * 6,
        }
        for name in names
    }
    candidates = [
        {"damping": d, "k": k, "alpha": a}
        | dict(zip(("objective", "kl", "refusal_loss"), draw.exponential(size=3).tolist(), strict=True))
        for d in (0.1, 1.0)
        for k in (0.05, 2)
        for a in ALPHAS
    ]
    chosen = min(candidates, key=lambda row: row["objective"])
    return {
        "versions": {"python": "3.11", "torch": "2.13"},
        "base_model": HOSTILE,
        "utility": "adapters/" + 30 * "long",
        "safety": HOSTILE,
        "merge_method": HOSTILE,
        "seconds": 12.5,
        "remarks": [HOSTILE],
        "warnings": [HOSTILE],
        "not_covered": [HOSTILE],
        "sequences": {kind: {"found": 9, "held_out": 3} for kind in ("harm", "benign")},
        "fisher_trace": {"harm": 3.0, "benign": 0.5},
        "gamma": 1e-3,
        "survival": {"ray_held_kept": 0.5, "ray_held_whole_patch": 0.25, "damping_share_kept": 0.875},
        "modules": modules,
        "directions": directions,
        "strengths": [{"alpha": a, "largest_rank": 5, "predicted_kl": a * a, "adapter": HOSTILE} for a in ALPHAS],
        "held_out": [
            {
                "alpha": a,
                "predicted_kl": a * a,
                "measured_kl": 1.1 * a * a,
                "measured_kl_se": 0.1,
                "predicted_refusal": 9 * a,
                "measured_refusal": 9 * a - a * a,
            }
            for a in ALPHAS
        ],
        "tuning": {
            "rule": HOSTILE,
            "chosen": {key: chosen[key] for key in ("damping", "k", "alpha")},
            "candidates": candidates,
        },
    }


def contrast(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """(L₁ + 0.05) / (L₂ + 0.05), WCAG 2.2, of colours in [0, 255]³."""

    def luminance(color: tuple[float, ...]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (x / 255 for x in color[:3])]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def of_hex(color: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(color.removeprefix("#")))
