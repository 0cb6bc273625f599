// Arithmetic whose bits are promised: one rounding for each operation, nothing fused; signs, permutations and coins
// from Philox. reference.py and philox.py have the maths.
#pragma once
#include <type_traits>
#include <vector>

#include "../common/grouped.cuh"
#include "../common/philox.h"

#ifndef WX_SUB_THREADS
#define WX_SUB_THREADS 256
#endif

namespace wx::gpu::sub {

constexpr int kThreads = WX_SUB_THREADS;  // of a block, at the most
constexpr int kWarps = kThreads / 32;
// A second argument of __launch_bounds__ also says that registers may be used: without one some kernels spill, so that
// more blocks fit than are of use.
//
// Blocks that a multiprocessor has at once, by their registers: enough to hide the latency of memory. A kernel that
// does not know the size of its tile holds more addresses.
template <class C, int kBits>
constexpr int kTogether = sizeof(C) == 8 ? 1
                          : kBits        ? 3
                                         : 2;

template <class T>
__host__ __device__ constexpr T ceil_div(T x, T y) {
  return (x + y - 1) / y;
}

__device__ inline float add(float a, float b) { return __fadd_rn(a, b); }
__device__ inline float sub(float a, float b) { return __fsub_rn(a, b); }
__device__ inline float mul(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double add(double a, double b) { return __dadd_rn(a, b); }
__device__ inline double sub(double a, double b) { return __dsub_rn(a, b); }
__device__ inline double mul(double a, double b) { return __dmul_rn(a, b); }

// x with its sign flipped where bit `at` of the word is set.
__device__ inline float flip(float x, uint32_t word, int at) {
  return bit_cast<float>(bit_cast<uint32_t>(x) ^ (word << (31 - at) & 0x80000000u));
}
__device__ inline double flip(double x, uint32_t word, int at) {
  return bit_cast<double>(bit_cast<uint64_t>(x) ^ static_cast<uint64_t>(word << (31 - at) & 0x80000000u) << 32);
}

enum Stream : uint32_t { kSetup = 1, kPerm, kSignIn, kSignOut, kEntry, kFastB, kFastG, kFastPerm };

__device__ inline Words draw(Key key, Stream stream, int64_t pos, uint32_t column, uint32_t step) {
  return philox(key, static_cast<uint32_t>(pos), stream << 24 | static_cast<uint32_t>(pos >> 32), column, step);
}

// One of four words; an index at run time would put them into memory.
__device__ inline uint32_t pick(const Words& w, int64_t i) {
  return i & 2 ? (i & 1 ? w.at[3] : w.at[2]) : (i & 1 ? w.at[1] : w.at[0]);
}

// The word with the sign of element i.
__device__ inline uint32_t sign_word(Key key, Stream stream, int64_t i, uint32_t step) {
  return pick(draw(key, stream, i >> 7, 0, step), i >> 5);
}

__device__ inline int coins(uint32_t word) { return 2 * __popc(word >> 1) - 31; }

__device__ inline uint32_t step_of(const int64_t* step) { return step ? static_cast<uint32_t>(*step) : 0; }

// A bijection of 2^bits places. As it is drawn it goes from element to column; inverted, back.
struct Permutation {
  uint32_t a0, a1, a2, k;

  __device__ static Permutation of(const Words& w) { return {w.at[0] | 1, w.at[1] | 1, w.at[2] | 1, w.at[3]}; }
  __device__ uint32_t operator()(uint32_t j, int bits) const { return mixed(j + k, bits); }
  __device__ uint32_t back(uint32_t v, int bits) const { return (mixed(v, bits) - k) & ((1u << bits) - 1); }
  __device__ Permutation inverted() const { return {inverse(a2), inverse(a1), inverse(a0), k}; }

 private:
  __device__ uint32_t mixed(uint32_t x, int bits) const {
    const uint32_t mask = (1u << bits) - 1;
    const int shift = (bits + 1) >> 1;
    x = x * a0 & mask;  // of x only the lower bits count
    x ^= x >> shift;
    x = x * a1 & mask;
    x ^= x >> shift;
    return x * a2 & mask;
  }
  // Of an odd number, mod 2^32: each step doubles the number of right bits, a has three.
  __device__ static uint32_t inverse(uint32_t a) {
    uint32_t x = a;
    for (int i = 0; i < 4; i++) x *= 2 - a * x;
    return x;
  }
};

// f(table) for as many tables of N members as there must be.
template <int N, class Common, class Member, class Items, class F>
void for_each_table(const std::vector<Member>& members, const Common& common, const Items& items, const F& f) {
  static_assert(sizeof(Table<Common, Member, N>) <= kArgumentBytes - 256);  // there are other arguments
  for (size_t begin = 0; begin < members.size(); begin += N) {
    Table<Common, Member, N> table;
    table.common = common;
    table.count = static_cast<int>(std::min(members.size() - begin, size_t{N}));
    table.items = 0;
    for (int i = 0; i < table.count; i++) {
      table.at[i] = members[begin + i];
      table.at[i].first = table.items;
      table.items += static_cast<int>(items(members[begin + i]));
    }
    f(table);
  }
}

constexpr int kSomeMembers = 48;  // of a launch where the table hardly matters

// Before a launch with so much dynamic shared memory.
template <class K>
void allow_shared(K kernel, int threads, int bytes) {
  if (bytes > 40 << 10) resident_blocks(kernel, threads, bytes);
}

}  // namespace wx::gpu::sub
