"""numpy arrays on a device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ringflex.masks.runs import Array


def to_device(x: Array, device: torch.device) -> Tensor:
    """A copy on `device`. To a GPU it goes through pinned memory, and the program does not wait."""
    tensor = torch.from_numpy(np.ascontiguousarray(x))
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
