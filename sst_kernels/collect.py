r"""The project's only hooks: they add a low-rank update to linear layers and gather its per-sequence gradients.

A module with weight W (d_out × d_in) computes y = W x. In *core coordinates* an update of it is Q_out C Q_inᵀ with
orthonormal Q_out (d_out × r_out) and Q_in (d_in × r_in); the coordinates are φ = vec(C), row-major, n = r_out·r_in.
The hook computes

    x̂ = x Q_in,   z = x̂ Cᵀ,   y ← y + z Q_outᵀ

so that autograd's gradient at z is δ̂ = δ Q_out with δ = ∂/∂y. Both projections that the gradient needs are there
already: per sequence s, ∂/∂φ = Σ_{t∈s} δ̂_t ⊗ x̂_t, one call of `khatri_rao_rows`. The base weight is never touched
(it may be quantised) and gets no gradient. Only x̂ outlives the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .ops import khatri_rao_rows


@dataclass(frozen=True)
class CoreBasis:
    """Orthonormal bases of one module's update space.

    Attributes:
        q_out: (d_out, r_out), orthonormal columns.
        q_in: (d_in, r_in), orthonormal columns; for an embedding d_in is the size of the vocabulary.
    """

    q_out: Tensor
    q_in: Tensor

    @property
    def core_shape(self) -> tuple[int, int]:
        """(r_out, r_in), the shape of C."""
        return self.q_out.shape[1], self.q_in.shape[1]

    @property
    def n(self) -> int:
        """Number of coordinates, r_out·r_in."""
        return self.q_out.shape[1] * self.q_in.shape[1]


class CoreGradients:
    """Context manager: the model computes with its cores, and every backward pass hands out gradient rows.

    While it is entered, parameters of `model` require no gradient (restored at exit), and each call of
    `loss.backward()` calls `consume(name, rows)` once per watched module, rows (S, n) = ∂loss/∂vec(C) for each of the
    S sequences that `layout` described, in float32 (float64 for a float64 model). A backward pass may be repeated
    (`retain_graph=True`): rows are handed out again. Gradient checkpointing changes nothing; its recomputation runs
    the hooks, but gradients reach only one of the two graphs.

    Args:
        model: Any module; its submodules named in `bases` must map (..., d_in) to (..., d_out), or be embeddings.
        bases: Module name -> `CoreBasis`, on the module's device. Every core starts as zero.
        watched: Names of the modules whose gradients are gathered; the others only compute with their cores.

    Attributes:
        consume: Called as `consume(name, rows)` during the backward pass; assign it before.

    Raises:
        ValueError: The model has no module of that name.
    """

    def __init__(self, model: nn.Module, bases: Mapping[str, CoreBasis], watched: Collection[str]) -> None:
        modules = dict(model.named_modules())
        for name in bases:
            if name not in modules:
                raise ValueError(f"bases: the model has no module named {name!r}; use names of model.named_modules()")
        self.model, self.bases, self.watched = model, bases, frozenset(watched)
        self.consume: Callable[[str, Tensor], None] | None = None
        self._modules = {name: modules[name] for name in bases}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._frozen: list[nn.Parameter] = []
        self._cu_seqlens: Tensor | None = None
        self._weight: Tensor | None = None
        self.set_cores({})

    def set_cores(self, cores: Mapping[str, Tensor]) -> None:
        """C ← cores[name] for every module; a module that is not named gets C = 0.

        Args:
            cores: Module name -> (r_out, r_in).

        Raises:
            ValueError: A name is not in `bases`, or a shape differs.
        """
        for name, core in cores.items():
            expected = self.bases[name].core_shape if name in self.bases else None
            if expected != tuple(core.shape):
                raise ValueError(f"cores[{name!r}] must be {expected} to match its basis, got {tuple(core.shape)}")
        self.cores = {
            name: cores[name] if name in cores else basis.q_out.new_zeros(basis.core_shape)
            for name, basis in self.bases.items()
        }
        self._cast: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def layout(self, cu_seqlens: Tensor, weight: Tensor | None = None) -> None:
        """Say how the next batch's tokens, flattened, divide into sequences.

        Args:
            cu_seqlens: (S+1,), int: sequence s holds the flattened tokens cu_seqlens[s] to cu_seqlens[s+1].
            weight: (T,), any dtype, weight of each flattened token; 0 keeps a padding token, NaN included, out of
                every sum.
        """
        self._cu_seqlens, self._weight = cu_seqlens, weight

    def __enter__(self) -> CoreGradients:
        self._frozen = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(partial(self._add_update, name)))
        return self

    def __exit__(self, *exc: object) -> None:
        while self._handles:
            self._handles.pop().remove()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []

    def _bases_as(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Q_in, C, Q_out in the module's dtype, cast once and kept until the cores change."""
        if name not in self._cast or self._cast[name][0].dtype != dtype:
            basis = self.bases[name]
            self._cast[name] = tuple(t.to(dtype) for t in (basis.q_in, self.cores[name], basis.q_out))
        return self._cast[name]

    def _add_update(self, name: str, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """Y + (x Q_in) Cᵀ Q_outᵀ; where gradients are on, arrange for its row to be gathered."""
        q_in, core, q_out = self._bases_as(name, output.dtype)
        x = args[0]
        x_hat = F.embedding(x, q_in) if isinstance(module, nn.Embedding) else x.to(output.dtype) @ q_in
        z = x_hat @ core.mT
        if torch.is_grad_enabled() and name in self.watched:
            if not z.requires_grad:  # nothing before this module is differentiated: gradients begin here
                z.requires_grad_()
            z.register_hook(partial(self._gather, name, x_hat.detach()))
        return output + z @ q_out.mT

    @torch.no_grad()
    def _gather(self, name: str, x_hat: Tensor, delta_hat: Tensor) -> None:
        """rows[s] = Σ_{t∈s} w_t δ̂_t ⊗ x̂_t, given to `consume`."""
        x_hat, delta_hat = x_hat.flatten(0, -2), delta_hat.flatten(0, -2)
        if self._cu_seqlens is None or self.consume is None:
            raise RuntimeError("assign `consume` and call `layout(cu_seqlens, weight)` before the backward pass")
        if self._weight is not None and len(x_hat) != len(self._weight):
            raise ValueError(
                f"module {name!r} saw {len(x_hat)} tokens but the batch's layout has {len(self._weight)}: modules that "
                "see other tokens (routed experts, position embeddings) are not covered"
            )
        weight = self._weight
        if weight is not None:
            weight = weight.to(torch.float64 if x_hat.dtype == torch.float64 else torch.float32)
        self.consume(name, khatri_rao_rows(x_hat, delta_hat, self._cu_seqlens, weight))
