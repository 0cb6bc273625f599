// Runs of filters between memory, in any dtype, and tiles.
#pragma once
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "transpose.h"

namespace wx::fw {

// Numbers of another type, and back.
template <class C, class E>
struct Widen {
  template <int Bytes>
  WX_INLINE static void body(const E* from, int64_t n, C* to) {
    for (int64_t i = 0; i < n; i++) to[i] = static_cast<C>(widen(from[i]));
  }
};
template <class C, class E>
struct Narrow {
  template <int Bytes>
  WX_INLINE static void body(const C* from, int64_t n, E* to) {
    for (int64_t i = 0; i < n; i++) narrow(from[i], to[i]);
  }
};

// A copy whose stores go past the cache, of whole vectors to where they are aligned.
struct CopyPast {
  template <int Bytes>
  WX_INLINE static void body(const char* from, int64_t bytes, char* to) {
    for (int64_t i = 0; i < bytes; i += 64) {
      Vec<float> v;
      load<float>(v, reinterpret_cast<const float*>(from + i));
      stream<float>(reinterpret_cast<float*>(to + i), v);
    }
  }
};

// Reads and writes at most `tiles` tiles at a time; tiles have rows of 16 numbers, a row for a tap.
template <class C>
class Run {
 public:
  Run(int64_t taps, int64_t tiles) : taps_(taps), size_(tiles * kFilters), wide_(size_ * taps), narrow_(size_ * taps) {}

  // Filters beyond the last one are zeros.
  template <class E>
  void read(const E* from, int64_t filters, C* to, int64_t stride) {
    for (; filters > 0; from += size_ * taps_, filters -= size_, to += size_ / kFilters * stride) {
      const int64_t here = std::min(filters, size_), tiles = (here + kFilters - 1) / kFilters;
      const C* whole = wide_.data();
      if constexpr (std::is_same_v<C, E>) {
        if (here % kFilters == 0)
          whole = from;
        else
          std::copy_n(from, here * taps_, wide_.data());
      } else {
        wx::run<Widen<C, E>>(from, here * taps_, wide_.data());
      }
      if (here % kFilters) std::fill(wide_.data() + here * taps_, wide_.data() + tiles * kFilters * taps_, C(0));
      with_taps(taps_, [&](auto k) { wx::run<ToTaps<C, decltype(k)::value>>(whole, tiles, taps_, to, stride); });
    }
  }

  // `past`: with stores past the cache, where that is possible.
  template <class O>
  void write(const C* from, int64_t stride, int64_t filters, O* to, bool past) {
    for (; filters > 0; to += size_ * taps_, filters -= size_, from += size_ / kFilters * stride) {
      const int64_t here = std::min(filters, size_), tiles = (here + kFilters - 1) / kFilters;
      const bool aligned = reinterpret_cast<uintptr_t>(to) % 64 == 0 && here % kFilters == 0;
      C* whole = wide_.data();
      if constexpr (std::is_same_v<C, O>)
        if (here % kFilters == 0 && !(past && aligned)) whole = to;
      with_taps(taps_, [&](auto k) { wx::run<FromTaps<C, decltype(k)::value>>(from, stride, tiles, taps_, whole); });
      const O* result;
      if constexpr (std::is_same_v<C, O>) {
        if (whole == to) continue;
        result = whole;
      } else {
        O* converted = past && aligned ? reinterpret_cast<O*>(narrow_.data()) : to;
        wx::run<Narrow<C, O>>(static_cast<const C*>(whole), here * taps_, converted);
        if (converted == to) continue;
        result = converted;
      }
      const int64_t bytes = here * taps_ * static_cast<int64_t>(sizeof(O));
      if (past && aligned && bytes % 64 == 0)
        wx::run<CopyPast>(reinterpret_cast<const char*>(result), bytes, reinterpret_cast<char*>(to));
      else
        std::memcpy(to, result, bytes);
    }
  }

 private:
  int64_t taps_, size_;
  Lines<C> wide_;
  Lines<double> narrow_;  // of any dtype
};

}  // namespace wx::fw
