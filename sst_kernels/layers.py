"""Which layers have Kronecker factors, and what their rows are: the gradient of the weight is Σ_t δ_t x_tᵀ.

| kind | x_t | δ_t, the gradient of |
|---|---|---|
| `linear` | the layer's input at token t | its output at token t |
| `embedding` | the one-hot vector of token t, kept as an index | its output at token t |
| `conv2d` | the patch under output position t, in the order of `weight.flatten(1)` | that position's channels |

A layer is anything that computes y_t = W x_t: nn.Linear, the Conv1D of transformers (whose weight is stored
transposed; its factors are those of W), quantised layers with `in_features` and `out_features` (their weight is never
read), and adapters around such a layer (`base_layer`, as PEFT has them), taken as one layer at the wrapper's input and
output. Biases have no factor.
"""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from .collect import CoreBasis
from .layer_factors import LayerSpec, Rows, sum_dtype
from .layout import TokenLayout
from .rows import convolution_fault, grad_rows, input_rows, unwrapped

Modules = Collection[str] | str | Callable[[str, nn.Module], bool] | None


def describe(module: nn.Module) -> LayerSpec | str:
    """The layer's kind and sizes, or why it has no factors."""
    layer = unwrapped(module)
    if isinstance(layer, nn.Embedding):
        return _describe_embedding(layer)
    if isinstance(layer, nn.Conv2d):
        return convolution_fault(layer) or LayerSpec("conv2d", layer.weight[0].numel(), layer.out_channels)
    if type(layer).__name__ == "Conv1D" and hasattr(layer, "nf"):
        return LayerSpec("linear", layer.weight.shape[0], layer.nf)
    d_in, d_out = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    if type(d_in) is int and type(d_out) is int:
        if d_in == 0 or type(layer).__name__ == "NonDynamicallyQuantizableLinear":
            return "not called as a module, or not yet initialised"
        return LayerSpec("linear", d_in, d_out)
    return f"{type(layer).__name__} is not a supported layer"


def _describe_embedding(layer: nn.Embedding) -> LayerSpec | str:
    if type(layer).forward is not nn.Embedding.forward:
        return f"{type(layer).__name__} computes something else than a look-up"
    if layer.scale_grad_by_freq:
        return "scale_grad_by_freq changes the gradient"
    return LayerSpec("embedding", layer.num_embeddings, layer.embedding_dim)


def select(
    model: nn.Module, modules: Modules, approximation: str, bases: Mapping[str, CoreBasis]
) -> tuple[dict[str, LayerSpec], list[tuple[str, str]]]:
    """The layers whose factors are gathered, in the model's order, and the weights that are left without.

    Args:
        model: Any module.
        modules: None for every supported layer; names; a pattern that whole names must match (as PEFT's
            `target_modules`); or a function of name and module. A layer inside a chosen adapter is not chosen again.
        approximation: "expand" or "reduce".
        bases: Bases of some of the layers.

    Returns:
        Name -> spec, and (name of a parameter, reason) for every parameter that no factor covers.

    Raises:
        ValueError: A listed name is missing or unsupported, nothing was chosen, or a basis does not fit.
    """
    named = dict(model.named_modules())
    wanted = _wanted(named, modules)
    specs: dict[str, LayerSpec] = {}
    reasons: dict[str, str] = {}
    for name, module in named.items():  # parents come before their children
        if any(chosen == "" or name.startswith(f"{chosen}.") for chosen in specs):
            continue
        found = describe(module)
        if (
            isinstance(found, LayerSpec)
            and approximation == "reduce"
            and found.kind == "embedding"
            and name not in bases
        ):
            found = "the mean of one-hot rows has no diagonal factor: give a basis, or use expand"
        if isinstance(found, str):
            reasons[name] = found
            if name in wanted and isinstance(modules, Collection) and not isinstance(modules, str):
                raise ValueError(f"modules: {name!r} has no Kronecker factors: {found}")
        elif name in wanted:
            specs[name] = found if name not in bases else _projected(name, found, bases[name])
        else:
            reasons[name] = "not chosen"
    if not specs:
        raise ValueError(f"modules: no supported layer of {type(model).__name__} was chosen by {modules!r}")
    if unused := bases.keys() - specs.keys():
        raise ValueError(f"bases: {min(unused)!r} is not among the chosen layers")
    return specs, list(_uncovered(model, specs, reasons))


def _wanted(named: Mapping[str, nn.Module], modules: Modules) -> set[str]:
    if isinstance(modules, str):
        pattern = re.compile(modules)
        return {name for name in named if pattern.fullmatch(name)}
    if callable(modules):
        return {name for name, module in named.items() if modules(name, module)}
    for name in modules or ():
        if name not in named:
            raise ValueError(f"modules: the model has no module named {name!r}; use names of model.named_modules()")
    return set(named if modules is None else modules)


def _projected(name: str, spec: LayerSpec, basis: CoreBasis) -> LayerSpec:
    if (len(basis.q_in), len(basis.q_out)) != (spec.d_in, spec.d_out):
        raise ValueError(
            f"bases[{name!r}] must have q_in of {spec.d_in} rows and q_out of {spec.d_out}, "
            f"got {len(basis.q_in)} and {len(basis.q_out)}"
        )
    digest = hashlib.sha256()
    for q in (basis.q_in, basis.q_out):
        digest.update(q.detach().cpu().contiguous().view(torch.uint8).numpy())
    r_out, r_in = basis.core_shape
    return replace(spec, d_in=r_in, d_out=r_out, basis=digest.hexdigest()[:16])


def _uncovered(model: nn.Module, specs: dict[str, LayerSpec], reasons: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Every parameter but the chosen layers' weights, and the adapters inside a chosen layer."""
    for name, _ in model.named_parameters(remove_duplicate=False):
        owner, _, last = name.rpartition(".")
        inside = next((chosen for chosen in specs if owner == chosen or owner.startswith(f"{chosen}.")), None)
        if inside is None and "" not in specs:
            yield name, reasons.get(owner, "not chosen")
        elif last == "bias":
            yield name, "bias"


def warn_of(uncovered: list[tuple[str, str]]) -> None:
    """One warning for all that the caller did not leave out himself."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in uncovered:
        if reason != "not chosen":
            by_reason.setdefault(reason, []).append(name)
    if by_reason:
        listed = "; ".join(
            f"{reason}: {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
            for reason, names in by_reason.items()
        )
        warnings.warn(f"FactorAccumulator has no factors for these parameters: {listed}", stacklevel=3)


def tied_names(model: nn.Module, specs: dict[str, LayerSpec]) -> dict[str, str]:
    """Layer -> the first chosen layer with the same weight; each use has factors of its own."""
    first: dict[int, str] = {}
    tied = {}
    for name in specs:
        weight = getattr(unwrapped(model.get_submodule(name)), "weight", None)
        if weight is not None and (owner := first.setdefault(id(weight), name)) != name:
            tied[name] = owner
    return tied


def gathered_rows(
    module: nn.Module,
    kept: Tensor,
    delta: Tensor,
    layout: TokenLayout,
    basis: tuple[Tensor, Tensor] | None = None,
    reduce: bool = False,
) -> Rows:
    """The rows that one call of a layer adds to its factors.

    *expand*: (x_t, δ_t, w_t) for each token t. *reduce*: for each sequence s with Σ_t w_t > 0, over its tokens,
    x̄_s = Σ_t w_t x_t / Σ_t w_t and δ̄_s = Σ_t w_t δ_t, with weight 1.

    Args:
        module: The layer.
        kept: Its input; x Q_in for a linear or convolution layer with a basis.
        delta: The gradient of its output.
        layout: Which tokens count, and their sequences.
        basis: Q_in and Q_out in delta's dtype, or None.
        reduce: Which of the two.

    Returns:
        Rows of delta's dtype (expand) or of the sums' dtype (reduce).
    """
    embedding = isinstance(unwrapped(module), nn.Embedding)
    projected = basis is not None and not embedding
    x = kept if projected else input_rows(module, kept, None if basis is None else basis[0])
    d = grad_rows(module, delta)
    d = d if basis is None else d @ basis[1]
    lead = d.shape[:-1]
    weight = None if isinstance(unwrapped(module), nn.Conv2d) else layout.weight(lead, d)
    if embedding and (padding := unwrapped(module).padding_idx) is not None:  # that row is not trained
        trained = (kept != padding).reshape(-1).to(sum_dtype(d.dtype))
        weight = trained if weight is None else weight * trained
    d = d.reshape(-1, d.shape[-1]).contiguous()
    x = x.reshape(-1) if embedding and basis is None else x.reshape(-1, x.shape[-1]).to(d.dtype).contiguous()
    rows = Rows(x, d, weight)
    return rows.reduced(layout.boundaries(lead, d.device)) if reduce else rows


def partition(
    model: nn.Module, limit: int, modules: Modules = None, bases: Mapping[str, CoreBasis] | None = None
) -> list[list[str]]:
    """The layers, in the model's order, in parts whose sums take at most `limit` bytes: one pass over the data each.

    Args:
        model: Any module.
        limit: Bytes; shared input factors are counted for each layer.
        modules: As for `FactorAccumulator`.
        bases: As for `FactorAccumulator`.

    Returns:
        Lists of names, to be passed as `modules`.

    Raises:
        ValueError: One layer alone exceeds the limit.
    """
    specs, _ = select(model, list(bases) if modules is None and bases else modules, "expand", bases or {})
    dtype, parts, free = model_sum_dtype(model), [], 0
    for name, spec in specs.items():
        size = spec.nbytes(dtype)
        if size > limit:
            raise ValueError(
                f"limit: the sums of {name!r} alone take {size} bytes, over {limit}; raise the limit, give the layer a "
                "basis, or sum on the host with AccumulatorOptions(memory_limit=…)"
            )
        if size > free:
            parts.append([])
            free = limit
        parts[-1].append(name)
        free -= size
    return parts


def beyond(specs: Mapping[str, LayerSpec], limit: int | None, dtype: torch.dtype) -> frozenset[str]:
    """The layers whose sums, in order, no longer fit into `limit` bytes."""
    beyond, free = set(), math.inf if limit is None else limit
    for name, spec in specs.items():
        free -= spec.nbytes(dtype)
        if free < 0:
            beyond.add(name)
    return frozenset(beyond)


def model_sum_dtype(model: nn.Module) -> torch.dtype:
    """The widest dtype of sums that the model's layers will have."""
    return torch.float64 if any(p.dtype == torch.float64 for p in model.parameters()) else torch.float32
