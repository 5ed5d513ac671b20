"""Fixtures of all tests."""

import os
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

if "PYTEST_XDIST_WORKER" in os.environ:  # workers whose threads are more than the cores wait for each other
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start

with warnings.catch_warnings():  # torch loads its forward-mode rules at the first use, and warns about its own code
    warnings.simplefilter("ignore", FutureWarning)
    with torch.autograd.forward_ad.dual_level():
        pass


@pytest.fixture(autouse=True)
def _judges_can_be_differentiated_forward() -> Iterator[None]:
    """The oracles take `torch.func.jvp` of the user's model: fused attention and its fast path have no forward mode."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with sdpa_kernel(SDPBackend.MATH):
        yield
    torch.backends.mha.set_fastpath_enabled(fast_path)
