"""T4 to T6: what filters of a patch gain and cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..directions import Directions
from ..select import kept_coefficients
from ..settings import SstParameters
from .checks import Check
from .solved import EPS, REASON, REASON_B, Solved, normal

_SHARES = (0.1, 0.5, 0.9)  # budgets, as shares of the whole patch's cost
_MUS = (1.0, 0.01)  # μ in units of λ₁
_SUMS = "4mε Σc²/ρ: rounding of sums of m terms"
_DROPPED = f"{REASON}; besides 3η, already added: rounding of P_kφ over what is dropped"


def b_projector(vectors: Tensor, b: Tensor) -> Tensor:
    """P = V Vᵀ B."""
    return vectors @ (vectors.mT @ b)


def projection(
    s: Solved, rng: torch.Generator, count: int, projector: Callable[[Tensor, Tensor], Tensor] = b_projector
) -> list[Check]:
    """T4, P_k = V_kV_kᵀB is the B-orthogonal projector, Ray(P_kφ) ≥ Ray(φ), Ray(P_kφ) ≥ λ_k ≥ Ray((I−P_k)φ).

    Args:
        s: The pencil, its pairs and its patch.
        rng: Of other patches.
        count: How many others.
        projector: (V_k, B) -> P_k.

    Returns:
        Six checks for every k.

    Cost: O(n³) flops for every k.
    """
    patches = torch.cat([s.phi[:, None], s.whitened(normal(rng, s.n, count)), normal(rng, s.n, count)], 1)
    patches = patches[:, patches.any(0)]
    c = s.vectors.mT @ (s.b @ patches)
    gain = (s.values[:, None] * c.square()).sum(0) / s.squared(patches)
    checks = [_check(s, "φᵀAφ = Σ λ_i c_i², c = VᵀBφ", -float((gain - s.ray(patches)).abs().max()) / s.scale)]
    for k in s.ranks():
        p = projector(s.vectors[:, :k], s.b)
        where, last = f"{s.name}, k = {k}", float(s.values[k - 1])
        checks += _of_projector(s, p, where)
        kept, whole, _ = _judged(s, p @ patches, patches)
        if len(kept):
            checks.append(_check(s, "Ray(P_kφ) ≥ Ray(φ)", float((kept - whole).min()) / s.scale, where))
            checks.append(_check(s, "Ray(P_kφ) ≥ λ_k", float(kept.min() - last) / s.scale, where))
        dropped, _, eta = _judged(s, patches - p @ patches, patches)
        if len(dropped):
            margin = float(((last - dropped) / s.scale + 3 * eta).min())
            checks.append(replace(_check(s, "λ_k ≥ Ray((I−P_k)φ)", margin, where), reason=_DROPPED))
    return checks


def _judged(s: Solved, part: Tensor, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ray of the parts that are more than rounding of their patches, of these patches, and the share η of rounding."""
    eta = s.tolerance_b * (s.squared(patches) / s.squared(part).clamp(min=1e-300)).sqrt()
    judged = ~(eta > 0.01)  # NaN is judged, and fails
    return s.ray(part[:, judged]), s.ray(patches[:, judged]), eta[judged]


def _check(s: Solved, statement: str, margin: float, where: str = "") -> Check:
    """A check of T4 with the tolerance of Rayleigh quotients."""
    return Check("T4", where or s.name, statement, margin, s.tolerance, REASON)


def _of_projector(s: Solved, p: Tensor, where: str) -> list[Check]:
    """P² = P and BP = PᵀB, both in the metric B: LᵀPL⁻ᵀ is an orthogonal projector."""
    symmetric = s.factor.mT @ torch.linalg.solve_triangular(s.factor, p.mT, upper=False).mT
    idempotent = -float((symmetric @ symmetric - symmetric).norm(2)) if p.isfinite().all() else float("nan")
    adjoint = -float((symmetric - symmetric.mT).norm()) / max(float(symmetric.norm()), EPS)
    return [
        Check("T4", where, "P_k² = P_k", idempotent, s.tolerance_b, REASON_B),
        Check("T4", where, "BP_k = P_kᵀB", adjoint, s.tolerance_b, REASON_B),
    ]


def _of(values: Tensor, coefficients: Tensor, settings: SstParameters) -> Tensor:
    """Coefficients that the selection of the merge keeps of one pencil's patch."""
    m, none = len(values), torch.zeros_like(values)
    one = Directions(
        names=(),
        values=values,
        vectors=values.new_zeros(0, m),
        coefficients=coefficients,
        gain_full=0.0,
        cost_full=0.0,
        gradient=none,
        ray_held=none,
        damping_share=none,
        shrinkage=(0.0, 0.0),
        status="",
    )
    return kept_coefficients({"": one}, settings, alpha=1.0)[""]


def greedy(values: Tensor, coefficients: Tensor, rho: float) -> Tensor:
    """What `select: budget` keeps: coefficients s with Σ s² ≤ ρ."""
    return _of(values, coefficients, SstParameters(select="budget", rho=rho / 2))


def soft(values: Tensor, coefficients: Tensor, mu: float) -> Tensor:
    """What `select: soft` keeps: s_i = c_i λ_i/(λ_i + μ)."""
    return _of(values, coefficients, SstParameters(select="soft", mu=mu))


def knapsack(
    name: str,
    values: Tensor,
    coefficients: Tensor,
    rng: torch.Generator,
    count: int,
    rule: Callable[[Tensor, Tensor, float], Tensor] = greedy,
) -> list[Check]:
    """T5, of all filters Σ f_i c_i v_i, f ∈ [0, 1], of cost Σ f²c² ≤ ρ, greedy by λ gains most.

    Besides challengers, the bound of linear programming's dual: for every μ ≥ 0 no filter gains more than
    ρμ + Σ c_i²(λ_i − μ)₊, and greedy reaches the least of these.

    Args:
        name: The pencil's; or of several pencils, whose pairs are then taken together.
        values: (m,), λ.
        coefficients: (m,), c.
        rng: Of the filters.
        count: How many filters of each kind for every budget.
        rule: (λ, c, ρ) -> coefficients that greedy keeps.

    Returns:
        Checks over all budgets.

    Cost: O(m² + m · count) flops for every budget.
    """
    values, costs = values.clamp(min=0), coefficients.square()
    whole, scale = float(costs.sum()), float(values.max())
    tops = {k: float(costs[:k].sum()) for k in (1, len(values) // 20, len(values) // 4) if k}
    checks: list[Check] = []

    def check(statement: str, margin: float, rho: float) -> None:
        tolerance = 4 * max(len(values), 16) * EPS * whole / rho
        checks.append(Check("T5", name, statement, margin, tolerance, _SUMS))

    for rho in (*(share * whole for share in _SHARES), *tops.values()):
        if not rho * scale > 0:
            continue
        kept, unit = rule(values, coefficients, rho).square(), scale * rho
        gain = float((values * kept).sum())
        best = max(float((f @ (values * costs)).max()) for f in _filters(costs, kept, rho, rng, count))
        check("Σ f²c² ≤ ρ for greedy f", 1 - float(kept.sum()) / rho, rho)
        check("0 ≤ f ≤ 1 for greedy f", float((costs - kept).min()) / rho, rho)
        check("Σ λf²c² ≤ greedy's for f ∈ [0,1], Σ f²c² ≤ ρ", (gain - best) / unit, rho)
        check("min_μ ρμ + Σ c²(λ−μ)₊ = greedy's", -abs(gain - _dual(values, costs, rho)) / unit, rho)
    for k, rho in tops.items():
        if rho * scale > 0:
            kept = rule(values, coefficients, rho).square()
            short = float((values[:k] * costs[:k]).sum() - (values * kept).sum())
            check("top-k gains as much as greedy at ρ = Σ_{i≤k} c_i²", -abs(short) / (scale * rho), rho)
    return checks


def _filters(costs: Tensor, kept: Tensor, rho: float, rng: torch.Generator, count: int) -> list[Tensor]:
    """Rows f² in [0, 1] of cost ρ at most: random, sparse, and greedy's perturbed."""
    random = torch.rand(count, len(costs), generator=rng, dtype=torch.float64)
    sparse = random * (torch.rand(count, len(costs), generator=rng, dtype=torch.float64) < 0.2)
    own = torch.where(costs > 0, kept / costs, 0.0)
    near = (own + 0.1 * normal(rng, count, len(costs))).clamp(0, 1)
    return [f * (rho / (f @ costs).clamp(min=1e-300)).clamp(max=1)[:, None] for f in (random, sparse, near)]


def _dual(values: Tensor, costs: Tensor, rho: float) -> float:
    """The least of ρμ + Σ c²(λ − μ)₊: convex and piecewise linear, so it is at μ = 0 or at one of the λ."""
    ordered, at = values.sort(descending=True)
    c = costs[at]
    spent, gained = c.cumsum(0), (c * ordered).cumsum(0)
    bounds = rho * ordered + gained - ordered * spent
    return min(float(bounds.min()), float(gained[-1]))


def ridge(
    s: Solved, rng: torch.Generator, count: int, rule: Callable[[Tensor, Tensor, float], Tensor] = soft
) -> list[Check]:
    """T6, argmin (φ−τ)ᵀA(φ−τ) + μφᵀBφ = (A+μB)⁻¹Aτ = Σ λ_i/(λ_i+μ) c_i v_i, and N_μ = tr[A(A+μB)⁻¹] = Σ λ_i/(λ_i+μ).

    Args:
        s: The pencil, its pairs and its patch τ.
        rng: Of the challengers.
        count: How many challengers of each size.
        rule: (λ, c, μ) -> coefficients of the minimiser.

    Returns:
        Stationarity, that no challenger has a smaller objective, and the degrees of freedom, for every μ.

    Cost: O(n³) flops for every μ.
    """
    tau, length = s.phi, float(s.squared(s.phi[:, None])) ** 0.5
    if not length > 0:
        return []
    checks = []
    for share in _MUS:
        mu, where = share * s.scale, f"{s.name}, μ = {share:g} λ₁"
        phi = s.vectors @ rule(s.values, s.coefficients, mu)
        system = s.a + mu * s.b
        residual = s.dual_norm((system @ phi - s.a @ tau)[:, None]) / (s.scale * length)
        steps = torch.cat([t * length * s.whitened(normal(rng, s.n, count)) / s.n**0.5 for t in (1.0, 1e-2, 1e-4)], 1)
        others = torch.cat([phi[:, None] + steps, torch.stack([tau, 0 * tau, phi / 2, 1.1 * phi], 1)], 1)
        least = float(_objective(s, others, mu).min() - _objective(s, phi[:, None], mu)[0])
        freedom = float(torch.linalg.solve(system, s.a).trace())
        claimed = float((s.values / (s.values + mu)).sum())
        by_mu = f"{REASON}, times λ₁/μ"
        checks += [
            Check("T6", where, "(A+μB)φ = Aτ", -residual, s.tolerance, REASON),
            Check(
                "T6",
                where,
                "(φ−τ)ᵀA(φ−τ) + μφᵀBφ is least",
                least / (s.scale * length**2),
                s.tolerance * (1 + share),
                f"{REASON}, times 1 + μ/λ₁",
            ),
            Check("T6", where, "N_μ = Σ λ/(λ+μ)", -abs(freedom - claimed) / s.n, s.tolerance / share, by_mu),
        ]
    return checks


def _objective(s: Solved, phi: Tensor, mu: float) -> Tensor:
    """(φ−τ)ᵀA(φ−τ) + μφᵀBφ of every column."""
    rest = phi - s.phi[:, None]
    return (rest * (s.a @ rest)).sum(0) + mu * s.squared(phi)


def of_run(s: Solved, coefficients: Tensor, kept: Tensor) -> list[Check]:
    """What a run kept of its patch: f in [0, 1], falling with λ, so that Ray(Filter(τ)) ≥ Ray(τ) (Chebyshev's sums).

    Args:
        s: The pencil, its pairs and its patch τ.
        coefficients: (m,), c as the merge has them.
        kept: (m,), f_i c_i as the merge has them.

    Returns:
        Three checks, or two where nothing is kept.
    """
    f = torch.where(coefficients != 0, kept / coefficients, torch.nan).cpu()
    f = f[~f.isnan()]
    falling = float((f[:-1] - f[1:]).min()) if len(f) > 1 else 0.0
    inside = float(torch.minimum(f, 1 - f).min()) if len(f) else 0.0
    tolerance, reason = 4 * EPS, "4ε: of a quotient"
    checks = [
        Check("run", s.name, "0 ≤ f ≤ 1 in what the run keeps", inside, tolerance, reason),
        Check("run", s.name, "f falls with λ in what the run keeps", falling, tolerance, reason),
    ]
    step = torch.where(coefficients != 0, kept / coefficients, 0.0).cpu() * s.coefficients
    if step.any():
        rays = s.ray(torch.stack([s.vectors @ step, s.phi], 1))
        margin = float(rays[0] - rays[1]) / s.scale
        checks.append(Check("run", s.name, "Ray(Filter(τ)) ≥ Ray(τ) of the run's patch", margin, s.tolerance, REASON))
    return checks
