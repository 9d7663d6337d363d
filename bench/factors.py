"""Gathering K-FAC's factors of a small transformer: FactorAccumulator against kronfluence's fit_covariance_matrices.

    pip install kronfluence==1.0.1
    python bench/factors.py [--device cuda] [--repeats 10] [--out FILE.json]

The same Llama, batches and losses (empirical Fisher, summed over tokens), all linear layers but the head. Both
are checked to give the same means (1e-5 of the largest entry). What is compared is the factor part: each one's time
less that of forward and backward through the frozen model without factors, timed in the same run. Floor:
Σ T (d_in (d_in + 1) + d_out (d_out + 1)) flops, each input once.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable

import torch
from kronfluence.analyzer import prepare_model
from kronfluence.arguments import FactorArguments
from kronfluence.factor.covariance import fit_covariance_matrices_with_loader
from kronfluence.task import Task
from kronfluence.utils.state import State
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from harness import Limits, Row, arguments, interleaved, limits, report
from sst_kernels import FactorAccumulator

VOCABULARY = 512
CPU_CASES = [(256, 4, 4, 256), (512, 4, 4, 512)]  # hidden, layers, batch, tokens
CUDA_CASES = [(1024, 8, 8, 1024)]
BATCHES = 2


class LanguageModelling(Task):
    """Kronfluence's view of the loss."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def compute_train_loss(self, batch: Tensor, model: nn.Module, sample: bool = False) -> Tensor:
        """Sum of the tokens' losses; labels are the data's."""
        return token_loss(model, batch)

    def compute_measurement(self, batch: Tensor, model: nn.Module) -> Tensor:
        """Not used here."""
        return token_loss(model, batch)

    def get_influence_tracked_modules(self) -> list[str]:
        """The layers that get factors."""
        return self.names


def token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """−Σ log p of each token after the first."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="sum")


def make_model(hidden: int, layers: int, device: torch.device) -> nn.Module:
    """A random Llama without biases, frozen."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
    )
    return LlamaForCausalLM(config).to(device).eval().requires_grad_(False)


def plain(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Forward and backward without factors."""
    for batch in batches:
        token_loss(model, batch).backward()


def measure(case: tuple[int, int, int, int], repeats: int, machine: Limits, device: torch.device) -> Row:
    """Checks that the means agree, then times both and the pass without factors."""
    hidden, layers, batch, tokens = case
    model = make_model(hidden, layers, device)
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
    specs = {
        name: module.weight.shape
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    batches = [torch.randint(VOCABULARY, (batch, tokens), device=device) for _ in range(BATCHES)]
    task = LanguageModelling(list(specs))
    tracked = prepare_model(copy.deepcopy(model), task)

    def theirs() -> dict[str, dict[str, Tensor]]:
        settings = FactorArguments(use_empirical_fisher=True)
        return fit_covariance_matrices_with_loader(tracked, State(), task, batches, settings, disable_tqdm=True)[1]

    def ours() -> FactorAccumulator:
        with FactorAccumulator(model, list(specs), fisher="empirical") as acc:
            for tokens in batches:
                acc.backward(acc.training_loss(token_loss(model, tokens)))
        return acc

    warnings.filterwarnings("ignore", message="FactorAccumulator has no factors")
    check(ours(), theirs())
    mine, peer, without = interleaved([ours, theirs, lambda: plain(model, batches)], repeats, device)
    rows = BATCHES * batch * tokens
    shapes = [d for name, (d_out, d_in) in specs.items() for d in ([d_out] if shares(name) else [d_out, d_in])]
    floor = machine.floor(0, sum(rows * d * (d + 1) for d in shapes))
    print(f"hidden {hidden}: whole {mine:.3f} s, kronfluence {peer:.3f} s, without factors {without:.3f} s")
    return Row(f"hidden {hidden}, {layers} layers, {rows} tokens, factor part", mine - without, peer - without, floor)


def shares(name: str) -> bool:
    """Whether another layer has the same input: k and v that of q, up that of gate."""
    return name.endswith(("k_proj", "v_proj", "up_proj"))


def check(acc: FactorAccumulator, theirs: dict[str, dict[str, Tensor]]) -> None:
    """Raises unless all means agree."""
    for name in acc.factors.specs:
        for mean, kind in zip(acc.factors.mean(name), ("activation", "gradient"), strict=True):
            count = theirs[f"num_{kind}_covariance_processed"][name]
            expected = theirs[f"{kind}_covariance"][name] / count
            torch.testing.assert_close(mean.cpu(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def main() -> None:
    """Runs all cases."""
    options = arguments(__doc__)
    machine = limits(options.device, torch.float32)
    cases = CUDA_CASES if options.device.type == "cuda" else CPU_CASES
    report(__doc__.splitlines()[0], [measure(c, options.repeats, machine, options.device) for c in cases], options)


if __name__ == "__main__":
    main()
