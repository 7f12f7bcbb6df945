"""Binary codes: signs of relaxed codes, and their packed form.

Bit ``i`` of byte ``j`` is ``code[8 * j + i] > 0``, little-endian within the byte: the layout of FAISS.
"""

import torch
from torch import Tensor

MAX_BITS = 1024


def check_bits(bits: int) -> int:
    """Return ``bits`` if it is a usable code length.

    Raises:
        ValueError: it is not a positive multiple of 8, or above ``MAX_BITS``.
    """
    if not isinstance(bits, int) or isinstance(bits, bool) or bits <= 0 or bits % 8 or bits > MAX_BITS:
        raise ValueError(f"bits is {bits}, but must be a multiple of 8 from 8 to {MAX_BITS}: take 16, 32, 64 or 128")
    return bits


def signs(codes: Tensor) -> Tensor:
    """Signs of relaxed codes as {-1, +1}, with zero going to -1 as in the packed form.

    Args:
        codes: (..., bits), real.

    Returns:
        Same shape and dtype.
    """
    return torch.where(codes > 0, 1.0, -1.0).to(codes.dtype)


def pack(codes: Tensor) -> Tensor:
    """Pack the signs of codes into bytes.

    Args:
        codes: (batch, bits), real; bits a multiple of 8.

    Returns:
        (batch, bits / 8) uint8.
    """
    bytes_ = (codes > 0).to(torch.uint8).unflatten(1, (-1, 8))
    place = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=codes.device)
    return (bytes_ * place).sum(2, dtype=torch.uint8)


def unpack(packed: Tensor) -> Tensor:
    """Undo ``pack``.

    Args:
        packed: (batch, bits / 8) uint8.

    Returns:
        (batch, bits) float32 in {-1, +1}.
    """
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(2) >> shifts) & 1
    return bits.flatten(1).float() * 2 - 1
