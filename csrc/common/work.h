// Many pieces of work of different size on ATen's threads.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
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

// Run every item: one that is a large part of all one after another, with all threads on it; the others whole, a thread
// to each, with no barrier between its passes. An item has bytes(), the size of its weight, and run(parallel).
template <class Item>
void run_all(std::vector<Item>& items) {
  constexpr int64_t kSmall = 256 << 10;  // not worth the threads
  constexpr int64_t kCached = 1 << 20;   // passes after the first stay in cache
  // 64 items, 1 MiB in all, took 86 us on one thread; on two, of which one had gone to sleep, 125.
  constexpr int64_t kWake = 2 << 20;
  const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
  int64_t total = 0;
  for (const Item& item : items) total += item.bytes();
  std::vector<Item*> whole;
  for (Item& item : items) {
    if (threads == 1 || item.bytes() <= kSmall || (item.bytes() <= kCached && item.bytes() * threads * 2 <= total))
      whole.push_back(&item);
    else
      item.run(Threads());
  }
  if (threads == 1 || whole.size() < 2 || total < kWake) {
    for (Item* item : whole) item->run(Alone());
    return;
  }
  std::stable_sort(whole.begin(), whole.end(), [](const Item* a, const Item* b) { return a->bytes() > b->bytes(); });
  std::vector<std::vector<Item*>> shares(threads);  // the next largest to the thread that has the least so far
  std::vector<int64_t> load(threads);
  for (Item* item : whole) {
    const auto least = std::min_element(load.begin(), load.end()) - load.begin();
    shares[least].push_back(item);
    load[least] += item->bytes();
  }
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; k++)
      for (Item* item : shares[k]) item->run(Alone());
  });
}

}  // namespace wx
