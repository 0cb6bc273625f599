// Memory for large CPU outputs that is given back to the next call and not to the system.
//
// A fresh tensor of 32 MiB costs more in page faults (about 1 us per 4 KiB) than the arithmetic that fills it, and a
// computed weight is fresh at every step. Blocks freed by their tensor are kept, with their pages, for the next request
// of about that size; huge pages where the system offers them. At most as much is kept as was ever in use at once.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

namespace wx {

class Pool {
 public:
  static constexpr size_t kSmallest = size_t{128} << 10;  // below, malloc reuses memory well

  static Pool& instance() {
    static Pool* pool = new Pool;  // never destroyed: tensors may outlive the static destructors
    return *pool;
  }

  // A block of at least `bytes`, aligned to 64 KiB, or nullptr (then use torch's allocator).
  void* take(size_t bytes) {
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);  // a fork may have left it locked
    if (!lock || bytes < kSmallest || !enabled_) return nullptr;
    size_t best = free_.size();
    for (size_t i = 0; i < free_.size(); i++)
      if (free_[i]->size >= bytes && free_[i]->size <= bytes + bytes / 4 + granule(bytes) &&
          (best == free_.size() || free_[i]->size < free_[best]->size))
        best = i;
    Header* block;
    if (best < free_.size()) {
      block = free_[best];
      free_.erase(free_.begin() + static_cast<std::ptrdiff_t>(best));
      free_bytes_ -= block->size;
    } else if ((block = map(bytes)) == nullptr) {
      return nullptr;
    }
    live_bytes_ += block->size;
    if (live_bytes_ > peak_bytes_) peak_bytes_ = live_bytes_;
    return block + 1;
  }

  void give(void* data) {
    auto* block = static_cast<Header*>(data) - 1;
    std::lock_guard<std::mutex> lock(mutex_);
    live_bytes_ -= block->size;
    free_.push_back(block);
    free_bytes_ += block->size;
    trim(peak_bytes_);
  }

  // Give free blocks back to the system, the oldest first, until at most `keep` bytes are held.
  void release(size_t keep) {
    std::lock_guard<std::mutex> lock(mutex_);
    trim(keep);
    peak_bytes_ = live_bytes_;
  }

 private:
  struct Header {   // right before the data
    size_t size;    // usable bytes
    size_t mapped;  // bytes to unmap
    void* base;
  };
  static constexpr size_t kHugePage = size_t{2} << 20;
  static constexpr size_t granule(size_t bytes) { return bytes >= kHugePage ? kHugePage : size_t{64} << 10; }

  Pool() {
    const char* off = std::getenv("WEIGHTXFORM_POOL");
    enabled_ = !(off && off[0] == '0');
  }

  static Header* map(size_t bytes) {
    const size_t unit = granule(bytes), size = (bytes + unit - 1) / unit * unit, mapped = size + unit;
    void* base = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) return nullptr;
    const auto start = (reinterpret_cast<uintptr_t>(base) / unit + 1) * unit;
#ifdef MADV_HUGEPAGE
    if (unit == kHugePage) madvise(reinterpret_cast<void*>(start), size, MADV_HUGEPAGE);
#endif
    auto* block = reinterpret_cast<Header*>(start) - 1;
    *block = {size, mapped, base};
    return block;
  }

  void trim(size_t keep) {
    size_t i = 0;
    for (; i < free_.size() && free_bytes_ > keep; i++) {
      free_bytes_ -= free_[i]->size;
      munmap(free_[i]->base, free_[i]->mapped);
    }
    free_.erase(free_.begin(), free_.begin() + static_cast<std::ptrdiff_t>(i));
  }

  std::mutex mutex_;
  std::vector<Header*> free_;
  size_t free_bytes_ = 0, live_bytes_ = 0, peak_bytes_ = 0;
  bool enabled_ = true;
};

// Uninitialised memory for n numbers during a call; a large one costs no page faults from the second call on.
template <class C>
class Scratch {
 public:
  explicit Scratch(int64_t n = 0) {
    if (n == 0) return;
    const size_t bytes = static_cast<size_t>(n) * sizeof(C);
    void* pooled = Pool::instance().take(bytes);
    data_ = {static_cast<C*>(pooled ? pooled : std::malloc(bytes)), Free{pooled != nullptr}};
    if (!data_) throw std::bad_alloc();
  }
  C* data() const { return data_.get(); }

 private:
  struct Free {
    bool pooled = false;
    void operator()(C* p) const { pooled ? Pool::instance().give(p) : std::free(p); }
  };
  std::unique_ptr<C, Free> data_;
};

}  // namespace wx
