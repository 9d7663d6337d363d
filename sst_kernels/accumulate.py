r"""Kronecker factors of a model's layers, gathered inside any training or evaluation loop.

    with FactorAccumulator(model, fisher="true") as acc:
        for batch in data:
            logits = model(**batch).logits
            acc.sampled_loss(logits).backward()
    A, G = acc.factors.mean("model.layers.0.mlp.up_proj")

F ≈ G ⊗ A with A = E[x xᵀ] and G = E[δ δᵀ], δ the gradient of a *sum* of token losses (Martens and Grosse 2015).
*expand* takes tokens as rows; *reduce* takes sequences, x̄ = mean_t x_t and δ̄ = Σ_t δ_t (Eschenhagen et al. 2023,
K-FAC-expand and K-FAC-reduce). A Fisher is *true* if the labels are drawn from the model itself and *empirical* if they
are the training data's. Only a backward pass whose loss was declared, as the one that was asked for, is counted.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn import functional as F

from .collect import CoreBasis, ForwardPass, LayerTaps, uncompiled
from .factors import AccumulatorOptions, Factors
from .labels import counter_uniform, sample_labels
from .layer_factors import LayerFactors, Rows, sum_dtype
from .layers import Modules, beyond, gathered_rows, model_sum_dtype, select, tied_names, warn_of
from .layout import TokenLayout, batch_shape
from .rows import input_rows, leading
from .sharing import InputSharing

_NO_PASS = (
    "loss: no forward pass with gradients ran inside the context, or one without came after it; declare each loss "
    "right after its forward pass"
)


class FactorAccumulator:
    """Context manager: while entered, backward passes of declared losses add to the layers' Kronecker factors.

    A plain training loop for the empirical Fisher, then for the true one:

        acc.training_loss(loss, tokens=number_of_tokens_in_the_mean).backward()

        acc.backward(acc.sampled_loss(logits, mask), retain_graph=True)  # touches no .grad
        loss.backward()

    Loss scaling and the division of gradient accumulation are read from the gradient that arrives at the declared
    loss, and undone. A layer whose gradient is not finite (an overflow of mixed precision) adds nothing in that pass.
    Run statistics in eval mode unless dropout is meant to be in them. The backward pass must run inside the context.

    While entered, code compiled by `torch.compile` runs eagerly, because it would pass by the hooks; given the compiled
    module itself, passes that `every` leaves out run compiled. Under reentrant gradient checkpointing use
    `loss.backward()`, not `acc.backward`.

    Args:
        model: The module that is called.
        modules: The layers (`layers.select`); by default all supported ones, or those of `bases` if given. Sums of a
            layer take 2 (d_in² + d_out²) bytes in float32: leave out an output layer over a large vocabulary.
        fisher: "true" (call `sampled_loss`) or "empirical" (call `training_loss`).
        approximation: "expand" or "reduce".
        bases: Name -> `CoreBasis`: that layer's factors are those of x Q_in and δ Q_out.
        options: See `AccumulatorOptions`.

    Attributes:
        factors: The sums. `factors.add_(Factors.load(path))` before the first batch resumes.
        uncovered: (parameter, reason) for every parameter without factors.
        enabled: Assign False to leave out the forward passes that follow.
        on_output: Called as `on_output(kwargs, output)` when a tapped forward pass returns, with its keyword arguments;
            there a callback declares a loss in a loop that is not its own. None: nothing is called.

    Raises:
        ValueError: An argument has another value than these, or a basis does not fit its layer.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> with FactorAccumulator(layer, fisher="empirical") as acc:
        ...     loss = (2 * layer(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))).mean()
        ...     acc.training_loss(loss, tokens=2).backward()
        >>> [factor.tolist() for factor in acc.factors.mean("")]  # E[x xᵀ], and E[δ δᵀ] of a token's own loss
        [[[5.0, 7.0], [7.0, 10.0]], [[4.0]]]
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Modules = None,
        *,
        fisher: str = "true",
        approximation: str = "expand",
        bases: Mapping[str, CoreBasis] | None = None,
        options: AccumulatorOptions | None = None,
    ) -> None:
        if fisher not in ("true", "empirical"):
            raise ValueError(f'fisher must be "true" or "empirical", got {fisher!r}')
        if approximation not in ("expand", "reduce"):
            raise ValueError(f'approximation must be "expand" or "reduce", got {approximation!r}')
        self.model, self.bases, self.options = model, dict(bases or {}), options or AccumulatorOptions()
        modules = list(self.bases) if modules is None and self.bases else modules
        inner = uncompiled(model)
        specs, self.uncovered = select(inner, modules, approximation, self.bases)
        warn_of(self.uncovered)
        self.factors = Factors(specs, fisher, approximation, self.options.decay, tied_names(inner, specs))
        self.enabled = True
        self.on_output: Callable[[dict, Any], None] | None = None
        self._layers = {name: inner.get_submodule(name) for name in specs}
        self._on_host = beyond(specs, self.options.memory_limit, model_sum_dtype(model))
        self._taps = LayerTaps(model, specs, self)
        self._cast: dict[tuple[str, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._next: dict = {}
        self._open: list[weakref.ref[ForwardPass]] = []
        self._declared: list[ForwardPass] = []
        self._sharing = InputSharing(self.bases)
        self._task: int | None = None
        self._counted: list[ForwardPass] = []
        self._arrived: Counter[str] = Counter()
        self._extra = False  # whether the backward pass that runs is that of `backward`
        self._left_out: set[str] = set()

    def __enter__(self) -> FactorAccumulator:
        self._taps.__enter__()
        self._start = self.factors.backwards, self.factors.forwards
        return self

    def __exit__(self, kind: type | None, *exc: object) -> None:
        self._taps.__exit__()
        self._reset()
        self._open, self._declared, self.on_output = [], [], None
        backwards, forwards = self._start
        if kind is None and self.factors.forwards > forwards and self.factors.backwards == backwards:
            call = "sampled_loss(logits)" if self.factors.fisher == "true" else "training_loss(loss, tokens)"
            warnings.warn(
                f"FactorAccumulator saw {self.factors.forwards - forwards} forward passes and counted no backward "
                f"pass: call backward, inside the context, on what {call} returns",
                stacklevel=2,
            )

    @property
    def entered(self) -> bool:
        """Whether the context is entered."""
        return self._taps.installed

    @property
    def tapped(self) -> bool:
        """Whether the last forward pass was tapped: whether a backward pass of it is worth its while."""
        return self._taps.current is not None and self._taps.current.tapped

    def batch(
        self,
        mask: Tensor | str | None = "attention_mask",
        cu_seqlens: Tensor | None = None,
        sequences: Tensor | None = None,
    ) -> None:
        """Describes the tokens of the next forward pass, and of no other.

        Args:
            mask: (B, T) or flattened, bool or weights; tokens of weight 0 are in neither factor. None: all count. By
                default, and where this is not called: that pass's keyword `attention_mask`, if it is 2-dimensional.
            cu_seqlens: (S+1,) offsets of sequences packed into the flattened tokens. None: rows are sequences.
            sequences: (S,) numbers of the sequences in their data set, so that the labels drawn do not depend on the
                batches. None: they are counted as they come, from rank·2⁴⁰ under torch.distributed.
        """
        self._next = {"mask": mask, "cu_seqlens": cu_seqlens, "sequences": sequences}

    def sampled_loss(self, logits: Tensor, mask: Tensor | None = None) -> Tensor:
        """−Σ log softmax(logits)[ŷ], ŷ ~ softmax(logits) at each position of the mask: the true Fisher's loss.

        It belongs to the last forward pass. A further call draws further labels; give each a backward pass of its own.

        Args:
            logits: (B, T, V), or (N, V) with rows as sequences (or packed, after `batch(cu_seqlens=…)`).
            mask: logits' leading dimensions, positions that bear loss. None: the batch's mask, or all.

        Returns:
            The loss, a scalar of float32 or better, declared. Labels are those of `labels.sample_labels`.

        Raises:
            ValueError: The accumulator gathers the empirical Fisher, the mask does not fit, or nothing was tapped.
        """
        self._require("true", "sampled_loss", "training_loss")
        last = self._taps.current
        if last is None:
            raise ValueError(_NO_PASS)
        layout = last.layout
        keep = layout.bearing(mask, logits)
        with torch.no_grad():
            sequence, position = self._numbers(layout, logits)
            uniform = counter_uniform(self.options.seed, sequence[keep], position[keep], layout.samples)
            labels = sample_labels(logits.detach()[keep], uniform)
        layout.samples += 1
        rows = logits[keep]
        rows = rows if rows.dtype == torch.float64 else rows.float()
        return self._declare(F.cross_entropy(rows, labels, reduction="sum"), 1.0, [last])

    def training_loss(self, loss: Tensor, tokens: float = 1.0, in_place: bool = False) -> Tensor:
        """Declares (1/tokens) Σ_t loss_t as the empirical Fisher's loss.

        It covers every forward pass since the last declaration.

        Args:
            loss: The scalar, before any scaling of AMP or gradient accumulation.
            tokens: What the sum was divided by. A mean over 0 tokens is not counted.
            in_place: Declare the tensor itself, which a loop that is not the caller's goes on with.

        Returns:
            The same value, in float32 if it was shorter. Only a backward pass from it is counted.

        Raises:
            ValueError: The accumulator gathers the true Fisher, nothing was tapped, loss is no scalar or tokens no
                number of tokens, or a loss shorter than float32, whose gradient is rounded, is declared in place.
        """
        self._require("empirical", "training_loss", "sampled_loss")
        if loss.numel() != 1:
            raise ValueError(f"loss must be a scalar, got shape {tuple(loss.shape)}: declare its sum")
        if not 0 <= tokens < math.inf:
            raise ValueError(f"tokens must be what the sum of the losses was divided by, 1 for a sum, got {tokens}")
        short = loss.dtype.itemsize < 4
        if in_place and short:
            raise ValueError(f"loss must be float32 or better, got {loss.dtype}: compute it from `logits.float()`")
        loss = loss if in_place else loss.float() if short else loss.clone()
        return self._declare(loss, float(tokens), self._claim())

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        """Gathers, as `loss.backward()` would, but touches no `.grad` and computes no gradient of a weight.

        Does nothing if the loss's forward pass was not tapped.

        Args:
            loss: A declared loss.
            retain_graph: Whether another backward pass follows.

        Raises:
            RuntimeError: A layer was called with gradients off, as reentrant gradient checkpointing does.
        """
        if not loss.requires_grad:
            return
        self._extra = True
        try:
            with torch.autocast(loss.device.type, enabled=False):  # backward passes run outside
                torch.autograd.grad(loss, [self._taps.anchor], retain_graph=retain_graph, allow_unused=True)
        finally:
            self._extra = False

    def begin(self, args: tuple, kwargs: dict) -> ForwardPass | None:
        """`LayerTaps`: a forward pass begins."""
        described, self._next = {"mask": "attention_mask"} | self._next, {}
        self._reset()
        if not torch.is_grad_enabled():
            return None
        if isinstance(described["mask"], str):
            mask = kwargs.get(described["mask"])
            described["mask"] = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        tapped = self.enabled and self.factors.forwards % self.options.every == 0
        passing = ForwardPass(tapped, TokenLayout(**described, batch=batch_shape(described["mask"], args, kwargs)))
        self.factors.forwards += 1
        self._open = [other for other in self._open if other() is not None] + [weakref.ref(passing)]
        return passing

    def keep(self, name: str, passing: ForwardPass, x: Tensor, output: Tensor) -> Tensor:
        """`LayerTaps`: x, or x Q_in if that is shorter."""
        spec, module = self.factors.specs[name], self._layers[name]
        if spec.kind == "embedding" and passing.layout.one_for_all(x.shape):
            self._leave_out(name)
        elif spec.kind != "conv2d":
            passing.layout.check(name, leading(module, x))
        if name not in self.bases or spec.kind == "embedding":
            return x
        return input_rows(module, x, self._basis_as(name, output.dtype)[0])

    def gather(self, name: str, passing: ForwardPass, kept: Tensor, delta: Tensor) -> None:
        """`LayerTaps`: δ of one call of a layer has arrived."""
        if passing.alpha is None or name in self._left_out:
            return
        self._arrived[name] += 1
        with torch.autocast(delta.device.type, enabled=False):
            self._add(name, passing, kept, delta)

    def _add(self, name: str, passing: ForwardPass, kept: Tensor, delta: Tensor) -> None:
        """S ← β S + the rows of this call."""
        basis = self._basis_as(name, delta.dtype) if name in self.bases else None
        reduce = self.factors.approximation == "reduce"
        rows = gathered_rows(self._layers[name], kept, delta, passing.layout, basis, reduce).finite()
        beta = 1.0 if self.options.decay is None or self._arrived[name] > 1 else self.options.decay
        sums = self._sums(name, rows)
        if name not in self._on_host:
            return sums.accumulate_(rows, passing.alpha, beta, self.options.precision)
        spec, shared = self.factors.specs[name], name in self.factors.shared
        scratch = LayerFactors.zeros(spec, sum_dtype(rows.delta.dtype), rows.delta.device, shared)
        scratch.accumulate_(rows, passing.alpha, 1.0, self.options.precision)
        return sums.add_(scratch, beta)

    def end(self, passing: ForwardPass, kwargs: dict, output: Any) -> None:
        """`LayerTaps`: the calls of a forward pass, and its output, are known."""
        if passing.tapped and self.options.share_inputs:
            self._sharing.update(self.factors, passing.calls)
        if passing.tapped and self.on_output is not None:
            self.on_output(kwargs, output)

    def _leave_out(self, name: str) -> None:
        """Of a row that a batch uses once for all its sequences, only the sum of their δ is known."""
        if name not in self._left_out:
            self._left_out.add(name)
            self.factors.layers.pop(name, None)
            self.uncovered.append((f"{name}.weight", "its rows are shared by all sequences of a batch"))
            warn_of(self.uncovered[-1:])

    def _basis_as(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Q_in and Q_out in the layer's dtype, cast once."""
        if (name, dtype) not in self._cast:
            basis = self.bases[name]
            self._cast[name, dtype] = basis.q_in.to(dtype), basis.q_out.to(dtype)
        return self._cast[name, dtype]

    def _sums(self, name: str, rows: Rows) -> LayerFactors:
        """The layer's sums, made at its first token, where they belong."""
        layers, device = self.factors.layers, torch.device("cpu") if name in self._on_host else rows.delta.device
        if name not in layers:
            spec, shared = self.factors.specs[name], name in self.factors.shared
            layers[name] = LayerFactors.zeros(spec, sum_dtype(rows.delta.dtype), device, shared)
        elif layers[name].counts.device != device:  # they were loaded to another
            layers[name].to_(device)
        return layers[name]

    def _require(self, fisher: str, called: str, other: str) -> None:
        if self.factors.fisher != fisher:
            gathers = f"this accumulator gathers the {self.factors.fisher} Fisher"
            raise ValueError(f"{called}: {gathers}; call {other}, or make it with fisher={fisher!r}")

    def _claim(self) -> list[ForwardPass]:
        """The forward passes since the last declaration, or those of that one again."""
        passes = [passing for ref in self._open if (passing := ref()) is not None]
        self._open, self._declared = [], passes or self._declared
        if not self._declared:
            raise ValueError(_NO_PASS)
        return self._declared

    def _declare(self, loss: Tensor, tokens: float, passes: list[ForwardPass]) -> Tensor:
        if loss.requires_grad:
            loss.register_hook(partial(self._begin_backward, passes, tokens))
        elif any(passing.tapped for passing in passes):
            raise ValueError("loss: it does not depend on the tapped forward pass; compute it from that pass's outputs")
        return loss

    def _begin_backward(self, passes: list[ForwardPass], tokens: float, gradient: Tensor) -> None:
        """The gradient g at the loss holds every later scaling: what arrives is (g/tokens) times the token sum's δ."""
        passes = [passing for passing in passes if passing.tapped]
        if not passes:
            return
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._reset()
            self._task = task
            Variable._execution_engine.queue_callback(self._finish)
        g = float(gradient)
        for passing in passes:
            if self._extra and passing.hidden is not None:
                raise RuntimeError(
                    f"backward: layer {passing.hidden!r} was called with gradients off. Under gradient checkpointing, "
                    "use use_reentrant=False or loss.backward(); elsewhere leave it out by `modules`"
                )
            if passing in self._counted:
                raise ValueError("loss: two declared losses of one forward pass share a backward; give each its own")
            passing.alpha = (tokens / g) ** 2 if tokens and g and math.isfinite(g) else None
            self._counted.append(passing)

    def _finish(self) -> None:
        """The end of a counted backward pass."""
        arrived, counted = self._arrived, any(passing.alpha is not None for passing in self._counted)
        self._reset()
        self.factors.backwards += counted
        if counted and not arrived:
            raise RuntimeError(
                "the declared loss leads to no layer of the forward pass that it was declared for: declare each loss "
                "right after its forward pass, and run its backward pass inside the context"
            )
        self._sharing.check(self.factors, arrived)

    def _reset(self) -> None:
        for passing in self._counted:
            passing.alpha = None
        self._counted, self._arrived, self._task = [], Counter(), None

    def _numbers(self, layout: TokenLayout, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The sequence and the position of each row of the logits, both in the logits' leading dimensions."""
        sequence, position, count = layout.numbers(logits.shape[:-1], logits.device)
        if layout.sequences is not None:
            return layout.sequences.to(logits.device)[sequence], position
        if layout.first is None:
            layout.first, self.factors.sequences = self.factors.sequences, self.factors.sequences + count
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        return sequence + (layout.first + (rank << 40)), position
