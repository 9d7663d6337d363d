"""The method `sst` in mergekit: our merge, solved once, served tensor by tensor to mergekit's own command.

```yaml
base_model: path/to/base
models:                                  # in any order: roles are marked
  - {model: path/to/base+adapters/utility, parameters: {role: utility}}
  - {model: path/to/base+adapters/safety, parameters: {role: safety}}
merge_method: sst
parameters: {alpha: 1.0, k: 0.2, harm: refusals.jsonl, benign: answers.jsonl}
dtype: bfloat16
```
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import (
    BasePolicy,
    InputContract,
    MergeMethodSpec,
    OptionalTensorPolicy,
    TensorGroup,
    register,
    registered_methods,
)
from mergekit.merge_methods.base import GroupMergeMethod
from mergekit.options import MergeOptions
from mergekit.scripts.run_yaml import main as mergekit_yaml
from torch import Tensor, nn

from .atomic import replace_dir
from .calibration import write_generated
from .checkpoint import as_stored
from .config import sst_config
from .merging import MergeResult, merge
from .rendering import write_report
from .settings import Config


def run(config: str, out: str, arguments: Sequence[str] = ()) -> MergeResult:
    """`mergekit-yaml CONFIG OUT …` with the method `sst`, and the merge's report beside the model.

    mergekit writes each `base+adapter` out in full before it starts, which needs room for two copies of the base
    beside `out`; `--lora-merge-cache DIR` puts them elsewhere and keeps them. Relative paths, those of calibration
    files too, are seen from the current folder, as mergekit has it. Statistics are kept in the parameter `fisher_dir`,
    by default `<out>.fisher`, as `merge` keeps them.

    Args:
        config: mergekit's YAML file.
        out: Folder for the merged checkpoint, new or empty; nothing is left there unless everything succeeded.
        arguments: mergekit-yaml's other options.

    Returns:
        The result, its base model no longer in memory.

    Raises:
        ValueError: Anything the user can mend, and whatever mergekit has to complain of.
    """
    with replace_dir(out) as folder, tempfile.TemporaryDirectory(prefix=".mergekit-", dir=folder.parent) as scratch:
        target = Path(scratch, Path(out).resolve().name)
        cache = ["--lora-merge-cache", str(Path(scratch, "adapters"))]
        context = _parse([config, str(target), *cache, *arguments])
        ours = _translate(config, context.params)
        result = merge(ours, fisher_dir=ours.fisher_dir or f"{os.path.abspath(out)}.fisher")
        method = _registered()
        method.changes = _Changes(result)
        try:
            with context:
                mergekit_yaml.invoke(context)
            method.changes.check_all_served()
        except RuntimeError as error:  # what mergekit raises for its users' mistakes
            raise ValueError(f"mergekit: {error}") from error
        finally:
            method.changes = None
        for file in target.iterdir():
            file.rename(folder / file.name)
        write_report(folder, result.report, result.problem.config)
        write_generated(folder, result.problem)
    return result


def _parse(arguments: list[str]) -> click.Context:
    """mergekit-yaml's command line, checked."""
    try:
        return mergekit_yaml.make_context("sst-merge mergekit", arguments)
    except click.ClickException as error:
        raise ValueError(f"mergekit-yaml: {error.format_message()}") from None
    except click.exceptions.Exit as done:  # after --help
        raise SystemExit(done.exit_code) from None


def _translate(file: str, options: dict[str, Any]) -> Config:
    """Our configuration of the merge that mergekit's YAML and options describe."""
    if not Path(file).is_file():
        raise ValueError(f"config file {file} does not exist")
    try:
        given = MergeConfiguration.model_validate(yaml.safe_load(Path(file).read_text(encoding="utf-8")))
    except (yaml.YAMLError, ValueError, RuntimeError) as error:  # mergekit's validators raise RuntimeError
        raise ValueError(f"{file} is no configuration of mergekit: {error}") from None
    if given.merge_method != "sst":
        raise ValueError(f"merge_method: expected sst, got {given.merge_method!r}; run mergekit-yaml for the others")
    if not given.models or given.base_model is None:
        raise ValueError("sst merges whole models: give `base_model` and `models`, not slices or modules")
    if given.tokenizer or given.tokenizer_source not in (None, "base"):
        raise ValueError("tokenizer: sst keeps the base's vocabulary; leave out tokenizer and tokenizer_source")
    models = []
    for entry in given.models:
        reference = entry.model
        if reference == given.base_model and not entry.parameters:
            continue
        if reference.lora is None or reference.model != given.base_model.model:
            raise ValueError(
                f"models: {reference} is no adapter on the base; name it as {given.base_model}+ADAPTER "
                "(mergekit-extract-lora makes an adapter of a full checkpoint)"
            )
        if reference.lora.revision or reference.model.revision:
            raise ValueError(f"models: {reference} names a revision; download it and give its folder")
        for path in (reference.lora.path, reference.model.path):
            if Path(path).exists() and not path.startswith((".", "/", "~")):
                raise ValueError(f"models: {path} is a folder, but mergekit would ask the Hub for it; write ./{path}")
        parameters = dict(entry.parameters or {})
        role = parameters.pop("role", None)
        models.append({"model": reference.lora.path, "role": role, "parameters": parameters})
    known = MergeOptions(**{key: options[key] for key in MergeOptions.model_fields})
    settings = dict(given.parameters or {})
    top = {"fisher_dir": settings.pop("fisher_dir", None), "trust_remote_code": known.trust_remote_code}
    return sst_config(given.base_model.model.path, models, settings, device=known.device, **top)


class _Changes:
    """What a solved merge makes of the base's tensors, by name; frees the base model."""

    def __init__(self, result: MergeResult) -> None:
        problem, alpha = result.problem, result.problem.config.alphas[0]
        self.updates = result.updates(alpha)
        self.biases = result.plan.merged_biases(problem, alpha)
        self.saved = problem.saved
        self.layers = {name: problem.skeleton.get_submodule(name) for name in self.updates}
        names = {f"{name}.weight" for name in self.updates} | {f"{name}.bias" for name in self.biases}
        self.names = names | self.saved.keys()
        self.served: set[str] = set()
        self._refuse_tied(problem.skeleton)
        vars(problem).pop("model", None)  # mergekit reads the weights itself

    def _refuse_tied(self, model: nn.Module) -> None:
        """ValueError if only one of two tied matrices changes."""
        if not model.config.get_text_config().tie_word_embeddings:
            return
        tied = {id(layer) for layer in (model.get_input_embeddings(), model.get_output_embeddings())}
        for name in sorted(self.names):
            if id(model.get_submodule(name.rpartition(".")[0])) in tied:
                raise ValueError(
                    f"{name} is changed, but the base ties its embeddings and a checkpoint of it holds one matrix for "
                    "both; use `sst-merge merge`, whose adapter keeps them apart"
                )

    def apply(self, name: str, base: Tensor) -> Tensor:
        """W_0 + ΔW in float32, rounded once; b_0 + Δb; a whole parameter; or the base's tensor itself."""
        if name not in self.names:
            return base
        self.served.add(name)
        module, _, leaf = name.rpartition(".")
        start = self.saved.get(name, base).to(base.device)
        if leaf == "bias":
            change = self.biases.get(module)
        elif module in self.updates:
            change = as_stored(self.layers[module], self.updates[module].dense()).reshape(start.shape)
        else:
            change = None
        if change is None:
            return start.to(base.dtype)
        return (start.float() + change.to(base.device, torch.float32)).to(base.dtype)

    def check_all_served(self) -> None:
        """ValueError if mergekit never asked for a changed tensor."""
        if missing := sorted(self.names - self.served):
            raise ValueError(
                f"mergekit's description of this architecture lacks {missing}, which the merge changes; "
                "use `sst-merge merge`"
            )


class _SstMerge(GroupMergeMethod):
    """mergekit's interface to the changes that are being served."""

    spec = MergeMethodSpec(
        name="sst",
        pretty_name="SST (Safety Subspace Task-Merge)",
        contract=InputContract(base=BasePolicy.REQUIRED, min_inputs=3, max_inputs=3),
        optional_tensor_policy=OptionalTensorPolicy.PASSTHROUGH_BASE_SINGLETON,
    )
    changes: _Changes | None = None

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        """The merged tensor of a name."""
        if self.changes is None:
            raise ValueError("merge_method sst: solved beforehand, by `sst-merge mergekit CONFIG OUT`; run that")
        return self.changes.apply(group.metadata.name, group.base.tensor)


def _registered() -> _SstMerge:
    """The method in mergekit's registry, which takes a name once."""
    for method in registered_methods():
        if isinstance(method, _SstMerge):
            return method
    method = _SstMerge()
    register(method)
    return method
