// How a weight is cut into tiles and batches. It depends on the shape alone, so that every path and every device adds
// the same numbers in the same order.
#pragma once
#include "../common/grouped.cuh"

#ifndef WX_SN_THREADS
#define WX_SN_THREADS 256
#endif
#ifndef WX_SN_TILE_BYTES
#define WX_SN_TILE_BYTES 32768
#endif

namespace wx::gpu::sn {

constexpr int kThreads = WX_SN_THREADS;
constexpr int kWarps = kThreads / 32;
constexpr int kTileBytes = WX_SN_TILE_BYTES;  // of a batch
constexpr int kOneBytes = 2 * kTileBytes;     // a weight up to this size is a single tile
constexpr int kMaxLines = 1024;               // of a batch
constexpr int kTiles = 256;                   // of a weight, about: every tile of rows leaves a partial sum of z
constexpr int kMinRows = 4;                   // of a tile: the partial sums are at most a quarter of W
constexpr int kGatherColumns = 32;

template <class T>
__host__ __device__ constexpr T ceil_div(T x, T y) {
  return (x + y - 1) / y;
}
__host__ __device__ constexpr int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }

// A weight is [a, m, b] in memory: the matrix W of m rows and a b columns, column c = i b + j, in `a` slabs of m lines
// of b numbers. Tile (i, p, q): slabs [i slabs, +slabs), of them rows [p rows, +rows), columns [q piece, +piece).
// Either slabs = 1, or a tile has whole slabs and is one batch. A batch is `lines` lines and fits in shared memory.
struct Cut {
  int64_t a, m, b;
  int64_t piece, rows, slabs;
  int row_tiles, pieces, groups;
  int lines;

  __host__ __device__ int64_t columns() const { return a * b; }
  __host__ __device__ int64_t numel() const { return a * m * b; }
  __host__ __device__ int tiles() const { return row_tiles * pieces * groups; }
  // A tile leaves partial sums: t [t_parts, m] and z [z_parts, columns]. One: they are complete.
  __host__ __device__ int t_parts() const { return groups * pieces; }
  __host__ __device__ int z_parts() const { return row_tiles; }
  __host__ __device__ bool one_batch() const { return rows * slabs <= lines; }
  // Both products from one read: the one that comes first is complete before the batch leaves the chip.
  __host__ __device__ bool fused(bool x_first) const {
    return x_first ? row_tiles == 1 && one_batch() : groups * pieces == 1;
  }
  __host__ __device__ int gather_blocks(int64_t n) const {
    return static_cast<int>(least(tiles(), ceil_div<int64_t>(n, kGatherColumns)));
  }
  __host__ int batch_bytes(int itemsize) const {
    return static_cast<int>(least(lines, rows * slabs) * piece * itemsize + 15) / 16 * 16;
  }

  __host__ static Cut of(int64_t a, int64_t m, int64_t b, int itemsize) {
    const int number = itemsize < 4 ? 4 : itemsize;  // a row of sums must fit in shared memory, too
    Cut c{a, m, b, b, m, 1, 1, 1, 1, 1};
    if (c.numel() * itemsize <= kOneBytes && a * m <= kMaxLines) {
      c.slabs = a;
      c.lines = static_cast<int>(a * m);
      return c;
    }
    if (a > 1 && m * b * number <= kTileBytes && m <= kMaxLines) {
      c.slabs = least(a, least(kTileBytes / (m * b * itemsize), kMaxLines / m));
      c.groups = static_cast<int>(ceil_div(a, c.slabs));
      c.lines = static_cast<int>(c.slabs * m);
      return c;
    }
    c.groups = static_cast<int>(a);
    c.piece = ceil_div(b, ceil_div<int64_t>(b * number, kTileBytes));
    if (c.piece < b) c.piece = ceil_div<int64_t>(c.piece, 64) * 64;
    c.pieces = static_cast<int>(ceil_div(b, c.piece));
    int64_t lines = least(kTileBytes / (c.piece * itemsize), kMaxLines);
    if (lines >= 8) lines = lines / 8 * 8;  // batches begin on 16 bytes
    c.lines = static_cast<int>(least(lines, m));
    const int64_t wanted = ceil_div<int64_t>(kTiles, a * c.pieces);
    c.rows = ceil_div(ceil_div(m, wanted), static_cast<int64_t>(c.lines)) * c.lines;
    if (c.rows < kMinRows) c.rows = ceil_div<int64_t>(kMinRows, c.lines) * c.lines;
    c.rows = least(c.rows, m);
    c.row_tiles = static_cast<int>(ceil_div(m, c.rows));
    return c;
  }
};

// Where a tile lies.
struct Tile {
  int64_t offset;       // of its first element in memory
  int64_t row, column;  // its first row and column of W
  int64_t rows, slabs;  // how many
  int columns;          // numbers of a line
  int t_part, z_part;   // which partial sums it leaves

  __device__ Tile(const Cut& c, int index) {
    const int q = index % c.pieces, p = index / c.pieces % c.row_tiles, i = index / c.pieces / c.row_tiles;
    row = p * c.rows;
    rows = least(c.rows, c.m - row);
    slabs = least(c.slabs, c.a - i * c.slabs);
    columns = static_cast<int>(least(c.piece, c.b - q * c.piece));
    column = i * c.slabs * c.b + q * c.piece;
    offset = (i * c.slabs * c.m + row) * c.b + q * c.piece;
    t_part = i * c.pieces + q;
    z_part = p;
  }
  __device__ int lines() const { return static_cast<int>(rows * slabs); }
};

}  // namespace wx::gpu::sn
