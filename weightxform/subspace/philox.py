"""Philox4x32-10 in torch, and what is drawn from it. Words are int64 tensors that hold 32 bits.

The counter of a draw is (pos mod 2^32, stream << 24 | pos >> 32, column, step): no two draws of a key share one, and a
draw depends neither on the device nor on how the work is divided.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

# What is drawn; "column" is of the projection, or the stratum of a sparse one.
SETUP, PERM, SIGN_IN, SIGN_OUT, ENTRY, FF_B, FF_G, FF_PERM = range(1, 9)
MASK = 0xFFFFFFFF

Key = tuple[int, int]


_FEW = 32  # draws that plain integers make sooner than tensors do


def draw(key: Key, c0: int, c1: int, c2: int, c3: int) -> tuple[int, int, int, int]:
    """The four words of one counter."""
    k0, k1 = key
    for _ in range(10):
        p, q = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = q >> 32 ^ c1 ^ k0, q & MASK, p >> 32 ^ c3 ^ k1, p & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def _mulhilo(a: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """The high and the low word of a 32 x 32 bit product, with nothing above 2^49."""
    low, high = a * (x & 0xFFFF), a * (x >> 16)
    return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & MASK


def philox(key: Key, stream: int, pos: Tensor, column: int | Tensor = 0, step: Tensor | None = None) -> Tensor:
    """Four words for each element of ``pos`` (and of ``column``, broadcast): ``[..., 4]``."""
    pos, c2 = torch.broadcast_tensors(pos, torch.as_tensor(column, dtype=torch.int64, device=pos.device))
    c0, c1 = pos & MASK, (pos >> 32) | (stream << 24)
    if pos.numel() <= _FEW and pos.is_cpu:
        high, last = stream << 24, 0 if step is None else int(step)
        places = zip(pos.flatten().tolist(), c2.flatten().tolist(), strict=True)
        words = [draw(key, at & MASK, at >> 32 | high, column, last) for at, column in places]
        return torch.tensor(words, dtype=torch.int64).reshape(*pos.shape, 4)
    c3 = torch.zeros_like(pos) if step is None else step.to(pos.device, torch.int64).expand_as(pos)
    k0, k1 = key
    for _ in range(10):
        p_high, p_low = _mulhilo(0xD2511F53, c0)
        q_high, q_low = _mulhilo(0xCD9E8D57, c2)
        c0, c1, c2, c3 = q_high ^ c1 ^ k0, q_low, p_high ^ c3 ^ k1, p_low
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return torch.stack([c0, c1, c2, c3], -1)


def bits(key: Key, stream: int, i: Tensor, column: int = 0, step: Tensor | None = None) -> Tensor:
    """One bit (bool) for each element index: 128 of them a draw. Only neighbours share a draw: ``i`` is a range."""
    if i.numel() == 0:
        return torch.zeros_like(i, dtype=torch.bool)
    first = int(i.flatten()[0]) >> 7
    last = int(i.flatten()[-1]) >> 7
    words = philox(key, stream, torch.arange(first, last + 1, device=i.device), column, step).flatten()
    return ((words[(i >> 5) - 4 * first] >> (i & 31)) & 1).bool()


def coins(key: Key, stream: int, i: Tensor, column: int = 0, step: Tensor | None = None) -> Tensor:
    """The sum of 31 fair +-1 coins (an odd integer, variance 31) for each element index, four of them a draw."""
    if i.numel() == 0:
        return i
    first = int(i.flatten()[0]) >> 2
    last = int(i.flatten()[-1]) >> 2
    words = philox(key, stream, torch.arange(first, last + 1, device=i.device), column, step).flatten()
    return coins_of(words[i - 4 * first])


def coins_of(words: Tensor) -> Tensor:
    """The sum of the coins in the upper 31 bits of each word."""
    x = words >> 1
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return 2 * (((x * 0x01010101) & MASK) >> 24) - 31


def flip(x: Tensor, minus: Tensor) -> Tensor:
    """``x`` with its sign bit flipped where ``minus`` is set (also that of a zero)."""
    return torch.where(minus, -x, x)


def permutation(
    key: Key, stream: int, start: Tensor, length: int, column: int = 0, step: Tensor | None = None
) -> Tensor:
    """For each block of ``length`` (a power of two) elements at ``start``, a bijection of its places: [blocks, length].

    Three odd multiplications with two xorshifts between them; cheap to invert, no tables.
    """
    bits_of_length = length.bit_length() - 1
    shift, mask = (bits_of_length + 1) >> 1, length - 1
    words = philox(key, stream, start, column, step)
    a0, a1, a2 = (((words[:, k] | 1) & mask)[:, None] for k in range(3))
    x = torch.arange(length, device=start.device) + words[:, 3:]
    x = ((x & mask) * a0) & mask
    x = x ^ (x >> shift)
    x = (x * a1) & mask
    x = x ^ (x >> shift)
    return (x * a2) & mask
