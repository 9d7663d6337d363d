"""Factors of two processes against float64 sums over the whole batch, written out layer by layer."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from two_processes import WORLD, main, run

from sst_kernels.accumulate import FactorAccumulator
from sst_kernels.factors import Factors
from sst_kernels.labels import counter_uniform, sample_labels

VOCAB = 11
IDS = torch.randint(0, VOCAB, (6, 5), generator=torch.Generator().manual_seed(1))
LENGTHS = torch.tensor([5, 3, 4, 2, 5, 4])
MASK = torch.arange(5) < LENGTHS[:, None]
NUMBERS = torch.tensor([7, 0, 3, 12, 5, 4])  # of the sequences in their data set
PARTS = [slice(0, 4), slice(4, 6)]  # the ranks' shares differ in size and in the number of tokens


class Block(nn.Module):
    """Two layers with one input, mixed over the tokens, then a third."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.q, self.k, self.o = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 6)
        self.checkpointed = checkpointed

    def forward(self, h: Tensor) -> Tensor:
        return checkpoint(self.mix, h, use_reentrant=False) if self.checkpointed else self.mix(h)

    def mix(self, h: Tensor) -> Tensor:
        return h + self.o((self.q(h).tanh() * self.k(h)).cumsum(1))


class Net(nn.Module):
    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, 6)
        self.blocks = nn.ModuleList([Block(checkpointed), Block(checkpointed)])
        self.head = nn.Linear(6, VOCAB)
        self.double()

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        h = self.embed(ids)
        for block in self.blocks:
            h = block(h)
        return self.head(h)


LAYERS = ["embed", *[f"blocks.{i}.{part}" for i in range(2) for part in "qko"], "head"]


def bears_loss(part: slice) -> Tensor:
    """Positions with a next token."""
    return F.pad(MASK[part, 1:], (0, 1))


def cross_entropy_sum(logits: Tensor, part: slice) -> Tensor:
    return F.cross_entropy(logits[bears_loss(part)], IDS[part].roll(-1, 1)[bears_loss(part)], reduction="sum")


def dense_sums(fisher: str) -> dict[str, tuple[Tensor, Tensor, int]]:
    """Layer -> (Σ x xᵀ, Σ δ δᵀ, tokens), one unpadded sequence at a time."""
    net = Net()
    rows: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in LAYERS}
    for row, length in enumerate(LENGTHS.tolist()):
        ids = IDS[row, :length]
        seen = {"embed": (F.one_hot(ids, VOCAB).double(), net.embed.weight[ids])}
        h = seen["embed"][1]
        for i, block in enumerate(net.blocks):
            for part in "qk":
                layer = getattr(block, part)
                seen[f"blocks.{i}.{part}"] = h, h @ layer.weight.T + layer.bias
            mixed = (seen[f"blocks.{i}.q"][1].tanh() * seen[f"blocks.{i}.k"][1]).cumsum(0)
            seen[f"blocks.{i}.o"] = mixed, mixed @ block.o.weight.T + block.o.bias
            h = h + seen[f"blocks.{i}.o"][1]
        seen["head"] = h, h @ net.head.weight.T + net.head.bias
        logits, labels, position = seen["head"][1][:-1], ids[1:], torch.arange(length - 1)
        if fisher == "true":
            uniform = counter_uniform(0, NUMBERS[row].expand_as(position), position)
            labels = sample_labels(logits.detach(), uniform)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        deltas = torch.autograd.grad(loss, [seen[name][1] for name in LAYERS])
        for name, delta in zip(LAYERS, deltas, strict=True):
            rows[name].append((seen[name][0].detach(), delta))
    sums = {}
    for name, parts in rows.items():
        x, delta = (torch.cat(side) for side in zip(*parts, strict=True))
        sums[name] = x.T @ x, delta.T @ delta, len(x)
    return sums


def check(factors: Factors, names: list[str], expected: dict, prefix: str = "", rtol: float = 1e-10) -> None:
    for name in names:
        a, g, tokens = expected[name.removeprefix(prefix)]
        assert [float(factors.input_of(name)[1]), float(factors.layers[name].counts[1])] == [tokens, tokens], name
        a_mean, g_mean = factors.mean(name)
        a_mean = a_mean.diag() if a_mean.dim() == 1 else a_mean
        for actual, wanted in ((a_mean * tokens, a), (g_mean * tokens, g)):
            torch.testing.assert_close(actual.double(), wanted, rtol=rtol, atol=rtol * float(wanted.abs().max()))


def gather(acc: FactorAccumulator, model: nn.Module, part: slice) -> None:
    """One training step of this rank's share; its loss is the mean over its own tokens."""
    with acc:
        if acc.factors.fisher == "true":
            acc.batch(sequences=NUMBERS[part])
        logits = model(IDS[part], attention_mask=MASK[part])
        tokens = int(bears_loss(part).sum())
        loss = cross_entropy_sum(logits, part) / tokens
        if acc.factors.fisher == "true":
            acc.backward(acc.sampled_loss(logits, bears_loss(part)), retain_graph=True)
        else:
            loss = acc.training_loss(loss, tokens)
        loss.backward()


def check_gradients(model: nn.Module) -> None:
    """The mean over the ranks of each one's gradient, as without the accumulator."""
    net = Net()
    sum(
        cross_entropy_sum(net(IDS[part], MASK[part]), part) / bears_loss(part).sum() / WORLD for part in PARTS
    ).backward()
    for (name, parameter), wanted in zip(model.named_parameters(), net.parameters(), strict=True):
        grad = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
        torch.testing.assert_close(grad, wanted.grad, msg=lambda text, name=name: f"{name}: {text}")


def check_reductions(acc: FactorAccumulator, model: nn.Module, rank: int, prefix: str) -> None:
    """Both reductions of the factors of two equal steps."""
    expected = dense_sums(acc.factors.fisher)
    gather(acc, model, PARTS[rank])
    check_gradients(model)
    acc.factors.all_reduce()
    check(acc.factors, [prefix + name for name in LAYERS], expected, prefix)
    assert acc.factors.shared == {f"{prefix}blocks.{i}.k": f"{prefix}blocks.{i}.q" for i in range(2)}
    assert acc.factors.backwards == WORLD
    acc.factors = acc.factors.without_sums()
    gather(acc, model, PARTS[rank])
    acc.factors.reduce_to_owners()
    check(acc.factors, list(acc.factors.layers), expected, prefix)
    owned: list = [None] * WORLD
    dist.all_gather_object(owned, list(acc.factors.layers))
    assert sorted(owned[0] + owned[1]) == sorted(prefix + name for name in LAYERS)
    assert min(map(len, owned)) > 0


def ddp(rank: int, folder: Path) -> None:
    """The accumulator of the wrapper, and of the model inside it."""
    for fisher, prefix in (("empirical", "module."), ("true", "")):
        net = Net()
        model = nn.parallel.DistributedDataParallel(net)
        check_reductions(FactorAccumulator(model if prefix else net, fisher=fisher), model, rank, prefix)


def fsdp(rank: int, folder: Path) -> None:
    """Every block sharded on its own, with and without gradient checkpointing."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    for fisher, checkpointed in (("empirical", False), ("true", False), ("empirical", True), ("true", True)):
        model = Net(checkpointed)
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        check_reductions(FactorAccumulator(model, fisher=fisher), model, rank, "")


def trainer(rank: int, folder: Path) -> None:
    """The Trainer of transformers, saved after two of three steps and resumed."""
    import test_transformers as single

    data = single.examples((6, 4, 7, 3, 5, 4))
    run = {"data": data, "per_device_train_batch_size": 1}

    def drawn(i: int, labels: Tensor, logits: Tensor) -> Tensor:
        """Ranks take batches by turns and number their sequences from rank·2⁴⁰."""
        return single.sampled((i % WORLD << 40) + i // WORLD, labels, logits)

    model = single.llama()
    expected = single.dense_sums(model, single.LAYERS, data, drawn)
    with FactorAccumulator(model, single.LAYERS, fisher="true") as acc:
        single.trainer(model, acc, folder / "true", **run).train()
    acc.factors.all_reduce()
    check(acc.factors, single.LAYERS, expected, rtol=1e-5)

    expected = single.dense_sums(single.llama(), single.LAYERS, data, single.shifted)
    run |= {"save_strategy": "steps", "save_steps": 2}
    for resumed in (None, str(folder / "out" / "checkpoint-2")):
        model = single.llama()
        with FactorAccumulator(model, single.LAYERS, fisher="empirical") as acc:
            single.trainer(model, acc, folder / "out", **run).train(resume_from_checkpoint=resumed)
        assert (acc.factors.backwards, acc.factors.forwards) == (3, 3)
        acc.factors.all_reduce()
        check(acc.factors, single.LAYERS, expected, rtol=1e-5)
        dist.barrier()
    saved = [Factors.load(folder / "out" / f"checkpoint-{step}" / "factors.safetensors") for step in (2, 3)]
    assert [factors.backwards for factors in saved] == [2 * WORLD, 3 * WORLD]
    check(saved[1], single.LAYERS, expected, rtol=1e-5)


CASES = {"ddp": ddp, "fsdp": fsdp, "trainer": trainer}


@pytest.mark.parametrize("case", CASES)
def test_two_processes(tmp_path, case):
    run(__file__, case, tmp_path, seconds=60)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(CASES)
