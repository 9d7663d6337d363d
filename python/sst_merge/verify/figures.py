"""Pictures of theory.md, drawn from the numbers of theory.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from ..picture import BLUE, GREY, INK, ORANGE, Picture, numbers, picture
from .counterexample import COST, GAIN

KL, REFUSAL = "KL from the utility model (nats)", "change of log p(refusal) (nats)"
_CLEAR = 1e-9  # share of the tolerance used that is drawn as nothing


def figures(theory: Mapping[str, Any]) -> list[Picture]:
    """The pictures whose numbers are there.

    Args:
        theory: The content of theory.json.

    Returns:
        Pictures.
    """
    drawn = [_margins(theory["claims"]), _two_dimensions()]
    if rows := theory["sweep"]:
        drawn += [_kl(rows), _refusal(rows)]
    return drawn + [_order(i, one) for i, one in enumerate(theory["order"])]


def _margins(claims: Sequence[Mapping[str, Any]]) -> Picture:
    """How much of its tolerance each statement used, at worst."""
    rows = [row for row in claims if row["passed"] is not None]
    used = [max(-row["worst_margin"] / row["tolerance"], _CLEAR) if row["tolerance"] else _CLEAR for row in rows]
    caption = (
        "The share of its tolerance that each statement used where it came nearest to failing; right of the line it is "
        "broken, at the left edge nothing was used."
    )

    def draw(axes: Axes) -> None:
        at = np.arange(len(rows))[::-1]
        broken = np.array([row["passed"] is False for row in rows], dtype=bool)
        shown = np.where(broken, np.maximum(np.nan_to_num(used, nan=10.0), 1.5), used)
        for mask, color in ((broken, ORANGE), (~broken, BLUE)):
            axes.plot(shown[mask], at[mask], "o", ms=3, c=color)
        axes.axvline(1, ls=":", lw=0.8, c=INK)
        axes.set(xscale="log", xlabel="share of the tolerance used", yticks=at)
        axes.set_yticklabels([f"{row['claim']}  {row['statement']}" for row in rows], fontsize=5)

    return picture("margins", "Margins", caption, draw, size=(6.5, 0.6 + 0.13 * len(rows)))


def _two_dimensions() -> Picture:
    """The feasible ellipse of the counterexample and both directions on it."""
    caption = (
        "Steps of cost 1 lie on the ellipse, and the colour is their gain. The first direction of A alone ends where "
        "the gain is 0.5; that of the pencil where it is 10, the most on the ellipse."
    )

    def draw(axes: Axes) -> None:
        t = np.linspace(0, 2 * np.pi, 400)
        x, y = np.cos(t) / COST[0] ** 0.5, np.sin(t) / COST[1] ** 0.5
        dots = axes.scatter(x, y, c=GAIN[0] * x**2 + GAIN[1] * y**2, s=4, cmap="viridis")
        for end, color, label in (
            ((COST[0] ** -0.5, 0), ORANGE, "A alone: Ray 0.5"),
            ((0, COST[1] ** -0.5), BLUE, "pencil: Ray 10"),
        ):
            axes.annotate("", end, (0, 0), arrowprops={"arrowstyle": "->", "color": color, "lw": 1.5})
            axes.plot([], [], c=color, label=label)
        axes.set(xlabel="v₁", ylabel="v₂", xlim=(-3.5, 3.5), aspect="equal")
        axes.figure.colorbar(dots, ax=axes, label="gain vᵀAv", shrink=0.7)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1))

    return picture("two_dimensions", "One Fisher is not enough", caption, draw, size=(3.5, 3.2))


def _kl(rows: Sequence[Mapping[str, Any]]) -> Picture:
    """KL over α, predicted twice and measured."""
    caption = (
        "KL of held-out benign text over the strength α of the kept patch, measured (bars ± one standard error) and "
        "as ½α²φᵀFφ, F the stored held-out Fisher (undamped) or that at θ_ft across all modules."
    )

    def draw(axes: Axes) -> None:
        alpha = numbers(rows, "alpha")
        axes.plot(alpha, numbers(rows, "predicted_kl"), "s--", c=ORANGE, lw=1, ms=3, label="predicted, stored F")
        axes.plot(alpha, numbers(rows, "predicted_kl_at_ft"), "^:", c=GREY, lw=1, ms=3, label="predicted, F at θ_ft")
        _measured(axes, rows, "kl")
        axes.set(xscale="log", yscale="log", xlabel="strength α", ylabel=KL)

    return picture("quadratic_kl", "Predicted against measured KL", caption, draw)


def _refusal(rows: Sequence[Mapping[str, Any]]) -> Picture:
    """Change of log p(refusal) over α, predicted twice and measured."""
    caption = (
        "Change of log p(refusal) on held-out harmful prompts over α, measured (bars ± one standard error) and to "
        "first order, ḡ from the sequences that found the directions or from the held-out ones."
    )

    def draw(axes: Axes) -> None:
        alpha = numbers(rows, "alpha")
        axes.plot(alpha, numbers(rows, "predicted_refusal"), "s--", c=ORANGE, lw=1, ms=3, label="αḡᵀφ, found")
        axes.plot(alpha, numbers(rows, "predicted_refusal_held"), "^:", c=GREY, lw=1, ms=3, label="αḡᵀφ, held out")
        _measured(axes, rows, "refusal")
        positive = np.concatenate([numbers(rows, f"{kind}_refusal") for kind in ("predicted", "measured")])
        axes.set(xscale="log", xlabel="strength α", ylabel=REFUSAL)
        if (positive[np.isfinite(positive)] > 0).all():
            axes.set_yscale("log")

    return picture("quadratic_refusal", "Predicted against measured refusal", caption, draw)


def _measured(axes: Axes, rows: Sequence[Mapping[str, Any]], kind: str) -> None:
    """The measured curve with its standard errors."""
    errors = np.nan_to_num(numbers(rows, f"measured_{kind}_se"))
    values = numbers(rows, f"measured_{kind}")
    axes.errorbar(numbers(rows, "alpha"), values, errors, fmt="o-", c=BLUE, lw=1, ms=3, label="measured")


def _order(i: int, one: Mapping[str, Any]) -> Picture:
    """Measured gain over Ray, all steps of one predicted cost."""
    caption = (
        f"Steps that cost as much as {one['alpha']:.3g} times the kept patch: predicted gain per cost against the gain "
        "measured on held-out refusals."
    )

    def draw(axes: Axes) -> None:
        kinds = {"kept": BLUE, "whole patch": ORANGE, "dropped": INK}
        for row in one["rows"]:
            color = kinds.get(row["step"], GREY)
            label = row["step"] if row["step"] in kinds else None
            axes.plot(row["ray"], row["measured_gain"], "o", ms=3, c=color, label=label)
        axes.plot([], [], "o", ms=3, c=GREY, label="random")
        axes.set(xscale="log", xlabel="Ray(φ), predicted gain per cost", ylabel="E(Δ log p(refusal))²")
        if all(row["measured_gain"] > 0 for row in one["rows"]):
            axes.set_yscale("log")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)

    return picture(f"order_{i}", "Order of directions", caption, draw)
