"""What the documentation shows is run: code, commands and configurations of the pages, examples in docstrings."""

from __future__ import annotations

import doctest
import importlib
import json
import pkgutil
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import sst_kernels
import sst_merge
from sst_merge.cli import _parser, main
from sst_merge.config import load_config
from sst_merge.method_settings import METHOD_PARAMETERS

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
MINUTES = {"demo"}  # commands that are parsed only


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Language and text of the fenced blocks of a page."""
    yield from re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the pages name: base, adapters and models of both roles, and calibration files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(47))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.save_pretrained("base")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=50, max_position_embeddings=64, **sizes))
    base.save_pretrained("base")
    for role, targets in (("utility", ["q_proj", "v_proj"]), ("safety", ["v_proj", "down_proj"])):
        model = AutoModelForCausalLM.from_pretrained("base")
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data += 0.2 * torch.randn(parameter.shape)
        model.save_pretrained(f"adapters/{role}")
        with torch.no_grad():
            whole = AutoModelForCausalLM.from_pretrained("base")
            for parameter in whole.parameters():
                parameter += 0.05 * torch.randn(parameter.shape)
        whole.save_pretrained(f"models/{role}")
        tokenizer.save_pretrained(f"models/{role}")
    for name in ("refusals", "answers", "more-refusals", "more-answers"):
        texts = [" ".join(f"w{i}" for i in torch.randint(47, (5,)).tolist()) for _ in range(16)]
        records = [
            {"prompt": prompt, "response": answer} for prompt, answer in zip(texts[::2], texts[1::2], strict=True)
        ]
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return tmp_path


class Reader:
    """Does what a page says, block by block, in the current folder."""

    def __init__(self) -> None:
        self.names: dict[str, object] = {}
        self.config: dict[str, object] = {}

    def yaml(self, text: str) -> None:
        """`# NAME.yaml` on its first line makes a block that file; another is a change of the file before it."""
        tree, name = yaml.safe_load(text), re.match(r"# ([\w-]+\.yaml)", text)
        if name is None:
            tree = {**self.config, **tree}
        else:
            Path(name[1]).write_text(text, encoding="utf-8")
            self.config = tree
        if "role" in tree["models"][0]:  # ours, not mergekit's
            load_config(tree)

    def python(self, text: str) -> None:
        exec(compile(text, "block", "exec"), self.names)

    def sh(self, text: str) -> None:
        for line in text.splitlines():
            if line.startswith("sst-merge "):
                arguments = shlex.split(line, comments=True)[1:]
                _parser().parse_args(arguments)
                if arguments[0] not in MINUTES:
                    assert main(arguments) == 0, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
@pytest.mark.filterwarnings("ignore")
def test_every_block_of_a_page_does_what_it_shows(page, world):
    reader = Reader()
    for language, text in blocks(page):
        if language:
            getattr(reader, language)(text)


def test_the_page_of_keys_is_that_of_the_settings():
    page = runpy.run_path(str(ROOT / "docs/keys.py"))["page"]()
    assert (ROOT / "docs/keys.md").read_text(encoding="utf-8") == page, "run: python docs/keys.py > docs/keys.md"


def test_every_method_is_in_the_table_of_methods():
    rows = re.findall(r"^\| `(\w+)` \|.*\|(.*)\|.*\|$", (ROOT / "docs/quickstart-merge.md").read_text(), re.MULTILINE)
    collects = {name: data.strip() == "yes" for name, data in rows if name in METHOD_PARAMETERS}
    assert collects == {name: hasattr(kind, "collected") for name, kind in METHOD_PARAMETERS.items()}


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def modules(package: object) -> list[str]:
    """Names of a package's modules, but for the compiled one."""
    found = [info.name for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    return [package.__name__, *(name for name in found if not name.endswith("._C"))]


@pytest.mark.parametrize("name", [*modules(sst_kernels), *modules(sst_merge)])
def test_examples_of_docstrings(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.testmod(importlib.import_module(name), optionflags=options).failed == 0
