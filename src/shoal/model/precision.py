"""Which type products run in: autocast's where it is on, else the operands' own.

PyTorch's autocast knows its own operators only. Hand-written gradients, and products that it does not list, ask here.
"""

from __future__ import annotations

import torch
from torch import Tensor


def product_type(x: Tensor) -> torch.dtype:
    """The type in which a product with `x` should run. Autocast leaves float64 alone, and so does this."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype
