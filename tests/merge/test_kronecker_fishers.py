"""K-FAC and EK-FAC in core coordinates against dense per-token gradients; every mix of forms against scipy."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from test_fisher import NAMES, collect, dense_gradient, make_model, make_problem, make_sequences

from sst_kernels.collect import TokenGradients
from sst_merge import pencils
from sst_merge.data import TokenSequence
from sst_merge.directions import find_directions
from sst_merge.fisher import CollectionSettings
from sst_merge.mixture import Mixture, Statistics, mix
from sst_merge.pencils import ALL_MODULES
from sst_merge.report import _not_converged
from sst_merge.select import filtered_cores, kept_coefficients
from sst_merge.settings import SstParameters
from sst_merge.sums import FisherSums

POINTS = {0.25: 0.75, 0.5: 0.25}


def tokens_of(model, bases, cores, sequence: TokenSequence) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Name -> x̂_t and δ̂_t of every token, from plain hooks on a model whose weights were changed by hand."""
    seen, handles, before = {}, [], {name: model.get_submodule(name).weight.detach().clone() for name in bases}

    def remember(name):
        def hook(module, args, output):
            output.retain_grad()
            seen[name] = args[0].detach(), output

        return hook

    with torch.no_grad():
        for name, basis in bases.items():
            model.get_submodule(name).weight += basis.q_out @ cores[name] @ basis.q_in.mT
    handles = [model.get_submodule(name).register_forward_hook(remember(name)) for name in bases]
    logp = model(torch.tensor([sequence.input_ids])).logits[0].log_softmax(-1)
    sum(logp[t - 1, i] for t, i in enumerate(sequence.input_ids) if sequence.is_target[t]).backward()
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        for name, weight in before.items():
            model.get_submodule(name).weight.copy_(weight)
    return {n: (x[0] @ bases[n].q_in, output.grad[0] @ bases[n].q_out) for n, (x, output) in seen.items()}


def reference(model, bases, origin, patch, sequences) -> dict[str, dict[str, torch.Tensor]]:
    """Name -> F by definition, and by both approximations token by token, (6, 6)."""
    sums = {n: {"exact": 0.0, "expand": [0.0, 0.0, 0.0], "reduce": [0.0, 0.0, 0.0]} for n in bases}
    for (t, w), sequence in itertools.product(POINTS.items(), sequences):
        cores = {n: origin[n] + t * patch[n] for n in bases}
        for name, (x, delta) in tokens_of(model, bases, cores, sequence).items():
            gradient = dense_gradient(model, bases, cores, sequence, sequence.input_ids)[name]
            torch.testing.assert_close((delta.mT @ x).flatten(), gradient, rtol=1e-8, atol=1e-10)
            sums[name]["exact"] += w * gradient.outer(gradient)
            bears = delta.abs().sum(1) > 0
            for kind, rows in (
                ("expand", list(zip(x[bears], delta[bears], strict=True))),
                ("reduce", [(x[bears].mean(0), delta.sum(0))]),
            ):
                for x_row, delta_row in rows:
                    for i, part in enumerate((delta_row.outer(delta_row), x_row.outer(x_row), 1.0)):
                        sums[name][kind][i] = sums[name][kind][i] + w * part
    found = {}
    for name, kept in sums.items():
        found[name] = {"exact": kept["exact"] / len(sequences)}
        for kind in ("expand", "reduce"):
            grad, inputs, total = kept[kind]
            found[name][kind] = (total / len(sequences)) * torch.kron(grad / total, inputs / total)
    return found


@pytest.mark.parametrize("representation", ["exact", "gram", "kfac_expand", "kfac_reduce"])
@pytest.mark.parametrize("count", [2, 5])  # fewer rows than the 6 coordinates, and more
@pytest.mark.parametrize("row_length", [None, 14])
def test_factors_are_those_of_the_tokens(representation, count, row_length):
    model, (bases, origin, patch) = make_model(), make_problem()
    sequences = make_sequences([5, 9, 3, 6, 4][:count])
    settings = CollectionSettings(batch_size=2, row_length=row_length)
    given = {"sampled": False, "points": POINTS, "representation": representation}
    sums = collect(model, bases, origin, patch, settings, sequences, **given)
    expected = reference(model, bases, origin, patch, sequences)
    for name in NAMES:
        for kind in sums.approximations:
            kfac = sums.operator(name, f"kfac_{kind}").to_dense()
            torch.testing.assert_close(kfac, expected[name][kind], rtol=1e-6, atol=1e-8)
            if representation in ("exact", "gram"):
                ekfac = sums.operator(name, f"ekfac_{kind}")
                basis = torch.kron(ekfac.left_vectors, ekfac.right_vectors)
                rotated = basis.mT @ expected[name][kind] @ basis
                assert (rotated - rotated.diagonal().diag()).norm() < 1e-6 * rotated.norm()  # losses are float32
                moments = (basis.mT @ expected[name]["exact"] @ basis).diagonal()
                torch.testing.assert_close(ekfac.entries.flatten(), moments, rtol=1e-5, atol=1e-8)
        if representation.startswith("kfac"):
            kind = representation.partition("_")[2]
            assert not sums.rows and not sums.second and sums.approximations == (kind,)
            torch.testing.assert_close(sums.fisher(name), expected[name][kind], rtol=1e-6, atol=1e-8)
            torch.testing.assert_close(sums.diagonal_of(name), expected[name][kind].diagonal(), rtol=1e-6, atol=1e-8)
            vectors = torch.eye(6, dtype=torch.float64)[:, :4] + 0.3
            quadratic = (vectors * (expected[name][kind] @ vectors)).sum(0)
            torch.testing.assert_close(sums.quadratic([name], vectors), quadratic, rtol=1e-6, atol=1e-8)


def test_tokens_without_a_part_in_the_loss_change_nothing():
    """Text after the last token that bears loss, and padding: F, and both approximations, are what they were."""
    model, (bases, origin, patch), sequences = make_model(), make_problem(), make_sequences([5, 9, 3])
    longer = [TokenSequence(s.index, [*s.input_ids, 1, 4, 2], [*s.is_target, False, False, False]) for s in sequences]
    results = []
    for data, size in ((sequences, 1), (sequences, 3), (longer, 2)):
        settings = CollectionSettings(batch_size=size)
        results.append(collect(model, bases, origin, patch, settings, data, sampled=False, points=POINTS))
    for name, form in itertools.product(NAMES, ("exact", "kfac_expand", "kfac_reduce", "ekfac_expand", "ekfac_reduce")):
        first, *others = (sums.operator(name, form).to_dense() for sums in results)
        for other in others:
            torch.testing.assert_close(other, first, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("representation", ["exact", "gram", "diagonal", "kfac_expand", "kfac_reduce"])
def test_a_weight_is_so_many_copies(representation):
    """ω = 2, 1 and 3 against the sequences repeated so often; labels given, so that copies are equal."""
    model, (bases, origin, patch) = make_model(), make_problem()
    sequences, weights = make_sequences([5, 9, 3]), (2, 1, 3)
    weighted = [replace(s, weight=float(w)) for s, w in zip(sequences, weights, strict=True)]
    copies = [s for s, w in zip(sequences, weights, strict=True) for _ in range(w)]
    given = {"sampled": False, "points": POINTS, "representation": representation}
    settings = CollectionSettings(batch_size=2)
    once, often = (collect(model, bases, origin, patch, settings, data, **given) for data in (weighted, copies))
    assert once.count == often.count == 6 and once.effective == pytest.approx(36 / 14)
    for name in NAMES:
        torch.testing.assert_close(once.mean_gradient(name), often.mean_gradient(name), rtol=1e-8, atol=1e-10)
        forms = {once.own, *(f"{kind}_{a}" for kind in ("kfac", "ekfac") for a in once.approximations)}
        for form in forms if representation in ("exact", "gram") else {once.own}:
            pair = (sums.operator(name, form).to_dense() for sums in (once, often))
            torch.testing.assert_close(*pair, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("form", ["exact", "gram", "diagonal", "kfac_expand", "ekfac_reduce"])
def test_a_mixture_in_every_form_is_the_weighted_sum_of_its_tasks(form):
    model, (bases, origin, patch), sequences = make_model(), make_problem(), make_sequences([5, 9, 3, 6, 4])
    weights = {"first": 0.5, "last": 2.0}
    tasks = {
        task: collect(model, bases, origin, patch, CollectionSettings(), data, sampled=False, points=POINTS)
        for task, data in (("first", sequences[:2]), ("last", sequences[2:]))
    }
    mixture = mix(tasks, weights)
    for name in NAMES:
        expected = sum(w * tasks[task].operator(name, form).to_dense() for task, w in weights.items())
        torch.testing.assert_close(mixture.operator(name, form).to_dense(), expected)


def token_sums(representation: str, cores, inputs, scale: float = 1.0, matrices: bool = False) -> FisherSums:
    """Sums over sequences of tokens that are given: (S, T, r_out) and (S, T, r_in) for each module."""
    sums = FisherSums(representation, capacity=None if matrices else len(next(iter(cores.values()))))
    for name, grads in cores.items():
        count, length, _ = grads.shape
        ends = torch.arange(0, count * length + 1, length)
        x = inputs[name].flatten(0, 1)
        sums.take(name, TokenGradients(x, scale * grads.flatten(0, 1), ends, None, x.device), 1.0)
    sums.add_count(1.0, torch.ones(count))
    return sums


def test_kfac_is_exact_where_the_fisher_is_a_kronecker_product():
    """Sequences of one token, every δ̂ met with every x̂: F = E[δδᵀ] ⊗ E[xxᵀ], by all of its forms."""
    g = torch.Generator().manual_seed(0)
    delta, x = torch.randn(7, 3, dtype=torch.float64, generator=g), torch.randn(9, 4, dtype=torch.float64, generator=g)
    pairs = {"a": delta.repeat_interleave(9, 0)[:, None]}, {"a": x.repeat(7, 1)[:, None]}
    sums = token_sums("exact", *pairs)
    expected = torch.kron(delta.mT @ delta / 7, x.mT @ x / 9)
    for form in ("exact", "kfac_expand", "kfac_reduce", "ekfac_expand", "ekfac_reduce"):
        torch.testing.assert_close(sums.operator("a", form).to_dense(), expected, rtol=1e-10, atol=1e-12)


SHAPES = {"a": (3, 4), "b": (2, 3), "c": (4, 3)}  # 30 coordinates together
FORMS = ("exact", "gram", "diagonal", "kfac", "ekfac")


def make_statistics(harm: str = "gram", benign: str = "gram", sequences: int = 16, matrices: bool = False):
    """Statistics of random tokens, three a sequence, kept as the two collections that are named, and a patch.

    Exact ones keep matrices, or rows where there are fewer of them.
    """
    g = torch.Generator().manual_seed(2)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    def sums(scale: float, representation: str) -> FisherSums:
        spread = {r: torch.logspace(0, -1, r, dtype=torch.float64) for r in (2, 3, 4)}
        grads = {n: draw(sequences, 3, r) * spread[r] for n, (r, _) in SHAPES.items()}
        inputs = {n: (draw(sequences, 3, c) + 0.5) * spread[c] for n, (_, c) in SHAPES.items()}
        return token_sums(representation, grads, inputs, scale, matrices)

    parts = [sums(2.0, harm), sums(1.0, benign), sums(2.0, harm), sums(1.0, benign), sums(3.0, "gradient")]
    return Statistics(*parts), {n: draw(*shape) for n, shape in SHAPES.items()}


def dense_fisher(sums: FisherSums, form: str) -> np.ndarray:
    """F over all modules, from the rows or, for K-FAC, the factors, by their definitions in numpy: (30, 30)."""
    rows = {name: sums.rows[name].numpy() for name in SHAPES}
    if form == "gram":
        joint = np.concatenate(list(rows.values()), 1)
        return joint.T @ joint / sums.count
    blocks = []
    for name, j in rows.items():
        exact = j.T @ j / sums.count
        if form in ("kfac", "ekfac"):
            factors = sums.factors["expand"][name]
            total = float(factors.counts[0])
            grad, inputs = (_symmetric(t.numpy()) for t in (factors.grad_factor, factors.input_factor))
            kfac = np.kron(grad, inputs) / (sums.count * total)
            basis = np.kron(np.linalg.eigh(grad)[1], np.linalg.eigh(inputs)[1])
            exact = kfac if form == "kfac" else basis @ np.diag(np.diag(basis.T @ exact @ basis)) @ basis.T
        blocks.append(np.diag(np.diag(exact)) if form == "diagonal" else exact)
    return scipy.linalg.block_diag(*blocks)


def dense_fisher_held(sums: FisherSums) -> np.ndarray:
    """What held-out sums say of directions: all that is kept."""
    if sums.representation == "gram":
        return dense_fisher(sums, "gram")
    blocks = (sums.fisher(name) for name in SHAPES)
    return scipy.linalg.block_diag(*((f.diag() if f.ndim == 1 else f).numpy() for f in blocks))


def _symmetric(packed: np.ndarray) -> np.ndarray:
    d = int((np.sqrt(8 * len(packed) + 1) - 1) / 2)
    full = np.zeros((d, d))
    full[np.tril_indices(d)] = packed
    return full + np.tril(full, -1).T


def check_against_scipy(statistics, patch, settings, a, b) -> None:
    """λ, VᵀBV = I, gain, cost, and the filter (A + μB)⁻¹Aτ of `soft`, over all modules together."""
    directions, gamma = find_directions(statistics, patch, settings)
    b = b + gamma * np.eye(30)
    phi = np.concatenate([patch[name].numpy().ravel() for name in SHAPES])
    values = np.sort(np.concatenate([d.values.numpy() for d in directions.values()]))[::-1]
    expected = scipy.linalg.eigh(a, b, eigvals_only=True)[::-1]
    np.testing.assert_allclose(values, expected[: len(values)], rtol=1e-7, atol=1e-9 * expected[0])
    assert np.all(np.abs(expected[len(values) :]) < 1e-9 * expected[0])
    gain, cost = (sum(getattr(d, f"{x}_full") for d in directions.values()) for x in ("gain", "cost"))
    np.testing.assert_allclose([gain, cost], [phi @ a @ phi, phi @ b @ phi], rtol=1e-8)
    cores = filtered_cores(directions, kept_coefficients(directions, settings, 1.0), patch)
    kept = np.concatenate([cores[name].numpy().ravel() for name in SHAPES])
    np.testing.assert_allclose(kept, np.linalg.solve(a + settings.mu * b, a @ phi), rtol=1e-6, atol=1e-8)
    held = dense_fisher_held(statistics.harm_held), dense_fisher_held(statistics.benign_held) + gamma * np.eye(30)
    for d in directions.values():
        at = [list(SHAPES).index(name) for name in d.names]
        places = np.concatenate([np.arange(12 * (i > 0) + 6 * (i > 1), (12, 18, 30)[i]) for i in at])
        v = np.zeros((30, d.vectors.shape[1]))
        v[places] = d.vectors.numpy()
        quotient = (v * (held[0] @ v)).sum(0) / (v * (held[1] @ v)).sum(0)
        np.testing.assert_allclose(d.ray_held, quotient, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("shrinkage", [0.0, 0.3])
@pytest.mark.parametrize(("harm", "benign"), list(itertools.product(FORMS, FORMS)))
def test_every_mix_of_forms_is_its_dense_pencil(harm, benign, shrinkage):
    kept = tuple("gram" if form == "gram" else "exact" for form in (harm, benign))
    full, patch = make_statistics()  # the same numbers, whatever is kept
    settings = SstParameters(
        fisher={"harm": harm, "benign": benign}, shrinkage=shrinkage, damping=0.2, select="soft", mu=0.7
    )
    a, b = dense_fisher(full.harm, harm), dense_fisher(full.benign, benign)
    a, b = ((1 - shrinkage) * f + shrinkage * np.diag(np.diag(f)) for f in (a, b))
    check_against_scipy(make_statistics(*kept)[0], patch, settings, a, b)


@pytest.mark.parametrize(("harm", "benign"), [("kfac", "kfac"), ("exact", "kfac"), ("kfac", "exact")])
def test_kfac_alone_needs_no_more_than_its_factors(harm, benign):
    kept = tuple("kfac_expand" if form == "kfac" else form for form in (harm, benign))
    full, patch = make_statistics()
    settings = SstParameters(fisher={"harm": harm, "benign": benign}, damping=0.2, select="soft", mu=0.7)
    assert settings.collected == ("core", kept)
    a, b = dense_fisher(full.harm, harm), dense_fisher(full.benign, benign)
    check_against_scipy(make_statistics(*kept)[0], patch, settings, a, b)


@pytest.mark.parametrize(
    ("harm", "benign", "shrinkage"),
    [
        ("gram", "gram", {"harm": 0.3}),
        ("gram", "gram", 0.3),
        ("exact", "gram", 0.0),
        ("gram", "kfac", {"harm": 0.3}),
        ("kfac", "gram", {"benign": 0.3}),
    ],
)
def test_large_pencils_are_iterated_for_their_leading_pairs(monkeypatch, harm, benign, shrinkage):
    monkeypatch.setattr(pencils, "ALL_PAIRS_UP_TO", 10)
    statistics, patch = make_statistics()
    settings = SstParameters(fisher={"harm": harm, "benign": benign}, shrinkage=shrinkage, damping=0.2, k=5)
    directions, gamma = find_directions(statistics, patch, settings)
    d = directions[ALL_MODULES]
    s = [shrinkage.get(kind, 0.0) if isinstance(shrinkage, dict) else shrinkage for kind in ("harm", "benign")]
    a, b = (dense_fisher(sums, form) for sums, form in ((statistics.harm, harm), (statistics.benign, benign)))
    a, b = ((1 - x) * f + x * np.diag(np.diag(f)) for x, f in zip(s, (a, b), strict=True))
    b = b + gamma * np.eye(30)
    assert len(d.values) == 16 and "CONVERGED" in d.status  # as many as sequences
    np.testing.assert_allclose(d.values, scipy.linalg.eigh(a, b, eigvals_only=True)[::-1][:16], rtol=1e-9)
    v = d.vectors.numpy()
    np.testing.assert_allclose(v.T @ b @ v, np.eye(16), atol=1e-9)


def test_weights_of_examples_leave_as_many_leading_pairs(monkeypatch):
    """ω of 0.01 for every example changes neither F nor how many sequences there are."""
    monkeypatch.setattr(pencils, "ALL_PAIRS_UP_TO", 10)
    statistics, patch = make_statistics()
    harm = statistics.harm
    harm.rows = {name: 0.1 * rows for name, rows in harm.rows.items()}
    harm.take_counts((0.01 * harm.count, harm.sequences, 1e-4 * harm.squares))
    several = replace(statistics, harm=Mixture({"one": harm, "two": harm}, {"one": 0.5, "two": 0.5}))
    settings = SstParameters(fisher="gram", shrinkage=0.3, damping=0.2)
    for given, count in ((statistics, 16), (several, 30)):
        assert len(find_directions(given, patch, settings)[0][ALL_MODULES].values) == count


def test_a_large_module_with_few_rows_has_the_directions_of_its_rows(monkeypatch):
    monkeypatch.setattr(pencils, "ALL_PAIRS_UP_TO", 10)
    statistics, patch = make_statistics("exact", "kfac_expand", sequences=5)
    full, _ = make_statistics(sequences=5)
    settings = SstParameters(fisher={"harm": "exact", "benign": "kfac"}, damping=0.2, select="soft", mu=0.7)
    directions, _ = find_directions(statistics, patch, settings)
    assert {name: len(d.values) for name, d in directions.items()} == {"a": 5, "b": 6, "c": 5}
    a, b = dense_fisher(full.harm, "exact"), dense_fisher(full.benign, "kfac")
    check_against_scipy(statistics, patch, settings, a, b)


@pytest.mark.parametrize(
    "parameters", [{"k": 3}, {"k": 0.4}, {"k": 4, "scope": "global"}, {"select": "soft", "mu": 0.7}], ids=str
)
@pytest.mark.parametrize("benign", ["exact", "kfac"])
def test_few_rows_and_their_matrix_give_one_merge(benign, parameters):
    """5 sequences in 12 coordinates: λ > 0 from 5 × 5 problems, or all 12 pairs of a matrix; k counts the same n."""
    settings = SstParameters(fisher={"harm": "exact", "benign": benign}, damping=0.2, **parameters)
    merged, counts = [], []
    for matrices in (False, True):
        statistics, patch = make_statistics("exact", "exact", sequences=5, matrices=matrices)
        directions, _ = find_directions(statistics, patch, settings)
        merged.append(filtered_cores(directions, kept_coefficients(directions, settings, 1.0), patch))
        counts.append({name: len(d.values) for name, d in directions.items()})
    assert counts == [{"a": 5, "b": 6, "c": 5}, {"a": 12, "b": 6, "c": 12}]
    for name in patch:
        torch.testing.assert_close(*(cores[name] for cores in merged), rtol=1e-7, atol=1e-9)


def test_large_diagonal_pencils_keep_their_closed_form(monkeypatch):
    monkeypatch.setattr(pencils, "ALL_PAIRS_UP_TO", 5)
    full, patch = make_statistics()
    settings = SstParameters(fisher="diagonal", damping=0.2, select="soft", mu=0.7)
    directions, _ = find_directions(make_statistics("diagonal", "diagonal")[0], patch, settings)
    assert [len(d.values) for d in directions.values()] == [12, 6, 12]
    a, b = dense_fisher(full.harm, "diagonal"), dense_fisher(full.benign, "diagonal")
    check_against_scipy(make_statistics("diagonal", "diagonal")[0], patch, settings, a, b)


def test_a_pencil_that_did_not_converge_is_named_with_the_remedy():
    directions, _ = find_directions(*make_statistics(), SstParameters())
    assert _not_converged(directions) == []
    directions["b"] = replace(directions["b"], status="MAX_ITERATIONS")
    (warning,) = _not_converged(directions)
    assert re.match(
        r"1 of 3 pencils did not converge, first that of module 'b' \(MAX_ITERATIONS\): .*raise it", warning
    )


def test_the_kronecker_oracle_holds_on_both_sides():
    """Without damping to speak of, λ of two K-FAC Fishers are products of those of the factors' pencils."""
    statistics, patch = make_statistics("kfac_expand", "kfac_expand", sequences=40)
    directions, _ = find_directions(statistics, patch, SstParameters(fisher="kfac", damping=1e-13))
    for name, d in directions.items():
        harm, benign = (sums.operator(name, "kfac_expand") for sums in (statistics.harm, statistics.benign))
        pairs = ((getattr(x, side).to_dense() for x in (harm, benign)) for side in ("left", "right"))
        left, right = (scipy.linalg.eigh(*pair, eigvals_only=True) for pair in pairs)
        np.testing.assert_allclose(d.values, np.sort(np.outer(left, right).ravel())[::-1], rtol=1e-7)
