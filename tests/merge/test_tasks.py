"""Several tasks of a kind: sums with weights against dense ones, splits, folders, what is measured and reported."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from reference import log_probabilities
from safetensors.torch import load_file

from sst_merge import load_config, merge
from sst_merge.cli import main
from sst_merge.counts import few_effective
from sst_merge.data import TokenSequence, read_examples
from sst_merge.fisher import Collector
from sst_merge.mixture import mix
from sst_merge.problem import Problem
from sst_merge.store import FisherFolder
from sst_merge.sums import FisherSums
from sst_merge.tasks import split_held_out

SIZES = {"a": 6, "b": 4}


def make_rows(count: int, seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(count, n, dtype=torch.float64, generator=g) for name, n in SIZES.items()}


def make_sums(rows: dict[str, torch.Tensor], representation: str) -> FisherSums:
    count = len(rows["a"])
    sums = FisherSums(representation, count)
    for name, g in rows.items():
        sums.add(name, g, 1.0)
    sums.add_count(1.0, torch.ones(count))
    return sums


@pytest.mark.parametrize("representation", ["exact", "gram", "diagonal"])
def test_a_mixture_is_the_weighted_sum_of_dense_fishers(representation):
    """Task "few" keeps rows under "exact", "many" matrices; the weights do not sum to 1."""
    rows = {"few": make_rows(3, 0), "many": make_rows(20, 1)}
    weights = {"few": 0.7, "many": 2.0}
    mixture = mix({task: make_sums(r, representation) for task, r in rows.items()}, weights)
    assert mixture.count == 23
    v = torch.randn(10, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for name in SIZES:
        dense = sum(w * rows[t][name].mT @ rows[t][name] / len(rows[t][name]) for t, w in weights.items())
        metric = torch.diag(dense.diagonal()) if representation == "diagonal" else dense
        mean = sum(w * rows[t][name].mean(0) for t, w in weights.items())
        fisher = mixture.fisher(name)
        torch.testing.assert_close(torch.diag(fisher) if fisher.ndim == 1 else fisher, metric)
        torch.testing.assert_close(mixture.diagonal_of(name), dense.diagonal())
        torch.testing.assert_close(mixture.mean_gradient(name), mean)
        u = v[: SIZES[name]]
        torch.testing.assert_close(mixture.quadratic([name], u), (u * (metric @ u)).sum(0))
    if representation == "gram":
        both = {t: torch.cat([r[name] for name in SIZES], 1) for t, r in rows.items()}
        dense = sum(w * both[t].mT @ both[t] / len(both[t]) for t, w in weights.items())
        joint = mixture.joint_rows(list(SIZES))
        torch.testing.assert_close(joint.mT @ joint / mixture.count, dense)
        torch.testing.assert_close(mixture.quadratic(list(SIZES), v), (v * (dense @ v)).sum(0))


def test_weights_in_proportion_to_sequences_are_the_concatenation():
    rows = make_rows(9, 3)
    parts = {"first": {n: r[:7] for n, r in rows.items()}, "last": {n: r[7:] for n, r in rows.items()}}
    mixture = mix({t: make_sums(r, "exact") for t, r in parts.items()}, {"first": 7 / 9, "last": 2 / 9})
    whole = make_sums(rows, "exact")
    for name in SIZES:
        torch.testing.assert_close(mixture.fisher(name), whole.fisher(name))
    assert mix({"only": whole}, {"only": 1.0}) is whole
    torch.testing.assert_close(mix({"only": whole}, {"only": 3.0}).fisher("a"), 3 * whole.fisher("a"))


def test_shares_of_few_rows_add_up_beside_matrices():
    """Of 5 sequences "a" (n = 6) keeps rows and "b" (n = 4) a matrix, though two of three shares have only 3 rows."""
    rows, total = make_rows(5, 0), None
    for start, end in pairwise([0, 1, 3, 5]):
        share = FisherSums("exact", 5)
        for name, g in rows.items():
            share.add(name, g[start:end], 1.0)
        share.add_count(1.0, torch.ones(end - start))
        loaded = FisherSums("exact")
        loaded.load(share.tensors(), share.counts)
        total = loaded if total is None else total.merged(loaded)
    assert {name: total.row_count(name) for name in rows} == {"a": 5, "b": 0}
    for name, g in rows.items():
        torch.testing.assert_close(total.fisher(name), g.mT @ g / 5)


def test_a_sequence_of_two_tasks_is_on_one_side_in_both():
    def sequences(tokens: range) -> list[TokenSequence]:
        return [TokenSequence(i, [7, t], [False, True]) for i, t in enumerate(tokens)]

    for seed in range(10):
        first = split_held_out(sequences(range(12)), 0.25, seed)
        decided = {tuple(s.input_ids): side == 1 for side in (0, 1) for s in first[side]}
        second = split_held_out(sequences(range(6, 18)), 0.25, seed, decided)
        assert len(second[0]) + len(second[1]) == 12 and second[0] and second[1]
        for mine, theirs in ((0, 1), (1, 0)):
            assert not {tuple(s.input_ids) for s in first[mine]} & {tuple(s.input_ids) for s in second[theirs]}
    with pytest.raises(ValueError, match="give each sequence to one task"):
        split_held_out(sequences(range(3)), 0.25, 0, {(7, t): False for t in range(3)})


@pytest.fixture
def tasks(setup, tmp_path) -> Callable[..., dict]:
    """A configuration with the benign data in two tasks, "sums" and "prose"."""
    lines = setup.benign.read_text().splitlines()
    for name, part in (("sums", lines[:6]), ("prose", lines[6:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(part))

    def config(weights: tuple[float, float] = (1.0, 1.0), names: str = "sums prose", **parameters: object) -> dict:
        tree = setup.config("sst", **parameters)
        every = dict(zip(("sums", "prose"), weights, strict=True))
        tree["calibration"] |= {
            "batch_size": 1,
            "benign": [{"data": str(tmp_path / f"{n}.jsonl"), "weight": every[n]} for n in names.split()],
        }
        return tree

    return config


def run(config: dict, out: Path, *arguments: str, command: str = "merge") -> int:
    path = out.parent / f"{out.name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return main([command, str(path), "--out", str(out), *arguments])


def tensors(folder: Path) -> dict[str, bytes]:
    """Every safetensors file below a folder."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*.safetensors")}


def test_other_weights_collect_nothing_and_mix_what_is_kept(tasks, tmp_path, monkeypatch):
    assert run(tasks(k=0.5), tmp_path / "out") == 0
    folder = tmp_path / "out.fisher"
    kept = {f.stem for f in folder.glob("*.safetensors")}
    assert kept == {"patch", "harm", "harm_held", "origin"} | {
        f"benign{held}-{task}" for held in ("", "_held") for task in ("sums", "prose")
    }
    monkeypatch.setattr("sst_merge.fisher.Collector.collect", lambda *a: pytest.fail("collected again"))
    result = merge(tasks((0.25, 3.0), k=0.5), fisher_dir=folder)
    opened = FisherFolder(folder, json.loads((folder / "fisher.json").read_text()))
    sums, prose = (opened.load(f"benign-{task}").sums for task in ("sums", "prose"))
    for name in result.plan.curvature.patch:
        expected = 0.25 * sums.fisher(name) + 3.0 * prose.fisher(name)
        torch.testing.assert_close(result.plan.curvature.statistics.benign.fisher(name), expected)
    counts = result.report["sequences"]["benign"]
    assert (counts["found"], counts["held_out"]) == (4 + 3, 2 + 1)
    assert counts["tasks"]["prose"] == {"found": 3, "held_out": 1, "weight": 3.0}
    # one of its tasks alone, by its name; and in weights of one kind a common factor leaves what top_k keeps
    alone = merge(tasks(names="prose", k=0.5), fisher_dir=folder).plan.curvature.statistics.benign
    assert torch.equal(alone.fisher(name), prose.fisher(name))
    pair = [merge(tasks(w, k=0.5), fisher_dir=folder).updates(1.0) for w in ((1.0, 2.0), (2.0, 4.0))]
    for name in pair[0]:
        torch.testing.assert_close(pair[0][name].dense(), pair[1][name].dense(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "parameters",
    [
        {"fisher": "gram"},
        {"fisher": "diagonal"},
        {"fisher": {"harm": "exact", "benign": "kfac"}, "shrinkage": 0.2},
        {"fisher": "ekfac", "shrinkage": 0.2, "shrinkage_target": "kronecker"},
        {"shrinkage": "ledoit_wolf"},
        {"fisher": {"harm": "gram", "benign": "kfac"}},
    ],
    ids=str,
)
def test_every_form_merges_tasks(tasks, parameters):
    report = merge(tasks((0.5, 2.0), **parameters, k=0.5)).report
    assert report["held_out"][0]["measured_kl"] > 0 and report["gamma"] > 0


def test_one_task_of_weight_1_is_the_file_alone(setup):
    config = setup.config("sst", k=0.5)
    plain = merge(config)
    config["calibration"]["benign"] = [{"data": config["calibration"]["benign"], "name": "only"}]
    listed = merge(config)
    for name, update in plain.updates(1.0).items():
        assert torch.equal(update.dense(), listed.updates(1.0)[name].dense())


def test_what_is_measured_is_the_weighted_sum_over_tasks_and_examples(tasks, setup, tmp_path):
    """By hand from merged weights: Σ_t w_t Σ ω KL / Σ ω, its standard error, and the rows of the tasks."""
    for path in (tmp_path / "sums.jsonl", tmp_path / "prose.jsonl", setup.harm):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("\n".join(json.dumps({**r, "weight": 0.5 + i % 3}) for i, r in enumerate(records)))
    config = {**tasks((0.5, 2.0), k=0.5), "dtype": "float64"}
    config["calibration"] |= {"held_out": 0.5, "batch_size": 4}
    result = merge(config)
    utility = {name: low.dense() for name, low in result.problem.utility.updates.items()}
    merged = {name: low.dense() for name, low in result.updates(1.0).items()}
    kl, variance = 0.0, 0.0
    rows = {row["task"]: row for row in result.report["held_out_tasks"]}
    assert list(rows) == ["sums", "prose"]
    for task in result.problem.tasks["benign"]:
        values = []
        for s in task.held:
            p, q = (log_probabilities(setup.base, d, s) for d in (utility, merged))
            values.append(float((p.exp() * (p - q)).sum()))
        omega, n = np.array([s.weight for s in task.held]), len(values)
        assert len(set(omega)) > 1
        mean = np.average(values, weights=omega)
        error = math.sqrt(n / (n - 1) * np.sum(omega**2 * (values - mean) ** 2)) / omega.sum()
        row = rows[task.name]
        assert row["measured_kl"] == pytest.approx(mean, rel=1e-4) and row["measured_refusal"] is None
        assert row["measured_kl_se"] == pytest.approx(error, rel=1e-4)
        kl, variance = kl + task.weight * mean, variance + (task.weight * error) ** 2
    (row,) = result.report["held_out"]
    assert row["measured_kl"] == pytest.approx(kl, rel=1e-4)
    assert row["measured_kl_se"] == pytest.approx(math.sqrt(variance), rel=1e-4)
    labels = {
        s.index: [i for i, wanted in zip(s.input_ids, s.is_target, strict=True) if wanted]
        for s in result.problem.calibration["harm"][1]
    }
    change = []
    for s in result.problem.calibration["harm"][1]:
        at = torch.tensor(labels[s.index])[:, None]
        p, q = (log_probabilities(setup.base, d, s).gather(1, at).sum() for d in (utility, merged))
        change.append((s.weight, float(q - p)))
    omega, change = (np.array(column) for column in zip(*change, strict=True))
    assert row["measured_refusal"] == pytest.approx(np.average(change, weights=omega), rel=1e-4)


def weigh(path: Path, weights: list[float]) -> None:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("\n".join(json.dumps({**r, "weight": w}) for r, w in zip(records, weights, strict=True)))


def test_effective_sample_sizes_are_reported_and_few_are_warned_of(setup, tmp_path, capsys):
    weigh(setup.harm, [50.0, *[1.0] * 9, 0.0, 0.0])
    config = setup.config("sst")
    config["calibration"]["held_out"] = 0.2
    assert run(config, tmp_path / "out") == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    counts, warning = report["sequences"]["harm"], "harm: weights leave"
    assert counts["found"] + counts["held_out"] == 10
    sides = {"found": 50.0 + (counts["found"] - 1), "held_out": 50.0 + (counts["held_out"] - 1)}
    heavy = next(side for side, total in sides.items() if counts[f"effective_{side}"] != counts[side])
    squares = 50.0**2 + counts[heavy] - 1
    assert counts[f"effective_{heavy}"] == pytest.approx(sides[heavy] ** 2 / squares)
    assert any(warning in w for w in report["warnings"]) and warning in capsys.readouterr().err
    assert any("2 examples of weight 0 left out" in remark for remark in report["remarks"])
    assert "effective" not in json.dumps(report["sequences"]["benign"])
    assert "(effective " in (tmp_path / "out/report.md").read_text()
    # weights belong to what the statistics are of
    weigh(setup.harm, [49.0, *[1.0] * 9, 0.0, 0.0])
    assert run(config, tmp_path / "again", "--fisher", str(tmp_path / "out.fisher")) == 2
    assert "1 of the" in capsys.readouterr().err


def test_a_few_effective_sequences_of_a_task_are_named():
    row = {"found": 10, "held_out": 4, "effective_found": 4.9, "effective_held_out": 2.0}
    (warning,) = few_effective({"harm": {"found": 9, "held_out": 3}, "benign": {"found": 10, "tasks": {"prose": row}}})
    assert warning.startswith("calibration.benign-prose: weights leave 10 sequences (found) the worth of 4.9")


@pytest.mark.parametrize("weight", [-1, "2", True, None, float("nan"), float("inf")])
def test_impossible_weights_of_examples_are_named(tmp_path, weight):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"text": "w1 w2", "weight": w}) for w in (1.5, weight)))
    with pytest.raises(ValueError, match=r'line 2: "weight" must be a finite number >= 0'):
        read_examples(path)
    path.write_text('{"text": "w1"}\n{"prompt": "w1", "weight": 2}')
    assert [(e.weight, e.is_answered) for e in read_examples(path)] == [(1.0, True), (2.0, False)]


def test_weights_that_are_all_zero_are_refused(setup, tmp_path, capsys):
    weigh(setup.harm, [0.0] * 12)
    assert run(setup.config("sst"), tmp_path / "out") == 2
    assert f'calibration.harm ({setup.harm}): all 12 examples have "weight" 0' in capsys.readouterr().err


def test_generated_answers_keep_the_weights_of_their_prompts(setup, tmp_path):
    prompts = [{"prompt": f"w{i} w{i + 1}", "weight": 1 + i % 2} for i in range(12)]
    setup.harm.write_text("\n".join(map(json.dumps, prompts)))
    config = setup.config("sst", k=0.5)
    config["calibration"] |= {"max_new_tokens": 5, "harm": [{"data": str(setup.harm), "name": "asked"}]}
    assert run(config, tmp_path / "first") == 0
    again = Problem(load_config({**config, "fisher_dir": str(tmp_path / "first.fisher")}))
    (task,) = again.tasks["harm"]
    assert {s.index: s.weight for s in (*task.found, *task.held)} == {i: 1.0 + i % 2 for i in range(12)}
    written = (tmp_path / "first/generated-harm-asked.jsonl").read_text().splitlines()
    assert [json.loads(line).get("weight", 1) for line in written] == [1 + i % 2 for i in range(12)]


def interrupt_after(monkeypatch, batches: int) -> None:
    """Ctrl-C in the forward pass after so many."""
    done, whole = iter(range(batches)), Collector._one_batch

    def one_batch(*arguments) -> None:
        if next(done, None) is None:
            raise KeyboardInterrupt
        whole(*arguments)

    monkeypatch.setattr(Collector, "_one_batch", one_batch)


@pytest.mark.parametrize("batches", [3, 9, 21, 35])
def test_interrupted_collections_of_tasks_end_bit_identical(tasks, tmp_path, monkeypatch, batches):
    weigh(tmp_path / "sums.jsonl", [1.0, 2.0, 1.0, 0.5, 1.0, 1.0])
    assert run(tasks(k=0.5), tmp_path / "unbroken", command="fisher") == 0
    monkeypatch.setattr("sst_merge.store.SAVE_EVERY", 1)
    monkeypatch.setattr("sst_merge.store.SAVE_SHARE", 0)
    with monkeypatch.context() as patched:
        interrupt_after(patched, batches)
        assert run(tasks(k=0.5), tmp_path / "broken", command="fisher") == 130
    count, whole = [], Collector._one_batch
    monkeypatch.setattr(Collector, "_one_batch", lambda *a: (count.append(1), whole(*a)))
    assert run(tasks(k=0.5), tmp_path / "broken", command="fisher") == 0
    assert len(count) == 2 * (12 + 10) + 9 - batches
    assert tensors(tmp_path / "broken") == tensors(tmp_path / "unbroken")


def test_tasks_collected_apart_add_up(tasks, setup, tmp_path, capsys, monkeypatch):
    """The same refusals beside two tasks: as if both had been collected at once, to the bit."""
    for name in ("sums", "prose"):
        assert run(tasks(names=name), tmp_path / name, command="fisher") == 0
    parts = [str(tmp_path / name) for name in ("sums", "prose")]
    assert main(["fisher", "--add", *parts, "--out", str(tmp_path / "both")]) == 0
    assert run(tasks(), tmp_path / "at-once", command="fisher") == 0
    both, at_once = (
        {f.name: load_file(f) for f in (tmp_path / name).glob("*.safetensors")} for name in ("both", "at-once")
    )
    assert both.keys() == at_once.keys()
    assert all(torch.equal(t, both[file][key]) for file, group in at_once.items() for key, t in group.items())
    monkeypatch.setattr("sst_merge.fisher.Collector.collect", lambda *a: pytest.fail("collected again"))
    assert run(tasks((1.0, 0.5)), tmp_path / "out", "--fisher", str(tmp_path / "both")) == 0
    # without data every task counts alike
    without = {k: v for k, v in tasks().items() if k != "calibration"}
    assert run(without, tmp_path / "out2", "--fisher", str(tmp_path / "both")) == 0
    report = json.loads((tmp_path / "out2/report.json").read_text())
    assert {t: row["weight"] for t, row in report["sequences"]["benign"]["tasks"].items()} == {"sums": 1, "prose": 1}
    capsys.readouterr()
    # a task that is not there, and the same sequences twice
    config = tasks(names="prose")
    assert run(config, tmp_path / "out3", "--fisher", str(tmp_path / "sums")) == 2
    assert "sequences of benign-prose are not in it" in capsys.readouterr().err
    assert main(["fisher", "--add", parts[0], str(tmp_path / "both"), "--out", str(tmp_path / "twice")]) == 2
    assert "sequences of benign are in two" in capsys.readouterr().err


def test_more_of_the_same_task_joins_its_sums_and_names_must_not_be_mixed(tasks, setup, tmp_path, capsys):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder, name, kept in zip(folders, ("sums", "prose"), (slice(6), slice(6, 12)), strict=True):
        config = tasks(names=name)
        config["calibration"]["benign"][0]["name"] = "text"
        part = tmp_path / f"harm-{name}.jsonl"
        part.write_text("\n".join(setup.harm.read_text().splitlines()[kept]))
        config["calibration"]["harm"] = str(part)
        assert run(config, folder, command="fisher") == 0
    assert main(["fisher", "--add", *map(str, folders), "--out", str(tmp_path / "sum")]) == 0
    loaded = [
        FisherFolder(f, json.loads((f / "fisher.json").read_text())).load("benign-text").sums
        for f in (*folders, tmp_path / "sum")
    ]
    assert loaded[2].sequences == loaded[0].sequences + loaded[1].sequences == 4 + 3
    for name in loaded[0].first:
        expected = (4 * loaded[0].fisher(name) + 3 * loaded[1].fisher(name)) / 7
        torch.testing.assert_close(loaded[2].fisher(name), expected, rtol=1e-5, atol=1e-8)
    plain = setup.config("sst")
    assert run(plain, tmp_path / "plain", command="fisher") == 0
    capsys.readouterr()
    assert main(["fisher", "--add", str(folders[0]), str(tmp_path / "plain"), "--out", str(tmp_path / "no")]) == 2
    assert "tasks of benign have names in" in (error := capsys.readouterr().err) and "as a list of tasks" in error


FAULTS = {
    "no entry": ([], "calibration.harm: the list is empty"),
    "the same file twice": ([{"data": "h"}, {"data": "./h", "name": "x"}], "two entries have the file"),
    "the same name twice": ([{"data": "p/h.jsonl"}, {"data": "q/H.jsonl"}], "two entries have the name 'h'"),
    "a weight of zero": ([{"data": "h", "weight": 0}], r"weight: expected a number in \(0.0, 10.0\], got 0"),
    "a name that is no file's": ([{"data": "h", "name": "a/b"}], "name: expected letters"),
    "an unknown key": ([{"data": "h", "wieght": 2}], "did you mean 'weight'"),
    "no data": ([{"weight": 2}], "an entry of calibration.harm lacks `data`"),
    "a number": (3, "harm: expected str | list of"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_lists_of_tasks_are_named(fault):
    given, message = FAULTS[fault]
    models = [{"model": "u", "role": "utility"}, {"model": "s", "role": "safety"}]
    with pytest.raises(ValueError, match=message):
        load_config({"base_model": "b", "models": models, "calibration": {"harm": given, "benign": "b"}})


def test_lists_of_tasks_read_back(tmp_path):
    models = [{"model": "u", "role": "utility"}, {"model": "s", "role": "safety"}]
    (tmp_path / "two sums.jsonl").touch()
    harm = [{"data": "two sums.jsonl", "weight": 2}, {"data": "other.jsonl", "name": "x"}]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"base_model": "b", "models": models, "calibration": {"harm": harm, "benign": "b"}}))
    config = load_config(path)
    first, second = config.calibration.tasks("harm")
    assert (first.data, first.weight, first.name) == (str(tmp_path / "two sums.jsonl"), 2.0, "two_sums")
    assert (second.data, second.weight, second.name) == ("other.jsonl", 1.0, "x")
    (tmp_path / "resolved.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "resolved.yaml") == config
