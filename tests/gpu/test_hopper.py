"""The Hopper kernels; the cases are in hopper_cases.py."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.timeout(900)  # they compile kernels, for minutes
HERE = Path(__file__).parent
PROCESSES = 12  # at once, as compiling takes longest
SURROUNDINGS = os.environ | {"PYTHONPATH": f"{HERE.parent}:{HERE.parent.parent}"}
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def run(*arguments: str) -> None:
    command = [sys.executable, str(HERE / "hopper_cases.py"), *arguments]
    done = subprocess.run(command, env=SURROUNDINGS, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.gpu(count=1)
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
def test_cases_equal_reference() -> None:
    with ThreadPoolExecutor(PROCESSES) as pool:
        list(pool.map(lambda i: run(str(i), str(PROCESSES)), range(PROCESSES)))


@pytest.mark.gpu(count=1)
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
def test_ten_thousand_launches() -> None:
    run("launches")
