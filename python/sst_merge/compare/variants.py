"""What is compared: a label, a method, and the parameters in which it differs from the method's defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """A method with its parameters; α and seed are the comparison's own.

    Attributes:
        merge_method: A key of `method_settings.METHOD_PARAMETERS`.
        parameters: Those that differ from the method's defaults.
        tune: Choose ε, shrinkage and k, μ or ρ on held-out calibration sequences first, as `merge --tune` does
            (merge_method sst only). The α that was chosen with them is reported beside the sweep.
    """

    merge_method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    tune: bool = False


VARIANTS: dict[str, Variant] = {
    "task arithmetic": Variant("task_arithmetic"),
    "interpolation": Variant("interpolation"),
    "TIES, density 0.2": Variant("ties", {"density": 0.2}),
    "TIES, density 0.5": Variant("ties", {"density": 0.5}),
    "DARE, p 0.5": Variant("dare", {"drop": 0.5}),
    "DELLA, p 0.3": Variant("della"),
    "diagonal SST, weights, hard": Variant("diagonal_sst", {"mask": "hard", "where": "local"}),
    "diagonal SST, weights, soft": Variant("diagonal_sst", {"mask": "soft", "where": "local"}),
    "diagonal SST, weights, hard, path": Variant("diagonal_sst", {"mask": "hard"}),
    "diagonal SST, core, hard, path": Variant("diagonal_sst", {"coordinates": "core"}),
    "diagonal SST, factors, hard, path": Variant("diagonal_sst", {"coordinates": "factor"}),
    "data-free SST-V, hard": Variant("sst_v"),
    "data-free SST-V, soft": Variant("sst_v", {"mask": "soft"}),
    "data-free SST-M, hard": Variant("sst_m"),
    "single Fisher": Variant("single_fisher"),
    "TSV, half of each": Variant("tsv"),
    "TSV, all of each": Variant("tsv", {"share": 1.0}),
    "subspace boosting, beta 0.01": Variant("subspace_boosting"),
    "subspace boosting, beta 0.5": Variant("subspace_boosting", {"beta": 0.5}),
    "Iso-C": Variant("isotropic", {"common": 1.0}),
    "Iso-CTS": Variant("isotropic"),
    "KnOTS-TIES": Variant("knots"),
    "Fisher averaging": Variant("fisher_averaging"),
    "gradient matching": Variant("gradient_matching"),
    "RegMean": Variant("regmean"),
    "SafeLoRA": Variant("safe_lora"),
    "SafeLoRA, exact projector": Variant("safe_lora", {"projector": "exact"}),
    "SafeMERGE": Variant("safe_merge"),
    "SST diagonal, local": Variant("sst", {"fisher": "diagonal", "where": "local"}),
    "SST exact, local": Variant("sst", {"where": "local"}),
    "SST diagonal": Variant("sst", {"fisher": "diagonal"}),
    "SST exact": Variant("sst"),
    "SST exact, global ranking": Variant("sst", {"scope": "global"}),
    "SST K-FAC": Variant("sst", {"fisher": "kfac"}),
    "SST EK-FAC": Variant("sst", {"fisher": "ekfac"}),
    "SST exact against K-FAC": Variant("sst", {"fisher": {"harm": "exact", "benign": "kfac"}}),
    "SST gram": Variant("sst", {"fisher": "gram"}),
    "SST exact, a twentieth": Variant("sst", {"k": 0.05}),
    "SST exact, Ledoit-Wolf": Variant("sst", {"shrinkage": "ledoit_wolf"}),
    "SST exact, shrunk to Kronecker": Variant("sst", {"shrinkage": 0.3, "shrinkage_target": "kronecker"}),
    "SST exact, soft, shrunk 0.5": Variant("sst", {"select": "soft", "mu": 0.1, "shrinkage": 0.5, "damping": 10.0}),
    "SST exact, shrunk 0.3": Variant("sst", {"shrinkage": 0.3}),
    "SST exact, soft, mu 0.1": Variant("sst", {"select": "soft", "mu": 0.1}),
    "SST exact, tuned": Variant("sst", tune=True),
    "SST exact, soft, tuned": Variant("sst", {"select": "soft"}, tune=True),
}
"""Compared where the configuration names no methods; a further one is one more line."""
