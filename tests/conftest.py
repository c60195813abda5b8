"""What every test gets: a seed, few threads, the shared rank pool, a skip for want of GPUs."""

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

from rank_pool import RankPool

# A shared machine may be slow at any moment, and a failure must be seen again on the next run.
hypothesis.settings.register_profile("ringflex", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ringflex")


def pytest_configure() -> None:
    beside_others = "PYTEST_XDIST_WORKER" in os.environ  # whose threads would wait for each other
    torch.set_num_threads(1 if beside_others else min(2, os.cpu_count() or 1))


SLOWEST = ("test_kernels.py", "test_train.py")  # files, of which none may be the last to begin


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in SLOWEST)


def pytest_runtest_setup(item: pytest.Item) -> None:
    marker = item.get_closest_marker("gpu")
    if marker is None:
        return
    wanted = marker.kwargs.get("count", marker.args[0] if marker.args else 1)
    found = torch.cuda.device_count()
    if found < wanted:
        pytest.skip(f"needs {wanted} CUDA GPU(s), found {found}")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """The eight gloo ranks that all multi-rank tests share; they start at the first use."""
    with RankPool(8) as ranks:
        yield ranks
