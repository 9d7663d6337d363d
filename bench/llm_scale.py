"""A merge of a Llama-8B's shape, start of collection to written adapter: against forward and backward alone.

    python bench/llm_scale.py [--scale 0.001] [--device cuda] [--dtype bfloat16] [--repeats 3] [--out FILE.json]
    python bench/llm_scale.py --sweep tokens modules ranks [--out FILE.json]        (also draws FILE.png)

Random weights in the shape of Llama 3.1 8B, two rank-16 adapters on all linear layers of its blocks (224 modules,
n = 1024), 2 × 500 sequences of 512 tokens, the second half of each bearing the loss; `exact` `local` Fishers, else the
defaults of method sst. `sst_merge.merge` does it on objects in memory, as `apply_sst` has it: statistics are not kept
on disk. At a scale s below 1 widths, heads, vocabulary and layers are divided by the power of two nearest to s^-0.3 (8
at 1/1000), rank and length stay, and there are as many sequences as make parameters × tokens s times those of full
size.

Passes: a quarter of the sequences is held out, and every sequence gets one forward and one backward pass. Two forward
passes over the held-out ones, in which the merge is measured, are in our time but not in the peer's.

Peer: the base alone, weights frozen, differentiated with respect to its embedding's output, same batches. Floor:
4 · parameters · tokens flops of forward and activation gradients (the input embedding, a look-up, left out) over the
measured rate of a large matrix product. Memory: the allocator's peak in each stage on CUDA, and the resident size.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import sst_merge.merging as merging
import sst_merge.methods as methods
import sst_merge.problem as problem_module
from harness import Limits, Row, interleaved, limits, parser, provenance
from sst_kernels import Gram, LowRankPlusDiagonal, Pencil, solve
from sst_kernels.collect import CoreGradients
from sst_merge.adapters import Adapter, LowRank, write_files
from sst_merge.fisher import Collector, log_likelihood
from sst_merge.merging import MergeResult, merge
from sst_merge.packing import batches
from sst_merge.problem import Live, Problem
from sst_merge.sums import FisherSums

BATCH_SIZE = 8
PAIRS = 64


@dataclass(frozen=True)
class Case:
    """Shape of the model, of the adapters and of the data; by default Llama 3.1 8B."""

    hidden: int = 4096
    intermediate: int = 14336
    heads: int = 32
    key_value_heads: int = 8
    layers: int = 32
    vocabulary: int = 128256
    rank: int = 16
    sequences: int = 500
    length: int = 512

    @property
    def parameters(self) -> int:
        """Weights that multiply: all but the input embedding."""
        head = self.hidden // self.heads
        attention = 2 * self.hidden * head * (self.heads + self.key_value_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate) + self.vocabulary * self.hidden

    @property
    def tokens(self) -> int:
        """Of both sets."""
        return 2 * self.sequences * self.length


def scaled(scale: float) -> Case:
    """The case whose parameters × tokens are `scale` times those of full size."""
    full, by = Case(), 2 ** round(-0.3 * math.log2(scale))
    small = Case(*(max(1, size // by) for size in (4096, 14336, 32, 8, 32, 128256)))
    return replace(small, sequences=round(full.sequences * scale * full.parameters / small.parameters))


def make_model(case: Case, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A random Llama of the case's shape."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        intermediate_size=case.intermediate,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.key_value_heads,
        max_position_embeddings=case.length,
        tie_word_embeddings=False,
    )
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


def make_adapter(model: nn.Module, rank: int, seed: int) -> Adapter:
    """A random adapter of all linear layers of the blocks, ΔW about 1% of W."""
    generator = torch.Generator().manual_seed(seed)
    updates = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            (d_out, d_in), device = module.weight.shape, module.weight.device
            up, down = torch.randn(d_out, rank, generator=generator), torch.randn(rank, d_in, generator=generator)
            updates[name] = LowRank((2e-4 * up).to(device), (down / rank**0.5).to(device))
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM"}
    return Adapter(Path(f"adapter-{seed}"), None, None, updates, frozenset(), {}, {}, config)


def write_sequences(case: Case, seed: int, path: Path) -> str:
    """Random tokens as a calibration file; the second half of each sequence bears the loss."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(case.vocabulary, (case.sequences, case.length), generator=generator).tolist()
    half = case.length // 2
    path.write_text("\n".join(json.dumps({"input_ids": r, "labels": [-100] * half + r[half:]}) for r in rows))
    return str(path)


class Stages:
    """Seconds and peak memory of stages, by wrapping the functions that they consist of.

    Attributes:
        seconds: Stage -> seconds of all its calls.
        memory: Stage -> the allocator's peak on CUDA, bytes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.memory: defaultdict[str, int] = defaultdict(int)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """One call of a stage."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        yield
        if cuda:
            torch.cuda.synchronize()
            self.memory[name] = max(self.memory[name], torch.cuda.max_memory_allocated())
        self.seconds[name] += time.perf_counter() - started

    def _wrapped(self, function: Callable, name: str | Callable[..., str]) -> Callable:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name if isinstance(name, str) else name(*args, **kwargs)):
                return function(*args, **kwargs)

        return call

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within it, the merge's stages are timed."""
        functions = (
            (problem_module, "core_basis", "bases"),
            (Collector, "collect", lambda collector, part, *rest: f"collect {part.name}"),
            (methods, "find_directions", "solve"),
            (methods.Plan, "low_rank", "merge"),
            (merging, "measure", "measure"),
            (merging, "build_report", "report"),
        )
        with ExitStack() as stack:
            for owner, attribute, name in functions:
                stack.enter_context(patch.object(owner, attribute, self._wrapped(getattr(owner, attribute), name)))
            yield


class Run:
    """One case: our merge and its peer.

    Attributes:
        stages: Of every timed merge.
        result: Of the last one.
    """

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype, folder: Path) -> None:
        self.case, self.device, self.folder = case, device, folder
        self.model = make_model(case, device, dtype)
        utility, safety = (make_adapter(self.model, case.rank, seed) for seed in (1, 2))
        self.live = Live(utility, safety, self.model, tokenizer=object())  # the data are token ids
        self.config = {
            "base_model": "random weights in memory",
            "models": [{"model": role, "role": role} for role in ("utility", "safety")],
            "parameters": {"where": "local"},
            "calibration": {
                **{
                    kind: write_sequences(case, seed, folder / f"{kind}.jsonl")
                    for seed, kind in enumerate(("harm", "benign"))
                },
                "max_length": case.length,
                "batch_size": BATCH_SIZE,
            },
            "device": str(device),
        }
        self.stages: list[Stages] = []
        self.result: MergeResult | None = None

    def merge(self) -> None:
        """From the start of collection to the written adapter."""
        self.result, stages = None, Stages(self.device)
        with stages.watched():
            self.result = result = merge(self.config, live=self.live)
        with stages.stage("write"), tempfile.TemporaryDirectory(dir=self.folder) as out:
            problem = result.problem
            write_files(Path(out), result.updates(1.0), sources=(problem.utility, problem.safety))
        self.stages.append(stages)

    def peer(self) -> None:
        """One forward and one backward pass of every batch that was collected from."""
        handle = self.model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
        for parts in self.result.problem.calibration.values():
            for part in parts:
                for batch in batches(part, BATCH_SIZE, self.device):
                    log_likelihood(self.model, batch, None)[0].backward()
        handle.remove()

    @torch.no_grad()
    def check(self) -> None:
        """Log p of a batch with the cores of Δ_utility equals that with Δ_utility in the weights."""
        problem: Problem = self.result.problem
        batch = next(batches(problem.calibration["harm"][0][:2], 2, self.device))
        with CoreGradients(self.model, problem.bases, watched=()) as hooked:
            hooked.set_cores({name: problem.cores(name)[0] for name in problem.names})
            ours = float(log_likelihood(self.model, batch, None)[0])
        weights = {name: self.model.get_submodule(name).weight for name in problem.names}
        kept = {name: weight.clone() for name, weight in weights.items()}
        for name, weight in weights.items():
            weight += problem.updates(name)[0].dense().to(weight.dtype)
        expected = float(log_likelihood(self.model, batch, None)[0])
        for name, weight in weights.items():
            weight.copy_(kept[name])
        tolerance = 1e-4 if self.model.dtype == torch.float32 else 1e-2
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=0.0)

    def solve_leading(self) -> float:
        """Seconds in which the leading pairs of all modules of full rank are found in one call."""
        curvature = self.result.plan.curvature
        harm, benign, gamma = curvature.statistics.harm, curvature.statistics.benign, self.result.plan.gamma
        n = 4 * self.case.rank**2
        names = [name for name, tau in curvature.patch.items() if tau.numel() == n]

        def rows(sums: FisherSums) -> torch.Tensor:
            return torch.stack([sums.rows[name].double() for name in names])

        j_harm, j_benign = rows(harm), rows(benign)
        damping = torch.full((len(names), n), gamma, dtype=torch.float64, device=self.device)
        pencil = Pencil(Gram(j_harm, harm.count), LowRankPlusDiagonal(j_benign.mT / benign.count**0.5, damping))
        stages = Stages(self.device)
        for name in ("first", "second"):
            with stages.stage(name):
                result = solve(pencil, min(PAIRS, j_harm.shape[1]))
        if not bool(result.converged.all()):
            raise RuntimeError("a pencil of the benchmark did not converge")
        return stages.seconds["second"]


def measure(case: Case, options: argparse.Namespace, machine: Limits, folder: Path) -> tuple[list[Row], Run]:
    """Times the merge and its peer, interleaved; rows of the whole and of the collection alone."""
    run = Run(case, options.device, options.dtype, folder)
    run.merge()
    run.check()
    run.stages.clear()
    times = interleaved([run.merge, run.peer], options.repeats, options.device, warmups=0)
    floor = machine.floor(0, 4 * case.parameters * case.tokens)
    collecting = statistics.median(
        sum(seconds for name, seconds in stages.seconds.items() if name.startswith("collect")) for stages in run.stages
    )
    return [Row("whole", *times, floor), Row("collection alone", collecting, times[1], floor)], run


def report_scale(options: argparse.Namespace, machine: Limits, folder: Path) -> dict[str, Any]:
    """One size: whole, stages, solve of all modules, memory."""
    case = scaled(options.scale)
    rows, run = measure(case, options, machine, folder)
    whole = rows[0].ours
    print(f"{case}\n\n| stage | seconds | of whole | peak on the device |\n|---|---|---|---|")
    table = {}
    for name in run.stages[0].seconds:
        seconds = statistics.median(stages.seconds[name] for stages in run.stages)
        memory = max(stages.memory[name] for stages in run.stages)
        table[name] = {"seconds": seconds, "device_bytes": memory}
        print(f"| {name} | {seconds:.2f} | {seconds / whole:.0%} | {memory / 2**30:.1f} GiB |")
    for row in rows:
        print(
            f"{row.case}: {row.ours:.1f} s, {row.ours / row.peer:.2f}× forward and backward alone ({row.peer:.1f} s), "
            f"{row.ours / row.floor:.2f}× the floor ({row.floor:.1f} s)"
        )
    leading = run.solve_leading()
    print(f"solve, {len(run.result.problem.names)} modules, n = {4 * case.rank**2}, k = {PAIRS}: {leading:.2f} s")
    resident = {
        "now": psutil.Process().memory_info().rss,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
    }
    print(f"resident: {resident['now'] / 2**30:.1f} GiB, at most {resident['peak'] / 2**30:.1f} GiB")
    return {
        "case": asdict(case),
        "rows": [{**asdict(row), "of_peer": row.ours / row.peer, "of_floor": row.of_floor} for row in rows],
        "stages": table,
        "solve_leading_seconds": leading,
        "resident_bytes": resident,
    }


SWEPT = Case(
    hidden=256, intermediate=896, heads=4, key_value_heads=1, layers=4, vocabulary=2048, sequences=32, length=128
)
SWEEPS: dict[str, tuple[str, Callable[[int], Case]]] = {
    "tokens": ("2 × sequences × length", lambda by: replace(SWEPT, sequences=SWEPT.sequences * by)),
    "modules": ("modules", lambda by: replace(SWEPT, layers=SWEPT.layers * by)),
    "ranks": ("rank of each adapter", lambda by: replace(SWEPT, rank=4 * by)),
}


def sweep(options: argparse.Namespace, machine: Limits, folder: Path) -> dict[str, Any]:
    """Cost against tokens, modules, ranks: seconds, and the exponent p of seconds = a·xᵖ by least squares."""
    found = {}
    for quantity in options.sweep:
        points = []
        for by in (1, 2, 4, 8):
            case = SWEEPS[quantity][1](by)
            x = {"tokens": case.tokens, "modules": 7 * case.layers, "ranks": case.rank}[quantity]
            (whole, collecting), _ = measure(case, options, machine, folder)
            points.append({"x": x, "whole": whole.ours, "collection": collecting.ours, "peer": whole.peer})
            print(f"{quantity} {x}: {whole.ours:.2f} s, collection {collecting.ours:.2f} s, peer {whole.peer:.2f} s")
        x = [point["x"] for point in points]
        exponents = {key: exponent(x, [point[key] for point in points]) for key in ("whole", "collection", "peer")}
        print(f"{quantity}: exponents " + ", ".join(f"{key} {p:.2f}" for key, p in exponents.items()))
        found[quantity] = {"points": points, "exponents": exponents}
    if options.out:
        draw(found, options.out.with_suffix(".png"))
    return {"case": asdict(SWEPT), "sweeps": found}


def exponent(x: list[float], y: list[float]) -> float:
    """Slope of log y over log x by least squares."""
    return statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope


def draw(found: dict[str, Any], path: Path) -> None:
    """A panel for each quantity."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(found), 3.2), layout="constrained")
    for axes, (quantity, sweep_) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        for key, p in sweep_["exponents"].items():
            points = sweep_["points"]
            axes.plot([q["x"] for q in points], [q[key] for q in points], "o-", label=f"{key}, exponent {p:.2f}")
        axes.set(xlabel=SWEEPS[quantity][0], ylabel="seconds", xlim=(0, None), ylim=(0, None))
        axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measures one size, or sweeps; prints, and writes the JSON."""
    parsing = parser(__doc__)
    parsing.set_defaults(repeats=3)
    parsing.add_argument("--scale", type=float, default=0.001, help="of parameters × tokens; 1 is Llama 8B's")
    parsing.add_argument("--dtype", help="of the model: bfloat16 by default on CUDA, float32 elsewhere")
    parsing.add_argument("--sweep", nargs="+", choices=SWEEPS, help="measure cost against these instead")
    options = parsing.parse_args()
    options.dtype = getattr(torch, options.dtype or ("bfloat16" if options.device.type == "cuda" else "float32"))
    machine = limits(options.device, options.dtype)
    with tempfile.TemporaryDirectory() as folder:
        content = (sweep if options.sweep else report_scale)(options, machine, Path(folder))
    if options.out:
        content = {"question": __doc__.splitlines()[0], **content, "provenance": provenance(options.device)}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
