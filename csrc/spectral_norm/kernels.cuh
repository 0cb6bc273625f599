// Spectral normalization on a GPU: reference.py has the maths.
//
// A list of weights of any shapes is one call. cut.cuh cuts every weight into tiles; how depends on its shape alone.
// The work is a sequence of phases (step_of() in member.cuh), and within a phase tiles do not see each other:
//
//   products   a tile comes into shared memory, batch by batch, and leaves t = W x of its lines and its part of z = W't
//   gather     the parts of z are added in the order of the tiles, and squared
//   finish     u = t/|t|, v = z/|z|, sigma = |z|/|t|, out = s W
//
// That is one iteration where the vector that comes first belongs to whole lines in memory (u first and dim 0, v first
// and a transposed convolution): one read of W, three phases. The other order, and lines that are longer than a batch,
// need two products with a gather between them. Neither t nor z is scaled to unit length before it is used: a tile
// takes the power of two of its t out of its part of z, the gather puts the parts on one power, and lengths.cuh has the
// rest. So W of any scale stays in range, and nothing waits for a norm.
//
// Three ways through the phases, by the same functions on the same tiles, with the same bits:
//
//   alone      a weight of one tile: one block does all phases, W stays in shared memory
//   resident   one cooperative launch for the list; blocks keep their tiles in shared memory, the grid waits between
//   phases phases     a launch for each phase, over all members: three for the usual list, whatever its length
//
// `resident` is taken where the list fits on chip, `phases` otherwise; weights of one tile ride in either. Members are
// the argument of the kernel, by value (grouped.cuh). With b the bytes of W (and of out, g, dW), memory moves 2 b where
// W stays on chip, else 3 b; backward 3 b (g on chip) or 4 b. Partial sums of z are b / (rows of a tile), at most b /
// 4, written and read in the cache.
#pragma once
#include "backward.cuh"
