// Many pieces of work of different size on ATen's threads.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <vector>

namespace wx {

// f(0) ... f(n - 1), each thread a contiguous range, the same one for the same n.
struct Threads {
  template <class F>
  void operator()(int64_t n, const F& f) const {
    if (n == 1) return f(0);
    torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) f(i);
    });
  }
};

// The same on the calling thread.
struct Alone {
  template <class F>
  void operator()(int64_t n, const F& f) const {
    for (int64_t i = 0; i < n; i++) f(i);
  }
};

// Run every item: large ones one after another with all threads on each, small ones whole, a thread to each.
// An item has bytes(), the size of its weight, and run(parallel).
template <class Item>
void run_all(std::vector<Item>& items) {
  constexpr int64_t kSmall = 256 << 10, kMiddle = 1 << 20;  // a middle one fits a core's cache: worth keeping together
  const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
  int64_t total = 0, small_bytes = 0;
  for (const Item& item : items) total += item.bytes();
  std::vector<Item*> small;
  for (Item& item : items) {
    const int64_t bytes = item.bytes();
    if (threads == 1 || bytes <= kSmall || (bytes <= kMiddle && bytes * threads * 2 <= total)) {
      small.push_back(&item);
      small_bytes += bytes;
    } else {
      item.run(Threads());
    }
  }
  if (small.size() < 2 || small_bytes < kSmall / 4) {
    for (Item* item : small) item->run(Alone());
    return;
  }
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    int64_t before = 0;  // thread k takes the items whose middle lies in the k-th share of the bytes
    for (Item* item : small) {
      const int64_t share = (2 * before + item->bytes()) * threads / (2 * small_bytes + 1);
      if (begin <= share && share < end) item->run(Alone());
      before += item->bytes();
    }
  });
}

}  // namespace wx
