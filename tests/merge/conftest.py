"""Tiny base models, and adapters made by PEFT itself with every weight random, so that ΔW ≠ 0."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers and peft are imported

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast
from transformers import logging as transformers_logging

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

VOCABULARY = 50


def tiny_llama(layers: int, hidden: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )


def save_base(config: LlamaConfig | GPT2Config, folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def _load_base(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="session")
def load_base() -> Callable[[Path], torch.nn.Module]:
    """Load a base model's folder, float32, in eval mode."""
    return _load_base


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, grouped-query attention, no biases."""
    return save_base(tiny_llama(2, 32), tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="session")
def deep_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirteen layers: some names begin like others ("layers.1", "layers.11")."""
    return save_base(tiny_llama(13, 16), tmp_path_factory.mktemp("base") / "deep-llama")


@pytest.fixture(scope="session")
def gpt2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conv1D layers with biases, tied embeddings."""
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0)
    return save_base(config, tmp_path_factory.mktemp("base") / "gpt2")


@pytest.fixture
def input_ids() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def make_adapter(tmp_path: Path) -> Callable[..., tuple[Path, PeftModel]]:
    """Make a LoRA adapter by PEFT with random weights; its folder and the live PEFT model."""
    count = 0

    def make(
        base: Path,
        *,
        seed: int = 1,
        name: str = "default",
        stored: torch.dtype | None = None,
        **config: object,
    ) -> tuple[Path, PeftModel]:
        nonlocal count
        count += 1
        torch.manual_seed(seed)
        lora = LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 12, **config})
        model = get_peft_model(_load_base(base), lora, adapter_name=name).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key or "modules_to_save" in key:
                    parameter += 0.2 * torch.randn(parameter.shape)
                    if stored is not None and "lora_" in key:
                        parameter.data = parameter.data.to(stored).to(parameter.dtype)
        folder = tmp_path / f"adapter{count}"
        to_save = None
        if stored is not None:
            to_save = {key: value.to(stored) if "lora_" in key else value for key, value in model.state_dict().items()}
        model.save_pretrained(folder, state_dict=to_save)
        return folder, model

    return make


@pytest.fixture(scope="session")
def base_dir(llama_dir: Path) -> Path:
    """The tiny Llama with a tokenizer of the words w0 to w46 and a chat template."""
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }} {% if m.role == 'assistant' %}</s> {% endif %}{% endfor %}"
    )
    tokenizer.save_pretrained(llama_dir)
    return llama_dir


@dataclass
class Setup:
    """Two adapters and two calibration files on the tiny Llama, and a config that merges them."""

    base: Path
    utility: Path
    safety: Path
    harm: Path
    benign: Path

    def config(self, method: str = "sst", **parameters: object) -> dict[str, object]:
        return {
            "base_model": str(self.base),
            "models": [
                {"model": str(self.utility), "role": "utility"},
                {"model": str(self.safety), "role": "safety"},
            ],
            "merge_method": method,
            "parameters": parameters,
            "calibration": {
                "harm": str(self.harm),
                "benign": str(self.benign),
                "max_length": 32,
                "batch_size": 4,
            },
        }


@pytest.fixture
def setup(base_dir: Path, make_adapter: Callable, tmp_path: Path) -> Setup:
    """Adapters of different ranks and target modules: some modules are in one of them only."""
    generator = torch.Generator().manual_seed(0)

    def write(name: str, count: int) -> Path:
        lines = []
        for _ in range(count):
            prompt, response = (
                " ".join(f"w{i}" for i in torch.randint(47, (n,), generator=generator).tolist())
                for n in torch.randint(2, 9, (2,), generator=generator).tolist()
            )
            lines.append(json.dumps({"prompt": prompt, "response": response}))
        path = tmp_path / name
        path.write_text("\n".join(lines))
        return path

    utility, _ = make_adapter(base_dir, seed=1, r=2, target_modules=["q_proj", "v_proj"])
    safety, _ = make_adapter(base_dir, seed=2, r=3, target_modules=["v_proj", "down_proj"])
    harm, benign = write("harm.jsonl", 12), write("benign.jsonl", 10)
    return Setup(base_dir, utility, safety, harm, benign)
