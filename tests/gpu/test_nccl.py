"""The distributed path on GPUs over NCCL; the cases are in nccl_worker.py and random_cases.py."""

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
SHARES = range(32)  # of random_cases.py
AT_ONCE = min(len(SHARES), os.cpu_count() or 1)
SURROUNDINGS = os.environ | {
    "PYTHONPATH": f"{HERE.parent}:{HERE.parent.parent}",
    "OMP_NUM_THREADS": str((os.cpu_count() or 1) // AT_ONCE),
}


def torchrun(*what: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(min(4, torch.cuda.device_count()))]
    run([*command, str(HERE / "nccl_worker.py"), *what])


def run(command: list[str]) -> None:
    done = subprocess.run(command, env=SURROUNDINGS, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.gpu(count=1)
def test_simulated_ranks_equal_reference() -> None:
    """In many processes, as compiling takes longest."""
    script = str(HERE / "random_cases.py")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(run, [[sys.executable, script, str(i)] for i in SHARES]))


@pytest.mark.gpu(count=2)
@pytest.mark.parametrize("what", ["grid", "random", "stress"])
def test_sharded_attention_equals_reference(what: str) -> None:
    torchrun(what)


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
