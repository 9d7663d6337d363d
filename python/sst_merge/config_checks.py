"""Checks of a whole configuration: what no key shows by itself."""

from __future__ import annotations

import os
from typing import Any

import torch

from .method_settings import AVERAGES
from .settings import KINDS, ROLES, Config, SstParameters


def check_config(config: Config) -> None:
    """What no key shows by itself."""
    _check_k(config.parameters)
    _check_points(config.parameters)
    _check_rho(config.parameters)
    _check_shrinkage(config.parameters)
    _check_steps(config)
    if config.tune and (config.merge_method != "sst" or config.calibration is None):
        raise ValueError("tune: only merge_method sst is tuned, and on held-out sequences of `calibration`")
    if config.merge_method == "regmean" and config.calibration is None:
        raise ValueError("merge_method regmean needs `calibration` with the files `harm` and `benign`")
    if len(set(config.alphas)) < len(config.alphas):
        raise ValueError(f"alpha: every strength may be given once, got {list(config.alphas)}")
    if config.merge_method in AVERAGES and max(config.alphas) > 1:
        raise ValueError(f"alpha: {config.merge_method} needs alpha in [0, 1], got {max(config.alphas)}")
    _check_device(config.device)
    _ = config.memory_bytes
    _check_device_map(config.device_map)
    roles = [os.path.realpath(getattr(config, role).model) for role in ROLES]
    if roles[0] == roles[1]:
        raise ValueError(f"models: utility and safety must be two models, got {config.utility.model!r} for both")


def _check_k(parameters: Any) -> None:
    """K is a count of at least one, or a share."""
    k = getattr(parameters, "k", 1)
    if not (k >= 1 if isinstance(k, int) else 0 < k <= 1):
        raise ValueError(
            f"k: expected an integer >= 1 (a count) or a number in (0, 1] with a point (a share), got {k!r}"
        )


def _check_rho(parameters: Any) -> None:
    """Rules that work to a budget have one."""
    if getattr(parameters, "select", None) in ("budget", "signed") and parameters.rho is None:
        raise ValueError(
            f"rho: select: {parameters.select} needs rho, what the merge may cost in nats per sequence (½φᵀBφ); the "
            "report of another selection says what the whole patch costs"
        )


def _check_shrinkage(parameters: Any) -> None:
    """The formula for s needs the spread of the sequences."""
    for kind in KINDS if isinstance(parameters, SstParameters) else ():
        form = parameters.form(kind)
        if form.shrinkage == "ledoit_wolf" and form.representation not in ("exact", "gram"):
            raise ValueError(
                f"shrinkage: ledoit_wolf is for fisher: exact or gram, and that of {kind} is "
                f"{form.representation.partition('_')[0]}, whose spread is not known; give a number in [0, 1]"
            )


def _check_steps(config: Config) -> None:
    """Several steps go neither with tuning nor with `signed`."""
    if getattr(config.parameters, "steps", 1) == 1:
        return
    if config.tune:
        raise ValueError("tune: every candidate of several steps needs Fishers of its own; tune with steps: 1")
    if config.parameters.select == "signed":
        raise ValueError("steps: select: signed takes no part of the patch, so that none remains; use steps: 1")


def _check_points(parameters: Any) -> None:
    """Points of a path are distinct, and not all of weight zero."""
    points = getattr(parameters, "points", ())
    if len(set(points)) < len(points):
        raise ValueError(f"points: every point may be given once, got {list(points)}")
    if points and parameters.point_weights == "linear" and set(points) == {1.0}:
        raise ValueError("points: with linear weights, 1 - t, a point below 1 is needed, got [1.0]")


def _check_device(device: str) -> None:
    """The device exists here."""
    try:
        kind = torch.device(device).type
        available = kind == "cpu" or (kind == "cuda" and torch.cuda.is_available())
    except RuntimeError:
        raise ValueError(f"device: {device!r} is no torch device; use cpu, cuda or cuda:N") from None
    if not available:
        raise ValueError(
            f"device: {device!r} is not available or not supported here; use cpu, or cuda with a GPU and its torch"
        )


def _check_device_map(device_map: Any) -> None:
    """A map names modules and devices that exist here."""
    for module, device in device_map.items() if isinstance(device_map, dict) else ():
        if not isinstance(module, str) or isinstance(device, bool) or not isinstance(device, (str, int)):
            raise ValueError(f"device_map: expected {{module: device}}, got {module!r}: {device!r}")
        if device != "disk":
            _check_device(f"cuda:{device}" if isinstance(device, int) else device)
