"""What the pictures of a report draw, compared with the numbers they are drawn from."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import numpy as np
import pytest
from matplotlib import colormaps
from report_sample import ALPHAS, HOSTILE, contrast, of_hex, sample

from sst_merge import heat_map, plots
from sst_merge.outline import outline
from sst_merge.page import render_page
from sst_merge.picture import BLUE, GREY, ORANGE


def test_heat_map_places_modules_by_layer_and_kind():
    report = sample()
    pictures = {picture.name: picture for picture in heat_map.of_modules(report)}
    assert list(pictures) == ["kept_energy", "kept_share", "held_ratio", "kept_damping"]
    axes = pictures["held_ratio"].figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["2", "10"]
    kinds = [label.get_text() for label in axes.get_xticklabels()]
    assert kinds == ["self_attn.q_proj", HOSTILE, "mlp.up_proj"] and axes.yaxis_inverted()
    cells = {(layer, kinds.index(kind)): text for layer, kind, text in _cell_texts(axes, ["2", "10"], kinds)}
    for row in report["modules"][:6]:
        _, _, layer, kind = row["module"].split(".", 3)
        expected = None if row["ray_held"] is None else f"{row['ray_held'] / row['ray']:.2g}"
        assert cells.get((layer, kinds.index(kind))) == expected


def _cell_texts(axes: Any, layers: list[str], kinds: list[str]) -> Iterator[tuple[str, str, str]]:
    for text in axes.texts:
        x, y = text.get_position()
        yield layers[int(y)], kinds[int(x)], text.get_text()


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("model.layers.12.mlp.up_proj", (12, "model.layers.*.mlp.up_proj")),
        ("transformer.h.3.mlp.experts.7.w1", (3, "transformer.h.*.mlp.experts.7.w1")),
        ("conv2d.0", (0, "conv2d.*")),
        ("lm_head", (None, "lm_head")),
        ("model.w2.proj", (None, "model.w2.proj")),
    ],
)
def test_layer_of_a_module(module, expected):
    assert heat_map.layer_and_kind(module) == expected


def test_frontier_is_measured_refusal_over_measured_kl():
    report = sample()
    report["held_out"].reverse()
    frontier, kl, _ = plots.of_held_out(report)
    x, y = frontier.figure.axes[0].lines[0].get_data()
    np.testing.assert_allclose(x, [1.1 * a * a for a in ALPHAS])
    np.testing.assert_allclose(y, [9 * a - a * a for a in ALPHAS])
    predicted, measured = kl.figure.axes[0].lines[:2]
    np.testing.assert_allclose(predicted.get_data(), [ALPHAS, [a * a for a in ALPHAS]])
    np.testing.assert_allclose(measured.get_data(), [ALPHAS, [1.1 * a * a for a in ALPHAS]])
    (bars,) = kl.figure.axes[0].collections
    np.testing.assert_allclose(
        [segment[:, 1] for segment in bars.get_segments()], [[1.1 * a * a - 0.1, 1.1 * a * a + 0.1] for a in ALPHAS]
    )


@pytest.mark.parametrize(("finite", "names"), [(1, []), (2, ["frontier", "held_out_kl", "held_out_refusal"])])
def test_one_strength_has_no_chart_over_strengths(finite, names):
    report = sample()
    for row in report["held_out"][finite:]:
        row["measured_kl"] = row["measured_refusal"] = None
    assert [picture.name for picture in plots.of_held_out(report)] == names
    report["held_out"] = report["held_out"][:finite]
    assert [picture.name for picture in plots.of_held_out(report)] == names


def test_legend_and_labels_lie_on_no_error_bar():
    report = sample()
    for row in report["held_out"]:
        row |= {"measured_kl_se": 2.0, "measured_refusal_se": 3.0}
    for drawn in plots.of_held_out(report):
        drawn.png()
        axes = drawn.figure.axes[0]
        texts = [x.get_window_extent() for x in (*axes.texts, axes.get_legend()) if x is not None]
        bars = [segment for bar in axes.collections for segment in bar.get_segments()]
        assert len(texts) == (len(ALPHAS) if drawn.name == "frontier" else 1)
        for box, segment in itertools.product(texts, bars):
            (x0, y0), (x1, y1) = axes.transData.transform(segment)
            assert x1 < box.x0 or box.x1 < x0 or y1 < box.y0 or box.y1 < y0, (drawn.name, box, segment)


def test_candidates_that_no_other_beats_in_both():
    report = sample()
    rows = report["tuning"]["candidates"]
    least = min(rows, key=lambda row: row["refusal_loss"])
    rows.append({**least, "kl": least["kl"] + 1, "objective": 99.0})  # beaten in one, equal in the other
    lines = {line.get_label(): line for line in plots.of_tuning(report)[1].figure.axes[0].lines}
    best = [
        (r["kl"], r["refusal_loss"])
        for r in rows
        if not any(
            o["kl"] <= r["kl"] and o["refusal_loss"] <= r["refusal_loss"] and (o["kl"], o["refusal_loss"])
            != (r["kl"], r["refusal_loss"])
            for o in rows
        )
    ]  # fmt: skip
    np.testing.assert_array_equal(lines["not beaten in both"].get_data(), np.transpose(sorted(best)))
    (chosen,) = (r for r in rows if r["objective"] == min(o["objective"] for o in rows))
    np.testing.assert_array_equal(lines["chosen"].get_data(), [[chosen["kl"]], [chosen["refusal_loss"]]])


def test_tuning_has_a_line_a_setting_and_names_the_chosen_one():
    report = sample()
    axes = plots.of_tuning(report)[0].figure.axes[0]
    *curves, star = axes.lines
    assert len(curves) == 4 and all(list(line.get_xdata()) == list(ALPHAS) for line in curves)
    chosen = report["tuning"]["chosen"]
    assert curves[-1].get_label() == f"damping {chosen['damping']}\nk {chosen['k']}"
    assert [star.get_xdata(), star.get_ydata()] == [
        [chosen["alpha"]],
        [min(row["objective"] for row in report["tuning"]["candidates"])],
    ]


@pytest.mark.parametrize(("worst", "scale"), [(65.0, "log"), (4.0, "linear")])
def test_least_objective_stands_clear_of_the_frame_whatever_the_worst_is(worst, scale):
    report = sample()
    for row, objective in zip(report["tuning"]["candidates"], np.linspace(3.4, worst, 12), strict=True):
        row["objective"] = float(objective)
    drawn = plots.of_tuning(report)[0]
    drawn.png()
    axes = drawn.figure.axes[0]
    assert axes.get_yscale() == scale
    least, second, top = axes.transAxes.inverted().transform(
        axes.transData.transform([[1, 3.4], [1, 3 * 3.4 if scale == "log" else 3.6], [1, worst]])
    )[:, 1]
    assert least > 0 and second - least > 0.2 and top < 1


def test_points_of_a_scatter_are_thinned_no_further_than_a_cell():
    draw = np.random.default_rng(1)
    points = draw.normal(size=(5000, 2))
    drawn = np.log10(plots._distinct(points)).T
    assert len(drawn) < len(points)
    cell = np.ptp(points, axis=0) / plots.GRID
    for point in points:
        assert (np.abs(drawn - point) <= cell * (0.5 + 1e-9)).all(1).any()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [0.0, None, math.nan, math.inf])
def test_numbers_that_cannot_be_drawn(value):
    report = sample()
    for spectrum in report["directions"].values():
        for key in spectrum:
            spectrum[key] = [value] * 8
    for row in (*report["held_out"], *report["tuning"]["candidates"], *report["modules"]):
        for key in row.keys() - {"alpha", "module", "shape", "n", "kept"}:
            row[key] = value
    pictures = [picture for section in outline(report) for picture in section.pictures]
    for picture in pictures:
        assert picture.png().startswith(b"\x89PNG") and picture.svg().startswith("<svg")
    assert len(pictures) == (12 if value == 0 else 1)  # 0 / 0 has no heat map; the kept share always has
    render_page("t", outline(report))


def test_lines_stand_out_on_both_papers():
    papers = re.findall(r"--paper: (#\w{6})", (files("sst_merge") / "assets/page.css").read_text())
    assert len(papers) == 2
    for paper in papers:
        for color in (BLUE, ORANGE, GREY):
            assert contrast(of_hex(color), of_hex(paper)) >= 3


def test_numbers_are_legible_on_every_cell():
    for color in colormaps["viridis"](np.linspace(0, 1, 256)):
        assert contrast(of_hex(heat_map.ink_on(color)), tuple(255 * color)) >= 4.5
