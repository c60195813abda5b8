"""Which commit a benchmark measures."""

import subprocess
from pathlib import Path


def current_commit(checkout: Path = Path(__file__).parent) -> str:
    """The hash of HEAD, here or of another checkout; "unknown" outside a clone."""
    command = ["git", "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=checkout)
    return found.stdout.strip() or "unknown"
