// Many members in one launch: their descriptions travel as the argument of the kernel, by value. Nothing is copied to
// the device before the launch, no memory of the host has to stay alive after it, and a CUDA graph holds all of it.
#pragma once
#include <algorithm>

#include "device.cuh"

namespace wx::gpu {

constexpr int kArgumentBytes = 32764;  // that CUDA takes from 12.1 on

// `Common` is what all members share. Member has `int first`: the first of the blocks, or items, that are its own.
template <class Common, class Member, int N>
struct Table {
  static constexpr int kMembers = N;
  Common common;
  int count;
  int items;  // of all members
  Member at[N];

  __device__ const Member& member_of(int item) const {
    int low = 0, high = count - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (at[middle].first <= item)
        low = middle;
      else
        high = middle - 1;
    }
    return at[low];
  }
};

constexpr int kFewMembers = 12;  // lists of up to so many get a smaller argument
template <class Common, class Member>
constexpr int kManyMembers =
    (kArgumentBytes - 16 - static_cast<int>(sizeof(Common))) / static_cast<int>(sizeof(Member));

}  // namespace wx::gpu
