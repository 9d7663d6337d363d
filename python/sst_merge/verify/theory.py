"""theory.md, section by section, from the numbers of theory.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..outline import Section
from ..picture import Picture

HEADINGS = {
    "T1": (
        "T1. Most gain per cost",
        "max{vᵀAv : vᵀBv ≤ ρ} = ρλ₁: no direction buys more gain per cost than the first. Challengers are random, "
        "random in the metric B, v₁ perturbed, and vectors that power iterations have made as strong as they can be; "
        "the Cholesky factor leaves no direction out.",
    ),
    "T2": (
        "T2. Ky Fan",
        "max{tr WᵀAW : WᵀBW = I_k} = Σ_{i≤k} λ_i: nor do k directions together buy more than the first k.",
    ),
    "T3": (
        "T3. Courant–Fischer",
        "max over k-dimensional S of min_{v∈S} Ray(v) = λ_k: no space has a worst direction better than that of the "
        "first k.",
    ),
    "T4": (
        "T4. The projector",
        "P_k = V_kV_kᵀB keeps the first k directions of a patch φ, orthogonally in the metric B. Ray(φ) = φᵀAφ / φᵀBφ "
        "never falls by it. Tried with the run's own patch and random ones.",
    ),
    "T5": (
        "T5. Filters within a budget",
        "Of all filters f ∈ [0, 1] of cost Σ f²c² ≤ ρ, greedy by λ gains most (`select: budget`). Besides random "
        "filters, the dual of the linear program bounds what any filter can gain, and greedy reaches it.",
    ),
    "T6": (
        "T6. The soft filter",
        "(A+μB)⁻¹Aτ = Σ λ_i/(λ_i+μ) c_i v_i minimises (φ−τ)ᵀA(φ−τ) + μφᵀBφ (`select: soft`), with "
        "N_μ = tr[A(A+μB)⁻¹] degrees of freedom.",
    ),
    "pencil": (
        "The pencils",
        "A ⪰ 0 and B ≻ 0 are what the theorems ask for. A and B are (1−s)F + s·T, formed from the sums of every task; "
        "T and s are held against their definitions.",
    ),
    "pairs": (
        "The pairs",
        "Av = λBv with VᵀBV = I. The norm of a residual is the one that bounds the error of λ: ‖L⁻¹r‖, B = LLᵀ.",
    ),
    "inertia": (
        "No eigenvalue is missing",
        "A − tB has as many positive eigenvalues as the pencil has λ > t (Sylvester), counted by LDLᵀ.",
    ),
    "solvers": (
        "Solvers agree",
        "Eigenvalues of other methods of `solve`, and of scipy (LAPACK), and the largest angle between their leading "
        "spaces in the metric B.",
    ),
    "planted": ("Planted spectra", "Eigenvalues that are known before the pencil is solved."),
    "record": (
        "The run's record",
        "What report.json says against pencils that are formed and solved anew, and against γ and s.",
    ),
    "run": ("The run's filter", "Any filter that falls with λ raises gain per cost (Chebyshev's inequality for sums)."),
    "limit": (
        "The limit α → 0",
        "KL of benign text is ½α²φᵀFφ and the change of log p(refusal) αḡᵀφ to leading order. Both right sides are "
        "taken at θ_ft, on the held-out sequences, across all modules: F over the whole vocabulary by differences of "
        "forward passes, and by backward passes with drawn labels, as it is collected.",
    ),
    "2-D": (
        "One Fisher is not enough",
        "A = diag(2, 1) and B = diag(4, 0.1). The first direction of A alone gains 2 and costs 4; the second gains 1 "
        "and costs 0.1. Projection by one Fisher keeps the wrong one.",
    ),
}
"""Claim -> heading and what is claimed."""

COLUMNS = {
    "checked": "how often the statement was tried: pencils, and k or budgets",
    "worst margin": "how far it is from being violated where it is nearest, as a share of its scale (λ₁ for "
    "quotients); of an equation, minus the deviation",
    "tolerance": "how far below zero rounding can take that margin: from n, κ(B) and ‖A‖‖B⁻¹‖, not from the pairs",
    "verdict": "broken, where a margin is below −tolerance; undecided, where rounding alone could do that everywhere",
}
_SWEEP = {
    "measured_kl": "KL(p_ft ‖ p_merged), nats a held-out benign sequence; _se its standard error",
    "predicted_kl": "½α²φᵀFφ, F the stored held-out Fisher without damping",
    "predicted_kl_at_ft": "the same with F at θ_ft across all modules",
    "measured_refusal": "change of log p(refusal), nats a held-out harmful sequence",
    "predicted_refusal": "αḡᵀφ, ḡ from the sequences that found the directions; _held from the held-out ones",
}


def sections(theory: Mapping[str, Any], pictures: Sequence[Picture]) -> list[Section]:
    """The page.

    Args:
        theory: The content of theory.json.
        pictures: From `figures`.

    Returns:
        Its sections; those without numbers are left out.
    """
    by_name = {picture.name: picture for picture in pictures}
    found = [_verdict(theory, by_name["margins"])]
    for claim, (title, text) in HEADINGS.items():
        rows = [_row(row) for row in theory["claims"] if row["claim"] == claim]
        if rows:
            shown = [by_name["two_dimensions"]] if claim == "2-D" else []
            reasons = dict.fromkeys(row["reason"] for row in theory["claims"] if row["claim"] == claim)
            found.append(
                Section(title, [text], rows=rows, pictures=shown, bullets=[f"Tolerance: {r}." for r in reasons])
            )
    if theory["sweep"]:
        found += [_sweep(theory, by_name), *_order(theory, by_name)]
    if theory["failures"]:
        found.append(Section("Everything that failed", rows=theory["failures"]))
    return found


def _verdict(theory: Mapping[str, Any], margins: Picture) -> Section:
    """The head of the page."""
    claims = theory["claims"]
    broken = [row for row in claims if row["passed"] is False]
    undecided = [row for row in claims if row["passed"] is None]
    said = "Every claim holds." if not broken else f"{len(broken)} statements are broken."
    text = [
        f"{said} The theorems hold for the quadratic model exactly, so that a broken one is a fault of the program or "
        "of what it read. What the model predicts of losses is measured, and judged in the limit α → 0 alone.",
    ]
    facts = {
        "run": theory["run"] or "none: planted pencils only",
        "pencils": theory["pencils"],
        "checks": sum(row["checked"] for row in claims),
        "statements broken": len(broken),
        "statements undecided": len(undecided),
        "challengers of each kind": theory["challengers"],
        "seed": theory["seed"],
    }
    return Section("Verdict", text, facts, theory["notes"], [margins], columns=COLUMNS)


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A statement as a row of its claim's table."""
    verdict = {True: "holds", False: "broken", None: "undecided"}[row["passed"]]
    return {
        "statement": row["statement"],
        "checked": row["checked"],
        "worst margin": row["worst_margin"],
        "tolerance": row["tolerance"],
        "where": row["where"],
        "verdict": verdict,
    }


def _sweep(theory: Mapping[str, Any], by_name: Mapping[str, Picture]) -> Section:
    """Predicted against measured over α."""

    def said(key: str) -> str:
        ends = theory["holds"][key]
        return "nowhere in the sweep" if ends is None else f"from α = {ends[0]:.3g} to {ends[1]:.3g}"

    facts = {
        "measured KL within [½, 2] times the prediction, stored Fisher": said("predicted_kl"),
        "the same, Fisher at θ_ft": said("predicted_kl_at_ft"),
        "α of the run": theory["alpha"],
    }
    text = [
        "Reported, not judged: the patch that the run keeps, at several strengths, on the held-out sequences. Beyond "
        "the range, the order of directions is all that the quadratic model can still be right about.",
    ]
    pictures = [by_name["quadratic_kl"], by_name["quadratic_refusal"]]
    return Section(
        "Where the quadratic model holds", text, facts, pictures=pictures, rows=theory["sweep"], columns=_SWEEP
    )


def _order(theory: Mapping[str, Any], by_name: Mapping[str, Picture]) -> list[Section]:
    """Steps of equal cost, at each of the sizes."""
    text = (
        "Reported, not judged: steps φ that all cost as much as α times the kept patch, φᵀBφ, and what they do on the "
        "held-out sequences. T1 ranks them by `ray`. The gain φᵀAφ is even in φ and a second moment; its measured "
        "counterpart is `measured_gain`, E(Δ log p)². The change that is wanted is the mean, `measured_refusal`."
    )
    found = []
    for i, one in enumerate(theory["order"]):
        facts = {
            "α": one["alpha"],
            "φᵀBφ of every step, nats": one["cost"],
            "rank correlation of ray with the measured gain": one["correlation_gain"],
            "rank correlation of ray with the measured change": one["correlation_change"],
        }
        rows = sorted(one["rows"], key=lambda row: -row["ray"])
        title = f"Does the order hold for losses? α = {one['alpha']:.3g}"
        found.append(Section(title, [text], facts, pictures=[by_name[f"order_{i}"]], rows=rows))
    return found
