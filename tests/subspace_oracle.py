"""The projections once more, entry by entry, in Python integers and float64: what the room's torch is compared to.

Written from the specification alone and in its other forms: a tail block by the highest bit of (r xor j), an entry of a
Hadamard matrix by the parity of (i and j), column counts by counting.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterator, Mapping
from functools import cache

import torch
from torch import Tensor

M32 = 0xFFFFFFFF
SETUP, PERM, SIGN_IN, SIGN_OUT, ENTRY, FF_B, FF_G, FF_PERM = range(1, 9)
Key = tuple[int, int]


@cache
def philox(key: Key, stream: int, pos: int, column: int = 0, step: int = 0) -> tuple[int, int, int, int]:
    c0, c1, c2, c3 = pos & M32, stream << 24 | pos >> 32, column, step
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = b >> 32 ^ c1 ^ k0, b & M32, a >> 32 ^ c3 ^ k1, a & M32
        k0, k1 = k0 + 0x9E3779B9 & M32, k1 + 0xBB67AE85 & M32
    return c0, c1, c2, c3


def key_of(seed: int, kind: str, name: str) -> Key:
    h = hashlib.sha256(b"weightxform.subspace\0")
    h.update((1).to_bytes(4, "little") + seed.to_bytes(8, "little", signed=True))
    h.update(kind.encode("utf8") + b"\0" + name.encode("utf8"))
    return struct.unpack("<II", h.digest()[:8])


def sign(key: Key, stream: int, i: int, column: int = 0, step: int = 0) -> int:
    word = philox(key, stream, i >> 7, column, step)[i >> 5 & 3]
    return -1 if word >> (i & 31) & 1 else 1


def coin(key: Key, stream: int, i: int, column: int, step: int) -> int:
    return 2 * (philox(key, stream, i >> 2, column, step)[i & 3] >> 1).bit_count() - 31


def bijection(key: Key, stream: int, start: int, length: int, j: int, column: int = 0, step: int = 0) -> int:
    m = length.bit_length() - 1
    a0, a1, a2, k = philox(key, stream, start, column, step)
    x = (j + k) % length * (a0 | 1) % length
    x ^= x >> (m + 1 >> 1)
    x = x * (a1 | 1) % length
    x ^= x >> (m + 1 >> 1)
    return x * (a2 | 1) % length


def blocks(n: int, tile: int) -> Iterator[tuple[int, int, int]]:
    """(i, start of its block, length of it) for each element of a tensor."""
    for i in range(n):
        first = i - i % tile
        r, j = min(tile, n - first), i - first
        length = tile if r == tile else 1 << (r ^ j).bit_length() - 1
        yield i, first + (j & ~(length - 1)), length


def window(key: Key, start: int, g: int, width: int, tile: int, packed: bool, r: int = 0) -> int:
    if packed:
        return (g + start) % width
    w0, w1, _, _ = philox(key, SETUP, 0, r)
    turn = (w1 * width >> 32) if width > tile else 0
    return ((w0 * width >> 32) + start + start // width * turn) % width


def factors(
    kind: str, sizes: Mapping[str, int], d: int, normalize: str, sigmas: Mapping[str, float] | None, strata: int
) -> dict[str, float]:
    total = sum(sizes.values())
    if normalize == "per_tensor":
        tiled = kind in ("one_hot", "one_hot_unsigned", "sparse", "block_hadamard")
        return {name: math.sqrt((d / strata if tiled else total) / n) for name, n in sizes.items()}
    if normalize == "init":
        mean = sum(n * sigmas[name] ** 2 for name, n in sizes.items()) / total
        return {name: sigmas[name] / math.sqrt(mean) for name in sizes}
    return dict.fromkeys(sizes, 1.0)


def explicit(
    kind: str,
    sizes: Mapping[str, int],
    d: int,
    seed: int = 5,
    tile: int = 4096,
    columns: str = "auto",
    normalize: str = "global",
    sigmas: Mapping[str, float] | None = None,
    strata: int = 1,
    step: int = 0,
) -> Tensor:
    """P, [D, d] in float64; rows are the tensors in the order of the bytes of their names."""
    sizes = {name: sizes[name] for name in sorted(sizes, key=lambda name: name.encode("utf8"))}
    total = sum(sizes.values())
    a = factors(kind, sizes, d, normalize, sigmas, strata)
    if kind.startswith("fastfood"):
        scale = torch.tensor([a[name] for name, n in sizes.items() for _ in range(n)], dtype=torch.float64)
        return scale[:, None] * _fastfood(kind, total, d, seed, step)
    packed = columns == "packed" or (columns == "auto" and max(sizes.values()) < d)
    rows: list[list[float]] = []
    counts = [0.0] * d
    for name, n in sizes.items():
        key = key_of(seed, kind.removesuffix("_unsigned"), name)
        g = len(rows)
        if kind in ("rademacher", "gaussian"):
            draw = sign if kind == "rademacher" else coin
            scale = a[name] / math.sqrt(total * (1 if kind == "rademacher" else 31))
            rows += [[scale * draw(key, ENTRY, i, j, step) for j in range(d)] for i in range(n)]
            continue
        for i, start, length in blocks(n, tile):
            row = [0.0] * d
            for r in range(strata):
                low, high = r * d // strata, (r + 1) * d // strata
                width = high - low
                o = window(key, start, g, width, tile, packed, r)
                if kind == "block_hadamard":
                    out = sign(key, SIGN_OUT, i, 0, step) * a[name] / math.sqrt(length)
                    for v in range(length):
                        parity = -1 if ((i - start) & v).bit_count() & 1 else 1
                        row[(o + v) % d] += out * parity * sign(key, SIGN_IN, start + v, 0, step)
                    column = (o + i - start) % d  # each of the block once, here the one of this element
                else:
                    column = low + (o + bijection(key, PERM, start, length, i - start, r, step)) % width
                    row[column] += a[name] * (1 if kind == "one_hot_unsigned" else sign(key, SIGN_IN, i, r, step))
                counts[column] += a[name] ** 2
            rows.append(row)
    P = torch.tensor(rows, dtype=torch.float64)
    if kind in ("rademacher", "gaussian") or normalize == "per_tensor":
        return P
    return P / torch.tensor(counts, dtype=torch.float64).sqrt()


def hadamard(n: int) -> Tensor:
    """H_n, from its quarters."""
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    half = hadamard(n // 2)
    return torch.cat([torch.cat([half, half], 1), torch.cat([half, -half], 1)])


def _fastfood(kind: str, total: int, d: int, seed: int, step: int) -> Tensor:
    """H G Pi H B of the published, uncollapsed form: pad to the full length, two full transforms."""
    _, form, diagonal = kind.split("_")
    key = key_of(seed, "fastfood", "")
    small = 1 << (d - 1).bit_length()
    length = 1 << (total - 1).bit_length() if form == "global" else small
    parts = []
    for s in range(0, total, length):
        every = range(length)
        where = [bijection(key, FF_PERM, s, length, k, 0, step) for k in every]
        if diagonal == "sign":
            g = [sign(key, FF_G, s + k, 0, step) for k in every]
        else:
            g = [coin(key, FF_G, s + k, 1, step) for k in every]
        b = [sign(key, FF_B, s + k, 0, step) for k in range(d)]
        H = hadamard(length)
        parts.append(H * torch.tensor(g) @ H[where][:, :d] * torch.tensor(b))
    variance = 1 if diagonal == "sign" else 31
    return torch.cat(parts)[:total] / math.sqrt(total * length * variance)
