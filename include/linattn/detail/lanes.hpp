// Walking over channels in SIMD packs, the last of them partly filled.
#pragma once

#include <linattn/core/tensor.hpp>
#include <linattn/detail/simd.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN
namespace detail::inline LINATTN_TARGET {

// All lanes of a pack, and the first `count` of them: where an element-wise op loads and stores.
template <class C>
struct AllLanes {
  template <class S>
  [[nodiscard]] LINATTN_INLINE Pack<C> load(const S* p) const {
    return detail::load<C>(p);
  }
  template <class S>
  LINATTN_INLINE void store(S* p, Pack<C> value) const {
    detail::store(p, value);
  }
};
template <class C>
struct SomeLanes {
  int count;
  template <class S>
  [[nodiscard]] LINATTN_INLINE Pack<C> load(const S* p) const {
    return load_partial<C>(p, count);
  }
  template <class S>
  LINATTN_INLINE void store(S* p, Pack<C> value) const {
    store_partial(p, value, count);
  }
};

// f(channel, lanes) for the packs of channels [begin, end). A lane is computed alike in a whole and in a
// partial pack, so the results of an element-wise f do not depend on where the packs begin.
template <class C, class F>
LINATTN_INLINE void for_each_pack(Index begin, Index end, const F& f) {
  constexpr Index width = Pack<C>::size;
  Index c = begin;
  for (; c + width <= end; c += width) f(c, AllLanes<C>{});
  if (c < end) f(c, SomeLanes<C>{static_cast<int>(end - c)});
}

}  // namespace detail::inline LINATTN_TARGET
LINATTN_END
