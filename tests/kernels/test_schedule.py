"""How a group of products is cut into units of work, walked whole on the host: the CUDA kernels use the same header."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict

import pytest

from sst_kernels import _C

GROUPS = [
    [(1, 1, 1, 16)],
    [(1, 16, 65536, 16)],
    [(3, 70, 5000, 32)],
    [(1, 130, 1000, 128), (2, 16, 30000, 16), (1, 300, 0, 128), (300, 3, 2, 16), (2, 0, 9, 16), (0, 9, 9, 16)],
    [(1, 64, 257, 64), (1, 64, 256, 64), (1, 64, 255, 64)],
]


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(("target", "least"), [(1, 256), (64, 256), (512, 128), (7, 1)])
def test_every_token_of_every_tile_is_in_one_unit(group: list[tuple[int, ...]], target: int, least: int) -> None:
    units, workspace = _C.group_units(group, target, least)
    ranges = defaultdict(list)
    for product, member, row, col, begin, end, _, splits in units:
        ranges[product, member, row, col].append((begin, end))
        assert len(range(begin, end)) >= least or splits == 1 or end == group[product][2]
    expected = {
        (product, member, row, col)
        for product, (members, d, _, tile) in enumerate(group)
        for member in range(members)
        for row in range(-(-d // tile))
        for col in range(row + 1)
    }
    assert set(ranges) == expected
    for (product, *_), parts in ranges.items():
        parts.sort()
        assert parts[0][0] == 0 and parts[-1][1] == group[product][2]
        assert all(before[1] == after[0] < after[1] for before, after in itertools.pairwise(parts))
    places = Counter((place, place + group[product][3] ** 2) for product, *_, place, splits in units if splits > 1)
    regions = sorted(places)
    assert max(places.values(), default=1) == 1
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(regions))
    assert max((end for _, end in regions), default=0) == workspace


@pytest.mark.parametrize(("group", "units"), [([(1, 16, 65536, 16)], 64), ([(1, 4096, 4096, 256)], 136)])
def test_the_tokens_are_cut_only_where_tiles_are_few(group: list[tuple[int, ...]], units: int) -> None:
    assert len(_C.group_units(group, 64, 1024)[0]) == units


def test_the_workspace_is_bounded() -> None:
    group = [(1, d, tokens, 256) for d in (32, 256, 2048) for tokens in (100, 70_000)]
    units, workspace = _C.group_units(group, 64, 1024)
    assert len(units) <= 64 + sum(len(_C.group_units([product], 1, 10**9)[0]) for product in group)
    assert workspace <= len(units) * 256**2


def test_tiles_of_one_split_follow_each_other() -> None:
    units, _ = _C.group_units([(1, 40, 1000, 16)], 64, 100)
    assert [unit[4] for unit in units] == sorted(unit[4] for unit in units)
