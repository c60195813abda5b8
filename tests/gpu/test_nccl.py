"""The distributed path on GPUs over NCCL; the cases are in nccl_worker.py and random_cases.py."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from random_cases import SHARES

pytestmark = pytest.mark.timeout(900)  # they compile kernels, for minutes
HERE = Path(__file__).parent
CORES = os.cpu_count() or 1
RANKS = min(4, torch.cuda.device_count())
SURROUNDINGS = os.environ | {
    "PYTHONPATH": f"{HERE.parent}:{HERE.parent.parent}",
    "OMP_NUM_THREADS": str(max(1, CORES // SHARES)),
}


def torchrun(*what: str) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*command, "--nproc-per-node", str(RANKS), str(HERE / "nccl_worker.py"), *what]


def run(command: list[str]) -> None:
    done = subprocess.run(command, env=SURROUNDINGS, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr


def run_at_once(commands: Iterable[list[str]], processes: int) -> None:
    """As many as there are cores, as compiling takes longest.

    processes: of a command.
    """
    with ThreadPoolExecutor(max(1, CORES // processes)) as pool:
        list(pool.map(run, commands))


@pytest.mark.gpu(count=1)
def test_simulated_ranks_equal_reference() -> None:
    script = str(HERE / "random_cases.py")
    run_at_once(([sys.executable, script, str(i)] for i in range(SHARES)), 1)


@pytest.mark.gpu(count=2)
def test_random_cases_equal_reference() -> None:
    run_at_once((torchrun(f"random:{i}") for i in range(SHARES)), RANKS)


@pytest.mark.gpu(count=2)
@pytest.mark.parametrize("what", ["grid", "stress"])
def test_sharded_attention_equals_reference(what: str) -> None:
    run(torchrun(what))


@pytest.mark.gpu(count=2)
@pytest.mark.parametrize("how", ["die", "stall"])
def test_the_others_say_whom_they_wait_for(how: str) -> None:
    """Without torchrun, which would end all ranks itself as soon as one is dead."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(2):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, str(HERE / "nccl_worker.py"), how]
        ranks.append(
            subprocess.Popen(command, env=SURROUNDINGS | place, stderr=subprocess.PIPE, text=True)
        )
    try:
        _, said = ranks[0].communicate(timeout=200)  # PyTorch's watchdog takes its time to end it
    finally:
        for rank in ranks:
            rank.kill()
    assert ranks[0].returncode != 0
    assert "rank 0, step 1: K/V to rank 1, from rank 1" in said, said[-3000:]
