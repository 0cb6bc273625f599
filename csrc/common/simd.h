// One source for three vector widths: a kernel is a struct with body<Bytes>(args), and run<Kernel>(args) calls the one
// that the machine has. Unlike target_clones it tells the body how wide a vector is, which shuffles must know.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <type_traits>
#include <utility>

#include "vec.h"

#define WX_ALWAYS __attribute__((always_inline))  // of a lambda

namespace wx {

template <class C, int Bytes>
struct Pack {
  typedef C V __attribute__((vector_size(Bytes)));
};

template <class C, int Bytes>
struct Packs {
  using Bits = std::conditional_t<sizeof(C) == 8, uint64_t, uint32_t>;
  using F = typename Pack<C, Bytes>::V;
  using U = typename Pack<Bits, Bytes>::V;
  static constexpr int N = Bytes / sizeof(C);
};

template <class V, class C>
WX_INLINE void get(V& v, const C* p) {
  __builtin_memcpy(&v, p, sizeof v);
}
template <class V, class C>
WX_INLINE void put(C* p, const V& v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// The same number in each lane. The instruction itself: GCC would fill the lanes of a wide vector one after another.
template <class V, class C>
WX_INLINE void fill(V& v, C x) {
#if defined(__x86_64__) && defined(__gnu_linux__)
  if constexpr (sizeof(V) > 16) {
    if constexpr (sizeof(C) == 8)
      asm("vbroadcastsd %1, %0" : "=v"(v) : "vm"(x));
    else
      asm("vbroadcastss %1, %0" : "=v"(v) : "vm"(x));
    return;
  }
#endif
  v = x - V{};
}

template <class W, class V, size_t... I>
WX_INLINE void join(W& both, const V& a, const V& b, std::index_sequence<I...>) {
  both = __builtin_shufflevector(a, b, I...);
}

// f(0) ... f(N - 1) with constants: what f indexes stays in registers, which GCC grants no array that a loop indexes.
template <class F, int... I>
WX_INLINE void each_of(std::integer_sequence<int, I...>, const F& f) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
WX_INLINE void each(const F& f) {
  each_of(std::make_integer_sequence<int, N>{}, f);
}

// acc += a b, rounded once where the machine can. The instruction itself: contraction is off, and GCC takes a loop of
// __builtin_fma over the lanes of a vector apart.
template <int Bytes, class V>
WX_INLINE void fma(V& acc, const V& a, const V& b) {
#if defined(__x86_64__) && defined(__gnu_linux__)
  if constexpr (Bytes > 16) {
    if constexpr (sizeof(a[0]) == 8)
      asm("vfmadd231pd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
    else
      asm("vfmadd231ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
    return;
  }
#endif
  acc = acc + a * b;
}

// One vector of numbers of another type.
template <class C, int Bytes, class E>
WX_INLINE void get_as(typename Packs<C, Bytes>::F& x, const E* p) {
  using U = typename Packs<C, Bytes>::U;
  using F = typename Packs<C, Bytes>::F;
  constexpr int N = Packs<C, Bytes>::N;
  if constexpr (std::is_same_v<E, C>) {
    get(x, p);
  } else if constexpr (sizeof(E) == 2 && sizeof(C) == 4) {
    typename Pack<uint16_t, Bytes / 2>::V narrow_bits;
    get(narrow_bits, p);
    const U bits = __builtin_convertvector(narrow_bits, U);
    if constexpr (std::is_same_v<E, bf16>) {
      x = reinterpret_cast<F>(bits << 16);
    } else {  // as widen() has it
      const U magnitude = (bits & 0x7FFFu) << 13, sign = (bits & 0x8000u) << 16;
      const F normal = reinterpret_cast<F>(magnitude) * 0x1p112f;
      const U special = reinterpret_cast<U>(magnitude >= 0x0F800000u);
      x = reinterpret_cast<F>((special & (magnitude | 0x7F800000u)) | (~special & reinterpret_cast<U>(normal)) | sign);
    }
  } else if constexpr (std::is_same_v<E, float>) {
    typename Pack<float, Bytes / 2>::V half;
    get(half, p);
    x = __builtin_convertvector(half, F);
  } else {
    C wide[N];
    for (int l = 0; l < N; l++) wide[l] = static_cast<C>(widen(p[l]));
    get(x, wide);
  }
}

// What the next tile reads is asked for while this one is computed: `item` bytes for each of its elements. Without it a
// core waits for memory and then computes, by turns.
struct Ahead {
  const char* at = nullptr;
  int item = 0;

  WX_INLINE void ask(int64_t element, int64_t count, int bytes) const {
    for (int64_t b = 0; b < count * bytes; b += 64) __builtin_prefetch(at + element * bytes + b, 0, 2);
  }
};

#if defined(__x86_64__) && defined(__gnu_linux__)

template <class Kernel, class... A>
__attribute__((target("arch=x86-64-v4"), noinline)) void on_v4(A... a) {
  Kernel::template body<64>(a...);
}
template <class Kernel, class... A>
__attribute__((target("arch=x86-64-v3"), noinline)) void on_v3(A... a) {
  Kernel::template body<32>(a...);
}

// Of the machine.
inline int vector_bytes() {
  static const int bytes = [] {
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
    const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    const char* most = std::getenv("WEIGHTXFORM_VECTOR_BYTES");  // for tests: 32 or 16 although there is more
    return std::min(v3 && v4 ? 64 : v3 ? 32 : 16, most ? std::max(16, std::atoi(most)) : 64);
  }();
  return bytes;
}

#else

inline int vector_bytes() { return 16; }

#endif

template <class Kernel, class... A>
__attribute__((noinline)) void on_any(A... a) {
  Kernel::template body<16>(a...);
}

template <class Kernel, class... A>
void run(A... a) {
#if defined(__x86_64__) && defined(__gnu_linux__)
  const int bytes = vector_bytes();
  if (bytes == 64) return on_v4<Kernel>(a...);
  if (bytes == 32) return on_v3<Kernel>(a...);
#endif
  on_any<Kernel>(a...);
}

}  // namespace wx
