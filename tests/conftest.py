from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device the ops run on; SST_REQUIRE_CUDA=1 turns a missing GPU into a failure."""
    if request.param == "cuda" and not torch.cuda.is_available():
        if os.environ.get("SST_REQUIRE_CUDA") == "1":
            pytest.fail("SST_REQUIRE_CUDA=1, but torch.cuda.is_available() is False")
        pytest.skip("no CUDA device")
    return torch.device(request.param)
