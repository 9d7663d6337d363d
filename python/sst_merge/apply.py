"""SST on a PEFT model in memory: two of its adapters in, a third one added to it."""

from __future__ import annotations

import difflib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .adapters import Adapter, assemble, peft_state
from .adapters.peft_config import refusals
from .config import sst_config
from .merging import MergeResult, merge
from .problem import Live

Examples = str | Path | Sequence[Mapping[str, Any] | Sequence[Mapping[str, str]]]
"""A JSONL file, or its records; a record may also be a bare list of chat messages."""


def apply_sst(
    peft_model: PeftModel,
    *,
    utility: str,
    safety: str,
    harm: Examples,
    benign: Examples,
    tokenizer: Any | None = None,
    name: str = "sst",
    **settings: Any,
) -> MergeResult:
    """Add θ_0 + Δ_utility + α·Filter(Δ_safety) to a PEFT model, as a LoRA adapter of exactly the rank it needs.

    Nothing is written. The model gains the adapter `name`, in float32, frozen and not active; its parameters, active
    adapter, modes and `requires_grad` are as before, whatever happens.

    Args:
        peft_model: Holds both adapters, unmerged; its base may be quantised.
        utility: Name in the model of the adapter whose ability is to be kept.
        safety: Name in the model of the adapter whose refusals are wanted.
        harm: Forbidden prompts with refusals.
        benign: Prompts with answers that should not change.
        tokenizer: The base model's; None loads it from where the base came from.
        name: Of the new adapter.
        settings: Parameters of the method sst, `alpha` being one number, and of the calibration (`batch_size`, …).

    Returns:
        The result, as `merge` gives it: report, directions, updates at other strengths.

    Raises:
        ValueError: A name, a setting or an adapter does not allow it.
    """
    _check_model(peft_model, utility, safety, name)
    base = peft_model.get_base_model()
    device = next(base.parameters()).device
    adapters = {role: _read_live(peft_model, key, device) for role, key in (("utility", utility), ("safety", safety))}
    with tempfile.TemporaryDirectory() as folder:
        config = sst_config(
            base.config.name_or_path or "the model in memory",
            [{"model": f"adapter {adapter.path} in memory", "role": role} for role, adapter in adapters.items()],
            {
                **settings,
                "harm": _as_file(Path(folder, "harm.jsonl"), harm),
                "benign": _as_file(Path(folder, "benign.jsonl"), benign),
            },
            device=str(device),
        )
        with _base_alone(base), torch.enable_grad():
            result = merge(config, live=Live(**adapters, model=base, tokenizer=tokenizer))
    _add_adapter(peft_model, result, name)
    return result


def _check_model(model: PeftModel, utility: str, safety: str, name: str) -> None:
    """ValueError unless the model has both adapters, unmerged, passes gradients and can take an adapter `name`."""
    if not isinstance(model, PeftModel):
        raise ValueError(f"peft_model: expected a PeftModel with both adapters loaded, got {type(model).__name__}")
    for role, key in (("utility", utility), ("safety", safety)):
        if key not in model.peft_config:
            near = difflib.get_close_matches(str(key), model.peft_config, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {sorted(model.peft_config)}"
            raise ValueError(f"{role}: the model has no adapter {key!r}; {hint}")
    if utility == safety:
        raise ValueError(f"utility and safety must be two adapters, got {utility!r} for both")
    if name in model.peft_config:
        raise ValueError(f"name: the model has an adapter {name!r} already; delete_adapter({name!r}), or give another")
    if not name or "." in name or name in "lora_":  # as torch's module names and PEFT's keys demand
        raise ValueError(f"name: expected a name without a point that is no part of 'lora_', got {name!r}")
    if any(layer.merged for layer in model.modules() if isinstance(layer, LoraLayer)):
        raise ValueError("peft_model: an adapter is merged into the base weights; call unmerge_adapter() first")
    for key, parameter in model.named_parameters():
        if getattr(getattr(parameter, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"peft_model: {key} was repacked by bitsandbytes for inference on the CPU, and passes no gradient any "
                "more; load the model again, and call apply_sst before it is used in eval mode"
            )


def _read_live(model: PeftModel, name: str, device: torch.device) -> Adapter:
    """A copy of one adapter, float32, read as if from its file."""
    where = f"adapter {name!r}"
    config = model.peft_config[name].to_dict()
    if reasons := refusals(config):
        raise ValueError(f"{where}: " + "; ".join(reasons))
    # Embeddings that were resized belong to the base in memory, not to the adapter.
    stored = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    tensors = {key: tensor.detach().to(device, copy=True) for key, tensor in stored.items()}
    return assemble(Path(name), where, config, tensors, torch.float32)


def _as_file(path: Path, examples: Examples) -> str:
    """The path given, or records written to `path`: one reader checks both."""
    if isinstance(examples, (str, Path)):
        return str(examples)
    records = [record if isinstance(record, Mapping) else {"messages": record} for record in examples]
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return str(path)


@contextmanager
def _base_alone(base: nn.Module) -> Iterator[None]:
    """Within it, the layers that PEFT wrapped stand in their wrappers' places; then every module is as it was.

    Names, types and outputs are then those of the base model. What is put back are the tables of modules, parameters
    and buffers and the modes, so parameters that were replaced meanwhile return too.
    """
    before = [(m, m.training, m._modules.copy(), m._parameters.copy(), m._buffers.copy()) for m in base.modules()]
    try:
        _unwrap(base)
        yield
    finally:
        for module, training, *tables in before:
            module.training = training
            for table, entries in zip((module._modules, module._parameters, module._buffers), tables, strict=True):
                table.clear()
                table.update(entries)


def _unwrap(module: nn.Module) -> None:
    """Replace PEFT's wrappers below a module by what they wrap."""
    for key, child in module._modules.items():
        while isinstance(child, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            child = child.base_layer if isinstance(child, BaseTunerLayer) else child.original_module
        if child is not None:
            module._modules[key] = child
            _unwrap(child)


def _add_adapter(model: PeftModel, result: MergeResult, name: str) -> None:
    """Put the merged adapter into the model."""
    problem, alpha = result.problem, result.problem.config.alphas[0]
    config, tensors = peft_state(
        result.updates(alpha),
        sources=(problem.utility, problem.safety),
        biases=result.plan.merged_biases(problem, alpha),
        saved=problem.saved,
    )
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with torch.random.fork_rng(devices=[]):  # PEFT draws initial weights
        model.add_adapter(name, LoraConfig.from_peft_type(**config))
    set_peft_model_state_dict(model, tensors, adapter_name=name)
    for parameter in model.parameters():  # which PEFT sets anew in some of its releases
        parameter.requires_grad_(trained.get(parameter, False))
