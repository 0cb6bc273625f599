// Projections on a GPU: reference.py has the maths. theta has its bits, z_bar is to tolerance, but the same every time.
//
// Members are the argument of a kernel, by value (grouped.cuh); what P is made of is drawn where it is used. With D
// elements of b bytes, d columns, b' = 4 bytes (8 for float64), memory moves:
//
//   one_hot, sparse, block_hadamard    2 D b forward, D b backward. A block of threads has a tile: tile_forward.cuh,
//                                      tile_backward.cuh. zx: (d + strata tile) b' for each of the batch, in the cache
//   rademacher, gaussian               the same; D d entries are drawn: entries.cuh
//   fastfood                           scratch of D b' (padded): a write and a read for each pass over 2^12 and then 8
//                                      more stages, besides 2 D b + D b' to add; backward 8 bytes more for each row and
//                                      column of the sums: fastfood.cuh
//   dense                              E once, 2 D b or D b: dense.cuh
//
// Sums over tiles leave at most 384 blocks (1024 for small tiles) of 72 KiB (float64: 96 KiB) in memory, written and
// read once: at most 27 MiB; of one number a column where the accumulators of all columns fit on chip: sums.cuh.
#pragma once
#include "dense.cuh"
#include "fastfood.cuh"
#include "tile_backward.cuh"
