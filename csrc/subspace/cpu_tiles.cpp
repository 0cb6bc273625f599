// theta and z_bar of the tiled kinds: a thread takes whole tiles.
#include "kinds.h"
#include "tiles.h"

namespace wx::sub {

constexpr int64_t kGrain = 32 << 10;  // elements for which another thread is not worth waking

void tiled_forward(const Call& call) {
  const std::vector<Stratum> strata = strata_of(call);
  const Pieces pieces(call.members, call.tile);
  dispatch(call.dtype, [&](auto t) {
    using T = decltype(t);
    const auto zx = unroll<Compute<T>>(call, strata);
    ranges(pieces.count(), std::max<int64_t>(1, kGrain / call.tile), [&](int64_t begin, int64_t end) {
      Tile<T> tile(call, strata);
      for (int64_t k = begin; k < end; k++) tile.forward(pieces[k], zx.data());
      if (call.past_cache) stream_fence();
    });
  });
}

void tiled_backward(const Call& call) {
  const std::vector<Stratum> strata = strata_of(call);
  const Pieces pieces(call.members, call.tile);
  const int64_t count = groups(call.total, call.d, 1 << 16), n = unrolled(call);
  dispatch(call.dtype, [&](auto t) {
    using T = decltype(t);
    using C = Compute<T>;
    std::vector<double> sums(count * call.batch * call.d);
    ranges(count, 1, [&](int64_t begin, int64_t end) {
      Tile<T> tile(call, strata);
      std::vector<C> acc;
      for (int64_t g = begin; g < end; g++) {
        acc.assign(call.batch * n, C(0));
        for (int64_t k = g * pieces.count() / count; k < (g + 1) * pieces.count() / count; k++)
          tile.backward(pieces[k], acc.data());
        for (int64_t k = 0; k < call.batch; k++)
          for (const Stratum& s : strata) {
            double* to = sums.data() + (g * call.batch + k) * call.d + s.low;
            const C* from = acc.data() + k * n + s.at;
            for (int64_t j = 0; j < s.width + call.tile; j += s.width)
              for (int64_t i = 0; i < s.width && i + j < s.width + call.tile; i++)
                to[i] += static_cast<double>(from[i + j]);
          }
      }
    });
    finish_groups<C>(call, sums.data(), count);
  });
}

}  // namespace wx::sub
