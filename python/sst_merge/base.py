"""The base model θ_0: loaded as it is stored or quantised, on one device or spread over several."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from .settings import Config

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
BESIDE_WEIGHTS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*")
"""What a checkpoint holds beside its weights."""

_QUANTISED_BYTES = {"8bit": 1.0, "4bit": 0.5}


def load_skeleton(config: Config) -> nn.Module:
    """The base model's modules and shapes, on the meta device.

    Args:
        config: base_model, trust_remote_code and download are used; quantization is checked.

    Returns:
        The model, not quantised.

    Raises:
        ValueError: There is no such model, or it cannot be quantised as asked.
    """
    options = _options(config)
    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(config.base_model, **options), trust_remote_code=config.trust_remote_code
            )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise ValueError(_not_loaded(config, error)) from None
    if config.quantization and is_quantised(skeleton):
        raise ValueError(f"quantization: {config.base_model!r} is stored quantised and loads so; leave the key out")
    if config.quantization and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("quantization needs bitsandbytes: pip install bitsandbytes, or leave the key out")
    return skeleton


def load_base(config: Config, skeleton: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The base model with its weights.

    Args:
        config: The checked configuration.
        skeleton: From `load_skeleton`.
        dtype: In which 4 bit layers compute; the others take `config.dtype`.

    Returns:
        The model on `config.device`, or where `config.device_map` puts it.

    Raises:
        ValueError: Its files are missing, damaged, incomplete or no safetensors, or it does not fit where it is put.
    """
    device_map = config.device_map
    if device_map is None and (config.quantization or is_quantised(skeleton)):
        device_map = {"": config.device}  # quantised layers are made where they stay
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            config.base_model,
            dtype=config.dtype,
            use_safetensors=True,
            output_loading_info=True,
            device_map=device_map,
            **_quantization(config.quantization, dtype),
            **_options(config),
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise ValueError(_not_loaded(config, error)) from None
    if loading["missing_keys"]:
        raise ValueError(f"base_model: {config.base_model!r} lacks the weights {sorted(loading['missing_keys'])}")
    return model.to(config.device) if device_map is None else model


def local_folder(config: Config) -> Path:
    """Where the base's files lie: the folder named, or the cache's snapshot of that name."""
    if Path(config.base_model).is_dir():
        return Path(config.base_model)
    patterns = [*BESIDE_WEIGHTS, "*.safetensors"]
    return Path(snapshot_download(config.base_model, allow_patterns=patterns, local_files_only=not config.download))


def weight_map(folder: Path) -> dict[str, str]:
    """Tensor -> the file of a checkpoint's folder that holds it.

    Args:
        folder: With model.safetensors, or shards and their index.

    Returns:
        Keys as stored.

    Raises:
        ValueError: There is neither, or one is damaged or names files elsewhere.
    """
    index = folder / INDEX_NAME
    source = index if index.is_file() else folder / WEIGHTS_NAME
    if not source.is_file():
        raise ValueError(
            f"base_model: {folder} must hold {WEIGHTS_NAME}, or shards with {INDEX_NAME}; save the base by "
            "save_pretrained"
        )
    try:
        if source == index:
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            if outside := sorted({file for file in shards.values() if Path(file).name != file}):
                raise ValueError(f"it names files of other folders: {outside}")
            return shards
        with safe_open(source, "pt") as file:
            return dict.fromkeys(file.keys(), WEIGHTS_NAME)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(
            f"base_model: {str(folder)!r} could not be loaded: {source.name} is damaged ({error}); fetch the base "
            "again, or save it again by save_pretrained"
        ) from None


def _options(config: Config) -> dict[str, Any]:
    """What every call of transformers takes."""
    transformers_logging.disable_progress_bar()
    return {"trust_remote_code": config.trust_remote_code, "local_files_only": not config.download}


def _not_loaded(config: Config, error: Exception) -> str:
    """What to say of a base that transformers cannot load."""
    hint = "give a folder with safetensors, or a name in the local cache; `download: true` lets it be fetched"
    return f"base_model: {config.base_model!r} could not be loaded ({hint}): {error}"


def _quantization(bits: str | None, dtype: torch.dtype) -> dict[str, BitsAndBytesConfig]:
    """LLM.int8 (Dettmers et al., 2022), or NF4 with quantised scales, as QLoRA has it (Dettmers et al., 2023)."""
    if bits is None:
        return {}  # not None, which would hide the base's own
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # or a line for each layer that is not in float16
    if bits == "8bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **nf4)}


def is_quantised(model: nn.Module) -> bool:
    """Whether the model's own config.json says that its weights are stored quantised."""
    return getattr(model.config, "quantization_config", None) is not None


def model_bytes(config: Config, skeleton: nn.Module, dtype: torch.dtype) -> int:
    """Bytes that the base takes on `config.device`: 0 where `device_map` places it."""
    if config.device_map is not None:
        return 0
    head = skeleton.get_output_embeddings()  # which bitsandbytes leaves as it is
    linear = sum(m.weight.numel() for m in skeleton.modules() if isinstance(m, nn.Linear) and m is not head)
    everything = sum(p.numel() for p in skeleton.parameters())
    narrow = _QUANTISED_BYTES.get(config.quantization, dtype.itemsize)
    return int((everything - linear) * dtype.itemsize + linear * narrow)


def input_device(model: nn.Module) -> torch.device | str | int:
    """Where the model's inputs belong: a model that is spread over devices takes them on its main one."""
    main = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    return next(model.parameters()).device if main is None else main


def offloaded(model: nn.Module) -> list[str]:
    """The parameters that `device_map` keeps on no device between their uses."""
    return [name for name, parameter in model.named_parameters() if parameter.is_meta]


def replace_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    """Give a module its own copy of a parameter or buffer, as PEFT does: tied weights stay as they were.

    Args:
        model: The base model, changed in place.
        name: Of the parameter or buffer.
        value: Of its shape.

    Raises:
        ValueError: It is quantised or offloaded.
    """
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    current = getattr(module, leaf)
    _refuse_offloaded(name, current)
    if isinstance(current, nn.Parameter) and not current.is_floating_point():
        raise ValueError(
            f"{name}: the base holds it quantised, an adapter replaces it as a whole; run on the base in its original "
            "precision"
        )
    value = value.to(current.device, current.dtype)
    setattr(module, leaf, nn.Parameter(value) if isinstance(current, nn.Parameter) else value)


def add_bias(model: nn.Module, name: str, bias: Tensor) -> None:
    """Add a bias to the output of one module, which may have had none.

    Args:
        model: The base model, changed in place.
        name: Of a linear layer or convolution.
        bias: (d_out,).

    Raises:
        ValueError: The module is offloaded.
    """
    module = model.get_submodule(name)
    _refuse_offloaded(name, module.weight)
    dtype = model.dtype if module.bias is None else module.bias.dtype
    start = torch.zeros_like(bias) if module.bias is None else module.bias.detach().to(bias)
    module.bias = nn.Parameter((start + bias).to(module.weight.device, dtype))


def _refuse_offloaded(name: str, tensor: Tensor) -> None:
    """ValueError for a tensor that is not there to be changed."""
    if tensor.is_meta:
        raise ValueError(
            f"device_map: {name} is offloaded, but an adapter changes it beside its low-rank update; map it to a device"
        )
