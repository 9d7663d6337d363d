r"""Gain, cost and R of the step that a merge makes away from the utility model, for every method alike.

φ = vec(Δ(α) − Δ_u) over all modules; gain φᵀA_hφ, cost φᵀB_hφ and R = gain/cost, nats per sequence, with the held-out
Fishers A_h (refusals) and B_h (benign text, labels sampled), taken at the points that the judging parameters name and
with the curvature between modules. Neither is ever formed: φᵀFφ = E[(gᵀφ)²], and with g_m = Σ_t δ_t x_tᵀ of module m

    gᵀφ = Σ_m Σ_t δ_tᵀ φ_m x_t,

so one forward and one backward pass over the held-out sequences gives both for any number of steps, exactly, whether
φ_m lies in the core coordinates (then φ_m = Q_out C Q_inᵀ, and only projections of x_t and δ_t are multiplied) or, as
masks and dropped entries do, outside them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sst_kernels.collect import CoreBasis, CoreGradients, tap
from sst_kernels.rows import grad_rows, input_rows

from ..adapters import LowRank
from ..base import input_device
from ..data import TokenSequence
from ..fisher import log_likelihood
from ..methods import Plan
from ..packing import Batch, batches
from ..problem import Problem
from ..settings import FisherParameters


@dataclass(frozen=True)
class Step:
    """The quadratic forms of one step.

    Attributes:
        gain: φᵀA_hφ, nats per sequence.
        cost: φᵀB_hφ, nats per sequence.
    """

    gain: float
    cost: float

    @property
    def ratio(self) -> float | None:
        """R = gain/cost; None where the step costs nothing."""
        return self.gain / self.cost if self.cost > 0 else None


def quadratics(problem: Problem, plan: Plan, alphas: Sequence[float], judge: FisherParameters) -> list[Step]:
    """φᵀA_hφ and φᵀB_hφ of the step at every strength.

    Args:
        problem: Model, adapters and held-out sequences.
        plan: The solved merge.
        alphas: K strengths; K dense steps are held at once if the method is no low-rank one.
        judge: Patch, points, samples and seed of the Fishers that judge.

    Returns:
        A result for each strength.

    Cost: a forward and a backward pass over the held-out sequences at every point, and 2K·d_out·d_in flops a token and
    module (K·r_out·r_in in core coordinates).
    """
    steps = {name: _steps(problem, plan, name, alphas) for name in problem.names}
    moving = _path(problem, judge)
    gain, cost = (
        _mean_squares(problem, plan, steps, moving, judge if sampled else None, kind)
        for kind, sampled in (("harm", False), ("benign", True))
    )
    return [Step(float(a), float(b)) for a, b in zip(gain, cost, strict=True)]


def _steps(problem: Problem, plan: Plan, name: str, alphas: Sequence[float]) -> Tensor:
    """Δ(α) − Δ_u of a module at every strength, (K, r_out, r_in) in core coordinates or (K, d_out, d_in)."""
    origin = problem.cores(name)[0] if plan.in_core else problem.updates(name)[0].dense()
    merged = (plan.update(name, alpha) for alpha in alphas)
    matrices = (update.dense() if isinstance(update, LowRank) else update for update in merged)
    return torch.stack([(matrix.to(origin) - origin).float() for matrix in matrices])


def _path(problem: Problem, judge: FisherParameters) -> list[tuple[float, dict[str, Tensor]]]:
    """(weight, cores) of the points where the Fishers are taken."""
    cores = {name: problem.cores(name) for name in problem.names}
    points = zip(*judge.weighted_points, strict=True)
    additive = judge.patch == "additive"
    return [(w, {n: u + t * (s if additive else s - u) for n, (u, s) in cores.items()}) for t, w in points]


def _mean_squares(
    problem: Problem,
    plan: Plan,
    steps: Mapping[str, Tensor],
    points: Sequence[tuple[float, Mapping[str, Tensor]]],
    sampling: FisherParameters | None,
    kind: str,
) -> Tensor:
    """Σ_t w_t E_t[(gᵀφ_k)²], E_t over held-out sequences of task t, (K,), float64; labels sampled, or given (None)."""
    seed, samples = (None, 1) if sampling is None else (sampling.seed, sampling.samples)
    size, mean = problem.config.calibration.batch_size, 0.0
    shares = [(task.held, task.weight / sum(s.weight for s in task.held)) for task in problem.tasks[kind]]
    with CoreGradients(problem.model, problem.bases, watched=()) as update, _derivatives(problem, plan, steps) as dots:
        for weight, cores in points:
            update.set_cores(cores)
            for share, batch in _held_batches(shares, size, input_device(problem.model)):
                for sample in range(samples):
                    dots.clear()
                    log_likelihood(problem.model, batch, seed, sample)[0].backward()
                    mean = mean + weight * share / samples * (batch.weight.cpu().double() @ sum(dots).square())
    return mean


def _held_batches(
    shares: Sequence[tuple[Sequence[TokenSequence], float]], size: int, device: torch.device
) -> Iterator[tuple[float, Batch]]:
    """(w_t / Σω, batch) over all tasks."""
    for sequences, share in shares:
        yield from ((share, batch) for batch in batches(sequences, size, device))


@contextmanager
def _derivatives(problem: Problem, plan: Plan, steps: Mapping[str, Tensor]) -> Iterator[list[Tensor]]:
    """Every backward pass appends, for each module, Σ_t δ_tᵀφ_k x_t: (sequences, K), float64."""
    dots: list[Tensor] = []
    anchor = torch.empty(0, requires_grad=True)
    with ExitStack() as stack:
        for name, phi in steps.items():
            basis = problem.bases[name] if plan.in_core else None
            hook = _hook(dots, phi, basis, anchor)
            handle = problem.model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield dots


def _hook(dots: list[Tensor], phi: Tensor, basis: CoreBasis | None, anchor: Tensor):
    """A forward hook that taps the output's gradient δ, and multiplies it with φ_k x."""

    def forward(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        x = (args[0] if args else next(iter(kwargs.values()))).detach()

        def gather(kept: Tensor, delta: Tensor) -> None:
            dots.append(_contract(module, kept, delta.detach(), phi, basis))

        return tap(output, x, gather, anchor)

    return forward


def _contract(module: nn.Module, x: Tensor, delta: Tensor, phi: Tensor, basis: CoreBasis | None) -> Tensor:
    """Σ_t δ_tᵀφ_k x_t for every sequence (one a row of the batch), (S, K), float64."""
    delta = grad_rows(module, delta).float()
    phi = phi.to(delta)
    if basis is not None:
        delta = delta @ basis.q_out.to(delta)
        x = input_rows(module, x, basis.q_in.to(delta))
    elif isinstance(module, nn.Embedding):
        scale = getattr(module, "embed_scale", 1.0)
        return torch.stack([((F.embedding(x, p.mT) * scale) * delta).flatten(1).sum(1) for p in phi], 1).double().cpu()
    else:
        x = input_rows(module, x).to(delta)
    return torch.stack([((x @ p.mT) * delta).flatten(1).sum(1) for p in phi], 1).double().cpu()
