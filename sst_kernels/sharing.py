"""Layers that always get the same tensor (q, k and v; gate and up) keep one input factor."""

from __future__ import annotations

from collections.abc import Mapping

from .collect import CoreBasis
from .factors import Factors


class InputSharing:
    """Decides, forward pass by forward pass, which layers share an input factor.

    Layers that are new are grouped by the tensors they were called with. A group whose layers later differ is parted
    when that forward pass returns, before any of its backward pass: until then the shared sum was that of each.

    Args:
        bases: Layers whose inputs are projected share only if they project by one and the same Q_in.
    """

    def __init__(self, bases: Mapping[str, CoreBasis]) -> None:
        self._bases = bases
        self._grouped: set[str] = set()

    def update(self, factors: Factors, calls: Mapping[str, list[int]]) -> None:
        """Parts what differs in this forward pass and groups what is new in it.

        Args:
            factors: Its `shared` is changed, and sums are copied where layers part.
            calls: Layer -> for each call, in order, the number of its input; equal numbers are one tensor.
        """
        for name, owner in list(factors.shared.items()):
            if calls.get(name) != calls.get(owner):
                factors.unshare(name)
        first: dict[tuple, str] = {}
        for name, inputs in calls.items():
            new = name not in self._grouped and name not in factors.layers
            if new and factors.specs[name].kind == "linear":
                basis = id(self._bases[name].q_in) if name in self._bases else None
                owner = first.setdefault((tuple(inputs), basis), name)
                if owner != name:
                    factors.shared[name] = owner
        self._grouped.update(calls)

    @staticmethod
    def check(factors: Factors, arrived: Mapping[str, int]) -> None:
        """Refuses a backward pass in which the shared sum was not that of each.

        Args:
            factors: Whose `shared` tells the groups.
            arrived: Layer -> how often its gradient arrived.

        Raises:
            RuntimeError: Gradients reached only some of the layers of a group.
        """
        for name, owner in factors.shared.items():
            if arrived[name] != arrived[owner]:
                raise RuntimeError(
                    f"layers {owner!r} and {name!r} have one input, but gradients reached only one of them; "
                    "gather with AccumulatorOptions(share_inputs=False)"
                )
