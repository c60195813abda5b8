"""The distributed path on GPUs over NCCL; the cases are in nccl_worker.py."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.gpu(count=2)
def test_sharded_attention_equals_reference_on_gpus() -> None:
    worker = Path(__file__).with_name("nccl_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(min(4, torch.cuda.device_count())), str(worker)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
