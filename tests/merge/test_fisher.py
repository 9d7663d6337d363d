"""Fishers against dense per-sequence gradients in float64, and the true Fisher against its exact expectation and KL."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sst_kernels.collect import CoreBasis
from sst_kernels.labels import counter_uniform
from sst_merge.data import TokenSequence
from sst_merge.fisher import (
    CollectionSettings,
    Collector,
    Part,
    collect_statistics,
    log_likelihood,
)
from sst_merge.packing import batches
from sst_merge.sums import FisherSums
from sst_merge.tasks import Task

NAMES = {"model.layers.0.self_attn.v_proj": (8, 8), "model.layers.1.mlp.gate_proj": (12, 8)}
VOCABULARY = 7


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(6)  # initial weights are so small that every distribution is uniform
    return model


def make_problem(seed: int = 1):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    bases = {n: CoreBasis(torch.linalg.qr(draw(o, 2)).Q, torch.linalg.qr(draw(i, 3)).Q) for n, (o, i) in NAMES.items()}
    return bases, {n: draw(2, 3) for n in NAMES}, {n: draw(2, 3) for n in NAMES}


def make_sequences(lengths: list[int]) -> list[TokenSequence]:
    g = torch.Generator().manual_seed(3)
    return [
        TokenSequence(i, torch.randint(VOCABULARY, (n,), generator=g).tolist(), [t >= 2 for t in range(n)])
        for i, n in enumerate(lengths)
    ]


def dense_gradient(model, bases, cores, sequence: TokenSequence, labels: list[int]) -> dict[str, torch.Tensor]:
    """∂ Σ log p(label_t)/∂C by autograd through the updated weights."""
    leaves = {n: c.clone().requires_grad_() for n, c in cores.items()}
    weights = {
        f"{n}.weight": model.get_submodule(n).weight + bases[n].q_out @ leaves[n] @ bases[n].q_in.mT for n in bases
    }
    ids = torch.tensor([sequence.input_ids])
    logp = torch.func.functional_call(model, weights, kwargs={"input_ids": ids}).logits[0].log_softmax(-1)
    at = [t for t in range(len(labels)) if sequence.is_target[t]]
    loss = sum(logp[t - 1, labels[t]] for t in at)
    return {n: torch.autograd.grad(loss, leaf, retain_graph=True)[0].flatten() for n, leaf in leaves.items()}


def collect(model, bases, origin, patch, settings, sequences, *, sampled, points, representation="exact") -> FisherSums:
    with Collector(model, bases, origin, patch, settings) as collector:
        return collector.collect(Part("test", sequences, sampled, points, representation))


@pytest.mark.parametrize("representation", ["exact", "gram", "diagonal"])
@pytest.mark.parametrize("count", [2, 4])  # with two points 4 or 8 rows, n = 6 coordinates
def test_empirical_fisher_on_the_path(representation, count):
    model, (bases, origin, patch), sequences = (
        make_model(),
        make_problem(),
        make_sequences([5, 9, 3, 6][:count]),
    )
    points = {0.25: 0.75, 0.5: 0.25}
    settings = CollectionSettings(batch_size=3)
    given = {"sampled": False, "points": points, "representation": representation}
    sums = collect(model, bases, origin, patch, settings, sequences, **given)
    for name in NAMES:
        expected, mean = 0, 0
        for (t, w), s in itertools.product(points.items(), sequences):
            g = dense_gradient(model, bases, {n: origin[n] + t * patch[n] for n in NAMES}, s, s.input_ids)[name]
            expected, mean = expected + w * torch.outer(g, g) / count, mean + w * g / count
        torch.testing.assert_close(
            sums.fisher(name), expected.diagonal() if representation == "diagonal" else expected, rtol=1e-5, atol=1e-7
        )
        torch.testing.assert_close(sums.diagonal_of(name), expected.diagonal(), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(sums.mean_gradient(name), mean, rtol=1e-5, atol=1e-7)
        vectors = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        metric = expected.diagonal().diag() if representation == "diagonal" else expected
        quadratic = (vectors * (metric @ vectors)).sum(0)
        torch.testing.assert_close(sums.quadratic([name], vectors), quadratic, rtol=1e-5, atol=1e-7)
        assert (name in sums.rows) == (representation == "gram" or (representation == "exact" and count == 2))


def test_results_do_not_depend_on_batch_size_or_order():
    model, (bases, origin, patch), sequences = (
        make_model(),
        make_problem(),
        make_sequences([5, 9, 3, 6, 8]),
    )
    results = []
    for size, order in ((1, sequences), (2, sequences[::-1]), (5, sequences[2:] + sequences[:2])):
        settings = CollectionSettings(batch_size=size)
        for sampled in (False, True):
            sums = collect(model, bases, origin, patch, settings, order, sampled=sampled, points={0.5: 1.0})
            results.append((sampled, sums))
    for sampled, sums in results[2:]:
        for name in NAMES:
            torch.testing.assert_close(sums.fisher(name), results[sampled][1].fisher(name), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("representation", ["exact", "gram", "diagonal"])
@pytest.mark.parametrize("count", [2, 9])
def test_importance_weights_against_dense_gradients(representation, count):
    """F = Σ ω g gᵀ / Σ ω, matrices and rows; whole weights are the same as so many copies."""
    model, (bases, origin, patch) = make_model(), make_problem()
    sequences = make_sequences([5, 9, 3, 6, 7, 4, 5, 6, 8][:count])
    weighted = [replace(s, weight=w) for s, w in zip(sequences, [2.0, 0.5, 1.0, 3.0, *[1.0] * 5], strict=False)]
    settings = CollectionSettings(batch_size=3)
    points = {0.0: 0.25, 0.5: 0.75}
    given = {"sampled": False, "points": points, "representation": representation}
    sums = collect(model, bases, origin, patch, settings, weighted, **given)
    total = sum(s.weight for s in weighted)
    assert (sums.count, sums.sequences) == (total, count)
    assert sums.effective == pytest.approx(total**2 / sum(s.weight**2 for s in weighted))
    for name in NAMES:
        expected, mean = 0, 0
        for (t, w), s in itertools.product(points.items(), weighted):
            g = dense_gradient(model, bases, {n: origin[n] + t * patch[n] for n in NAMES}, s, s.input_ids)[name]
            expected, mean = expected + w * s.weight * torch.outer(g, g) / total, mean + w * s.weight * g / total
        torch.testing.assert_close(
            sums.fisher(name), expected.diagonal() if representation == "diagonal" else expected, rtol=1e-5, atol=1e-7
        )
        torch.testing.assert_close(sums.mean_gradient(name), mean, rtol=1e-5, atol=1e-7)
    doubled = [replace(s, weight=2.0 if i == 1 else 1.0) for i, s in enumerate(sequences)]
    copied = [*sequences, sequences[1]]
    for sampled in (False, True):
        ours, theirs = (
            collect(model, bases, origin, patch, settings, data, sampled=sampled, points=points)
            for data in (doubled, copied)
        )
        for name in NAMES:
            torch.testing.assert_close(ours.fisher(name), theirs.fisher(name), rtol=1e-9, atol=1e-12)


def exact_true_fisher(model, bases, cores, sequence: TokenSequence) -> dict[str, torch.Tensor]:
    """E over all label sequences of g gᵀ, given the prefix: Σ_t E_ŷ s_t s_tᵀ (scores at positions are uncorrelated)."""
    ids = torch.tensor([sequence.input_ids])
    weights = {
        f"{n}.weight": model.get_submodule(n).weight + bases[n].q_out @ cores[n] @ bases[n].q_in.mT for n in bases
    }
    p = torch.func.functional_call(model, weights, kwargs={"input_ids": ids}).logits[0].softmax(-1).detach()
    total = {n: torch.zeros(6, 6, dtype=torch.float64) for n in bases}
    for t in range(len(sequence.input_ids)):
        if not sequence.is_target[t]:
            continue
        only_t = TokenSequence(0, sequence.input_ids, [i == t for i in range(len(sequence.input_ids))])
        for label in range(VOCABULARY):
            g = dense_gradient(model, bases, cores, only_t, [label] * len(sequence.input_ids))
            for n in bases:
                total[n] += p[t - 1, label] * torch.outer(g[n], g[n])
    return total


def test_true_fisher_converges_to_its_expectation():
    model, (bases, origin, patch), sequences = make_model(), make_problem(), make_sequences([4, 5])
    samples = 4000
    settings = CollectionSettings(samples=samples, batch_size=2)
    sums = collect(model, bases, origin, patch, settings, sequences, sampled=True, points={0.0: 1.0})
    exact = [exact_true_fisher(model, bases, origin, s) for s in sequences]
    for name in NAMES:
        expected = sum(e[name] for e in exact) / 2
        error = (sums.fisher(name) - expected).norm() / expected.norm()
        assert error < 0.1  # about 1/sqrt(2·4000) times the spread of |g|² (a few)
        assert error > 1e-6  # it is sampled


def test_true_fisher_is_the_metric_of_the_kl_divergence():
    """KL(p_0 ‖ p_φ) = ½ φᵀFφ + O(φ³), for the exact expectation that the sampled Fisher converges to."""
    model, (bases, origin, patch), (sequence,) = make_model(), make_problem(), make_sequences([6])
    name = next(iter(NAMES))
    fisher = exact_true_fisher(model, bases, origin, sequence)[name]
    step = 1e-3 * patch[name]

    def log_p(core):
        weights = {}
        for n in bases:
            c = core if n == name else origin[n]
            weights[f"{n}.weight"] = model.get_submodule(n).weight + bases[n].q_out @ c @ bases[n].q_in.mT
        ids = torch.tensor([sequence.input_ids])
        with torch.no_grad():
            return torch.func.functional_call(model, weights, kwargs={"input_ids": ids}).logits[0, 1:-1].log_softmax(-1)

    before, after = log_p(origin[name]), log_p(origin[name] + step)
    kl = float((before.exp() * (before - after)).sum())
    quadratic = 0.5 * float(step.flatten() @ fisher @ step.flatten())
    assert kl == pytest.approx(quadratic, rel=0.02)


def sampled_labels(model, bases, cores, sequence: TokenSequence, seed: int) -> list[int]:
    """ŷ_t by numpy's inverse CDF at the counter-based uniform, from the explicitly updated weights."""
    weights = {
        f"{n}.weight": model.get_submodule(n).weight + bases[n].q_out @ cores[n] @ bases[n].q_in.mT for n in bases
    }
    ids = torch.tensor([sequence.input_ids])
    p = torch.func.functional_call(model, weights, kwargs={"input_ids": ids}).logits[0].softmax(-1).detach().numpy()
    labels = [0]
    for t in range(1, len(sequence.input_ids)):
        u = counter_uniform(seed, torch.tensor(sequence.index), torch.tensor(t)).item()
        labels.append(int((p[t - 1].cumsum() <= u).sum()))
    return labels


def test_statistics_take_each_fisher_from_its_sequences_labels_and_points():
    model, (bases, origin, patch), sequences = make_model(), make_problem(), make_sequences([5, 9, 3, 6, 7, 4])
    harm, benign = Task("", 1.0, sequences[:2], sequences[2:3]), Task("", 1.0, sequences[3:5], sequences[5:])
    settings = CollectionSettings(points=(0.25, 0.5), point_weights=(0.75, 0.25), seed=5)
    with Collector(model, bases, origin, patch, settings) as collector:
        statistics = collect_statistics(collector, [harm], [benign])
    points = {t: {n: origin[n] + t * patch[n] for n in NAMES} for t in (0.0, 0.25, 0.5)}
    for sums, part, sampled in (
        (statistics.harm, harm.found, False),
        (statistics.harm_held, harm.held, False),
        (statistics.benign, benign.found, True),
        (statistics.benign_held, benign.held, True),
    ):
        expected = {n: torch.zeros(6, 6, dtype=torch.float64) for n in NAMES}
        for (t, weight), s in itertools.product(((0.25, 0.75), (0.5, 0.25)), part):
            labels = sampled_labels(model, bases, points[t], s, 5) if sampled else s.input_ids
            for n, g in dense_gradient(model, bases, points[t], s, labels).items():
                expected[n] += weight * torch.outer(g, g) / len(part)
        for n in NAMES:
            torch.testing.assert_close(sums.fisher(n), expected[n], rtol=1e-5, atol=1e-7)
    for n in NAMES:
        mean = sum(dense_gradient(model, bases, points[0.0], s, s.input_ids)[n] for s in harm.found) / 2
        torch.testing.assert_close(statistics.gradient(n), mean, rtol=1e-5, atol=1e-7)


def test_overflow_and_repeated_modules_are_named():
    model, (bases, origin, patch), sequences = make_model(), make_problem(), make_sequences([5, 9])
    huge = {n: c * 1e200 for n, c in origin.items()}
    with pytest.raises(ValueError, match=r"gradients of module 'model.layers.*not finite.*--dtype"):
        collect(
            model,
            bases,
            huge,
            patch,
            CollectionSettings(),
            sequences,
            sampled=False,
            points={0.0: 1.0},
        )
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(ValueError, match="'model.layers.0.self_attn.v_proj' is called more than once"):
        only = {"model.layers.0.self_attn.v_proj": bases["model.layers.0.self_attn.v_proj"]}
        core = {n: origin[n] for n in only}
        collect(
            model,
            only,
            core,
            core,
            CollectionSettings(),
            sequences,
            sampled=False,
            points={0.0: 1.0},
        )


def test_log_likelihood_counts_loss_bearing_tokens_only():
    model, sequences = make_model(), make_sequences([5, 8])
    (batch,) = batches(sequences, 2, "cpu")
    loss, _ = log_likelihood(model, batch, seed=None)
    expected = 0.0
    for s in sequences:
        logp = model(input_ids=torch.tensor([s.input_ids])).logits[0].log_softmax(-1).detach()
        expected += float(sum(logp[t - 1, s.input_ids[t]] for t in range(2, len(s.input_ids))))
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
