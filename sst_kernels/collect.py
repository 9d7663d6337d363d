r"""The project's only hooks.

`tap` hands out the gradient of a tensor together with something kept from the forward pass. `CoreGradients` adds a
low-rank update to linear layers and gathers its per-sequence gradients. `LayerTaps` shows the inputs and the output
gradients of layers, forward pass by forward pass.

Core gradients: a module with weight W (d_out × d_in) computes y = W x. In *core coordinates* an update of it is
Q_out C Q_inᵀ with orthonormal Q_out (d_out × r_out) and Q_in (d_in × r_in); the coordinates are φ = vec(C), row-major,
n = r_out·r_in. The hook computes

    x̂ = x Q_in,   z = x̂ Cᵀ,   y ← y + z Q_outᵀ

so that autograd's gradient at z is δ̂ = δ Q_out with δ = ∂/∂y. Both projections that the gradient needs are there
already: per sequence s, ∂/∂φ = Σ_{t∈s} δ̂_t ⊗ x̂_t, one call of `khatri_rao_rows`. The base weight is never touched
(it may be quantised) and gets no gradient. Only x̂ outlives the forward pass. For a convolution x_t is the patch under
output position t (`rows`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import count
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .layer_factors import Rows, sum_dtype
from .ops import khatri_rao_rows
from .rows import fault, input_rows, output_of


class _Tap(torch.autograd.Function):
    """The identity; its backward pass shows the gradient, and what was kept, to `gather`.

    What is kept goes through `save_for_backward`, so gradient checkpointing recomputes it like any activation, and the
    backward of a recomputed graph is never run twice. The output is an alias but, to autograd, no view: modules may
    change it in place.
    """

    @staticmethod
    def forward(ctx, output: Tensor, kept: Tensor, gather: Callable[[Tensor, Tensor], None], anchor: Tensor) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.gather = gather
        return output.detach()

    @staticmethod
    def backward(ctx, delta: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.gather(*ctx.saved_tensors, delta)
        return delta, None, None, None


def tap(output: Tensor, kept: Tensor, gather: Callable[[Tensor, Tensor], None], anchor: Tensor | None = None) -> Tensor:
    """The same values; whenever a gradient δ of them arrives, `gather(kept, δ)` is called.

    Args:
        output: Any floating-point tensor; it need not require a gradient.
        kept: Any tensor without a gradient, kept for the backward pass.
        gather: Called within the backward pass, without gradients.
        anchor: A leaf that requires a gradient. `torch.autograd.grad(loss, anchor, allow_unused=True)` runs just the
            part of the backward pass that leads to taps with that anchor; its own gradient is none.

    Returns:
        An alias of `output` that requires a gradient.
    """
    return _Tap.apply(output, kept, gather, torch.empty(0, requires_grad=True) if anchor is None else anchor)


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


@dataclass(frozen=True)
class TokenGradients:
    """One module's side of a backward pass: x̂_t and δ̂_t of every token; what is made of them is made when asked for.

    Attributes:
        inputs: x̂, (T, r_in), of the model's dtype.
        grads: δ̂, (T, r_out), of the same.
        cu_seqlens: (S+1,), int: sequence s holds the tokens cu_seqlens[s] to cu_seqlens[s+1].
        weight: (T,), w, float32 or float64, or None for ones. Tokens of weight 0 may hold NaN.
        device: Where results go.
    """

    inputs: Tensor
    grads: Tensor
    cu_seqlens: Tensor
    weight: Tensor | None
    device: torch.device

    def rows(self) -> Tensor:
        """Σ_{t∈s} w_t δ̂_t ⊗ x̂_t = ∂loss/∂vec(C) of each sequence s, row-major: (S, n), float32 or float64."""
        return khatri_rao_rows(self.inputs, self.grads, self.cu_seqlens, self.weight).to(self.device)

    def total(self, importance: Tensor | None = None) -> Tensor:
        """Σ_s ω_s Σ_{t∈s} w_t δ̂_t ⊗ x̂_t over all sequences, (n,), float32 or float64; ω, (S,), is 1 unless given."""
        ends, weight = self.cu_seqlens[[0, -1]], self.weight
        if importance is not None:
            share = self.by_token(importance).to(self.inputs.device, sum_dtype(self.inputs.dtype))
            weight = share if weight is None else share * weight
        return khatri_rao_rows(self.inputs, self.grads, ends, weight)[0].to(self.device)

    def by_token(self, importance: Tensor) -> Tensor:
        """ω of each token's sequence, (T,), from ω of the sequences, (S,); 0 for tokens of none."""
        ends = self.cu_seqlens.to(importance.device)
        share = importance.new_zeros(len(self.inputs))
        share[int(ends[0]) : int(ends[-1])] = importance.repeat_interleave(ends.diff())
        return share

    @cached_property
    def expanded(self) -> Rows:
        """(x̂_t, δ̂_t) of each token, with weight w_t where it bears gradient, δ̂_t ≠ 0, and 0 elsewhere."""
        bears = (self.grads != 0).any(1).to(sum_dtype(self.grads.dtype))
        weight = bears if self.weight is None else bears * self.weight
        return Rows(*(tensor.to(self.device) for tensor in (self.inputs, self.grads, weight)))

    @cached_property
    def reduced(self) -> Rows:
        """(mean_t x̂_t, Σ_t δ̂_t) of each sequence, over its tokens that bear gradient; weight 1 if there are any."""
        return self.expanded.reduced(self.cu_seqlens.to(self.device))


class CoreGradients:
    """Context manager: the model computes with its cores, and every backward pass hands out its gradients.

    While it is entered, parameters of `model` require no gradient (restored at exit), and each call of
    `loss.backward()` calls `consume(name, gradients)` once per watched module: x̂ and δ̂ of the tokens that `layout`
    described, from which `gradients.rows()` are the (S, n) = ∂loss/∂vec(C) of its S sequences, in float32 (float64 for
    a float64 model). A backward pass may be repeated (`retain_graph=True`): gradients are handed out again. Gradient
    checkpointing changes nothing; its recomputation runs the hooks, but gradients reach only one of the two graphs.

    Args:
        model: Any module; its submodules named in `bases` must map (..., d_in) to (..., d_out), or be embeddings or
            Conv1d or Conv2d of one group, whose tokens are output positions. They may lie on several devices.
        bases: Module name -> `CoreBasis`, all on one device: there results are handed out. Every core starts as zero.
        watched: Names of the modules whose gradients are gathered; the others only compute with their cores.

    Attributes:
        consume: Called as `consume(name, gradients)`, of `TokenGradients`, during the backward pass; assign it before.
        observe: Called as `observe(name, rows)` in every forward pass, for every module, with the rows of its input
            (`rows.input_rows`: (..., d_in), an embedding's indices (...)); None shows nothing.

    Raises:
        ValueError: The model has no module of that name, or it computes something else (`rows.fault`).
    """

    def __init__(self, model: nn.Module, bases: Mapping[str, CoreBasis], watched: Collection[str]) -> None:
        modules = dict(model.named_modules())
        for name in bases:
            if name not in modules:
                raise ValueError(f"bases: the model has no module named {name!r}; use names of model.named_modules()")
            if reason := fault(modules[name]):
                raise ValueError(f"bases: {name!r} is no linear map of its input's rows: {reason}; leave it out")
        self.model, self.bases, self.watched = model, bases, frozenset(watched)
        self.consume: Callable[[str, TokenGradients], None] | None = None
        self.observe: Callable[[str, Tensor], None] | None = None
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

    def _bases_like(self, name: str, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q_in, C, Q_out in the output's dtype and on its device, cast once and kept until the cores change."""
        known = self._cast.get(name)
        if known is None or (known[0].dtype, known[0].device) != (output.dtype, output.device):
            basis = self.bases[name]
            self._cast[name] = tuple(t.to(output) for t in (basis.q_in, self.cores[name], basis.q_out))
        return self._cast[name]

    def _add_update(self, name: str, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """Y + (x Q_in) Cᵀ Q_outᵀ; where gradients are on, arrange for its gradient to be gathered."""
        if self.observe is not None:
            self.observe(name, input_rows(module, args[0]))
        q_in, core, q_out = self._bases_like(name, output)
        x_hat = input_rows(module, args[0].to(output.device), q_in)
        z = x_hat @ core.mT
        if torch.is_grad_enabled() and name in self.watched:
            z = tap(z, x_hat.detach(), partial(self._gather, name))
        return output + output_of(module, z @ q_out.mT, output)

    def _gather(self, name: str, x_hat: Tensor, delta_hat: Tensor) -> None:
        """X̂ and δ̂ of the tokens, given to `consume`."""
        x_hat, delta_hat = x_hat.flatten(0, -2), delta_hat.flatten(0, -2)
        if self._cu_seqlens is None or self.consume is None:
            raise RuntimeError("assign `consume` and call `layout(cu_seqlens, weight)` before the backward pass")
        if self._weight is not None and len(x_hat) != len(self._weight):
            raise ValueError(
                f"module {name!r} saw {len(x_hat)} tokens but the batch's layout has {len(self._weight)}: modules that "
                "see other tokens (routed experts, position embeddings) are not covered"
            )
        device, weight = x_hat.device, self._weight
        if weight is not None:
            weight = weight.to(device, sum_dtype(x_hat.dtype))
        home = self.bases[name].q_out.device
        self.consume(name, TokenGradients(x_hat, delta_hat, self._cu_seqlens.to(device), weight, home))


def uncompiled(model: nn.Module) -> nn.Module:
    """The module inside what torch.compile returned."""
    return getattr(model, "_orig_mod", model)


@dataclass(eq=False)
class ForwardPass:
    """One forward pass of the model with gradients on.

    Attributes:
        tapped: Whether its layers are tapped.
        layout: What the visitor knows of its tokens.
        calls: Layer -> for each call, in order, the number of its input; equal numbers are one tensor.
        alpha: Factor of δ δᵀ in the backward pass that now runs through it; None while none does that counts.
        running: Whether the forward pass has not returned yet.
        hidden: A layer that was called with gradients off, as in blocks under reentrant checkpointing.
    """

    tapped: bool
    layout: Any = None
    calls: dict[str, list[int]] = field(default_factory=dict)
    alpha: float | None = None
    running: bool = True
    hidden: str | None = None
    inputs: dict[int, tuple[weakref.ref, int]] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=count)

    def record(self, name: str, x: Tensor) -> None:
        """Note which tensor a layer was called with."""
        known = self.inputs.get(id(x))
        if known is None or known[0]() is not x:  # an id may be that of a tensor that is gone
            known = self.inputs[id(x)] = (weakref.ref(x), next(self.numbers))
        self.calls.setdefault(name, []).append(known[1])


class Visitor(Protocol):
    """What `LayerTaps` asks and tells."""

    def begin(self, args: tuple, kwargs: dict) -> ForwardPass | None:
        """The model is called, with gradients on or off."""

    def keep(self, name: str, passing: ForwardPass, x: Tensor, output: Tensor) -> Tensor:
        """What to keep of a layer's input for the backward pass."""

    def gather(self, name: str, passing: ForwardPass, kept: Tensor, delta: Tensor) -> None:
        """The gradient of the layer's output has arrived."""

    def end(self, passing: ForwardPass, kwargs: dict, output: Any) -> None:
        """The model has returned."""


class LayerTaps:
    """Context manager: every forward pass of the model taps its layers, and says so to a visitor.

    Gradients begin at the first tapped layer even if the whole model is frozen. A gradient-checkpointed block calls
    its layers twice; the second time, inside the backward pass, is told by the pass whose outputs that backward pass
    has just come through, so several forward passes may precede their backward passes.

    Code that torch.compile made does not see hooks that come later, and traces away those that it sees. While entered
    it runs eagerly; if `model` is itself what torch.compile returned, only from a tapped pass to the next pass.

    Args:
        model: The module that is called.
        names: Submodules to tap; each must map one tensor to one tensor.
        visitor: What is asked and told.
    """

    def __init__(self, model: nn.Module, names: Collection[str], visitor: Visitor) -> None:
        self.model, self.names, self.visitor = model, names, visitor
        self.anchor = torch.empty(0, requires_grad=True)
        self.current: ForwardPass | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._eager: AbstractContextManager | None = None

    def __enter__(self) -> LayerTaps:
        if self.installed:
            raise ValueError("the layers are tapped already, and would count twice; enter the accumulator once")
        self._handles.append(self.model.register_forward_pre_hook(self._begin, with_kwargs=True))
        for name in self.names:
            module = uncompiled(self.model).get_submodule(name)
            self._handles.append(module.register_forward_hook(partial(self._tap, name), with_kwargs=True))
        self._handles.append(self.model.register_forward_hook(self._end, with_kwargs=True))
        self._run_eagerly(True)
        return self

    def __exit__(self, *exc: object) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._run_eagerly(False)
        self.current = None

    @property
    def installed(self) -> bool:
        """Whether the context is entered."""
        return bool(self._handles)

    def _run_eagerly(self, eagerly: bool) -> None:
        """Whether compiled code is passed by, in this process."""
        if eagerly and self._eager is None:
            self._eager = torch.compiler.set_stance("force_eager")
        elif not eagerly and self._eager is not None:
            self._eager.__exit__(None, None, None)
            self._eager = None

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if torch._C._current_graph_task_id() != -1:  # the model itself is checkpointed, and called once more
            return
        self.current = self.visitor.begin(args, kwargs)
        if self.model is not uncompiled(self.model):  # so this hook runs whatever the stance
            self._run_eagerly(self.current is not None and self.current.tapped)

    def _tap(self, name: str, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
        passing = self.current
        if passing is None or not passing.tapped:
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        if passing.running:
            passing.record(name, x)
        if not torch.is_grad_enabled():
            passing.hidden = name if passing.running else passing.hidden
            return None
        with torch.no_grad():
            kept = self.visitor.keep(name, passing, x.detach(), output)
        return tap(output, kept, partial(self.visitor.gather, name, passing), self.anchor)

    def _end(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        passing = self.current
        if passing is None or not passing.running:
            return
        passing.running = False
        passing.inputs.clear()
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(partial(self._enter_backward, passing))
        self.visitor.end(passing, kwargs, output)

    def _enter_backward(self, passing: ForwardPass, gradient: Tensor) -> None:
        self.current = passing
