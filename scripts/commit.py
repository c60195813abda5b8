"""Which commit a benchmark measures."""

import subprocess
from pathlib import Path


def current_commit() -> str:
    """The hash of HEAD; "unknown" outside a clone."""
    command = ["git", "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return found.stdout.strip() or "unknown"
