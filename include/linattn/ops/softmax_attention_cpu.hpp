// Softmax attention on the host.
//
// Queries are the lanes: a panel of queries is transposed once, and the logits of a block of keys against it,
// S^T [key][query], come from the keys as they lie. Maximum, exponential and sum then run down the keys lane
// by lane, and S^T is already the packed panel that the product with the values takes. No transpose of the
// keys and no reduction across lanes occurs.
//
// A weight of 0 would not hide a value that is not finite. Where a mask hides keys, such values are 0 in the
// product, and are added afterwards for the queries that see them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>

#include <linattn/core/context.hpp>
#include <linattn/detail/gemm.hpp>
#include <linattn/ops/softmax_attention.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN
namespace detail::inline LINATTN_TARGET {

// A task is a block of queries of one head. It copies the keys and values block by block (contiguous,
// widened) and takes its panels of queries past each block. The cut depends on the shapes alone.
template <class C>
struct SoftmaxPlan {
  static constexpr Index panel = Tile<C>::columns;

  Index head_dim, value_dim, head_count;
  Index queries, keys;  // of a block
  Index query_blocks, tasks;

  constexpr SoftmaxPlan(Index batch, Index all_queries, Index all_keys, Index heads, Index d, Index dv)
      : head_dim(d), value_dim(dv), head_count(heads) {
    const bool wide = d + dv > 256;  // then half the tokens
    const Index query_limit = wide ? 256 : 512;
    query_blocks = (all_queries + query_limit - 1) / query_limit;
    queries = padded_columns<C>((all_queries + query_blocks - 1) / query_blocks);
    query_blocks = (all_queries + queries - 1) / queries;
    keys = std::min(all_keys, wide ? Index{64} : Index{128});
    tasks = batch * heads * query_blocks;
  }
  [[nodiscard]] constexpr Index panels() const { return queries / panel; }
};

// The scratch memory of all workers. Per panel of queries: q [head_dim][panel], out [value_dim][panel], the
// running maximum and sum. Shared by the panels: one block of keys and values, and its logits [key][panel].
template <class C>
struct SoftmaxWork {
  Index q_size, k_size, v_size, out_size, state_size, logits_size;
  C *q, *k, *v, *out, *max, *sum, *logits;

  SoftmaxWork(Carver& carver, Index workers, const SoftmaxPlan<C>& plan)
      : q_size(plan.queries * plan.head_dim),
        k_size(plan.keys * plan.head_dim),
        v_size(plan.keys * plan.value_dim),
        out_size(plan.queries * plan.value_dim),
        state_size(plan.queries),
        logits_size(plan.keys * plan.panel),
        q(carver.take<C>(workers * q_size)),
        k(carver.take<C>(workers * k_size)),
        v(carver.take<C>(workers * v_size)),
        out(carver.take<C>(workers * out_size)),
        max(carver.take<C>(workers * state_size)),
        sum(carver.take<C>(workers * state_size)),
        logits(carver.take<C>(workers * logits_size)) {}

  [[nodiscard]] SoftmaxWork scratch(Index worker) const {
    SoftmaxWork own = *this;
    own.q += worker * q_size;
    own.k += worker * k_size;
    own.v += worker * v_size;
    own.out += worker * out_size;
    own.max += worker * state_size;
    own.sum += worker * state_size;
    own.logits += worker * logits_size;
    return own;
  }
};

// What is added to the logits of a panel: the bias (null: none), and -infinity at the keys after
// first_masked + i for the query i of the panel.
template <class C>
LINATTN_NOINLINE void pack_bias(const C* bias, Index query_stride, Index queries, Index keys, bool causal,
                                Index last_visible, C* logits) {
  constexpr Index panel = Tile<C>::columns, half_panel = Pack<C>::size;
  if (bias != nullptr) {
    pack_transposed(bias, query_stride, keys, queries, logits);
    pack_transposed(bias + half_panel * query_stride, query_stride, keys, queries - half_panel,
                    logits + half_panel);
  } else {
    std::fill(logits, logits + keys * panel, C(0));
  }
  if (causal)
    for (Index j = std::max(Index{0}, last_visible + 1); j < keys; ++j)
      std::fill(logits + j * panel, logits + j * panel + std::min(panel, j - last_visible),
                -std::numeric_limits<C>::infinity());
}

// logits[j][i] = scale k[j] . q[i] (+ what is there; -infinity stays, whatever the product), and the maximum
// over j into block_max[i].
template <bool biased, class C>
LINATTN_NOINLINE void panel_logits(const C* k, Index head_dim, Index keys, const C* q, C scale, C* logits,
                                   C* block_max) {
  using P = Pack<C>;
  constexpr Index panel = Tile<C>::columns;
  P top[2] = {P(std::numeric_limits<C>::lowest()), P(std::numeric_limits<C>::lowest())};
  multiply_panel(k, head_dim, Index{1}, keys, q, head_dim,
                 [&]<std::size_t Rows>(Index row, P(&sums)[Rows][2]) LINATTN_INLINE_LAMBDA {
                   unroll<int{Rows}>([&](auto r) LINATTN_INLINE_LAMBDA {
                     unroll<2>([&](auto p) LINATTN_INLINE_LAMBDA {
                       C* const at = logits + (row + r) * panel + p * P::size;
                       P s = sums[r][p] * P(scale);
                       if constexpr (biased) {
                         const P added = P::load(at);
                         s = select_less(added, P(std::numeric_limits<C>::lowest()), added,
                                         fma(sums[r][p], P(scale), added));
                       }
                       s.store(at);
                       top[p] = max(top[p], s);
                     });
                   });
                 });
  top[0].store(block_max);
  top[1].store(block_max + P::size);
}

// Moves the running maximum to that of the block too; logits become exp(logits - maximum), and the running
// sum takes them in. `block_max` leaves with the factor that rescales what was summed before.
template <class C>
LINATTN_NOINLINE void panel_exponentials(C* logits, Index keys, C* running_max, C* running_sum,
                                         C* block_max) {
  using P = Pack<C>;
  constexpr Index panel = Tile<C>::columns;
  P top[2], sum[2];
  for (int p = 0; p < 2; ++p) {
    top[p] = max(P::load(block_max + p * P::size), P::load(running_max + p * P::size));
    sum[p] = P::zero();
  }
  for (Index j = 0; j < keys; ++j)
    unroll<2>([&](auto p) LINATTN_INLINE_LAMBDA {
      C* const at = logits + j * panel + p * P::size;
      const P e = exp(P::load(at) - top[p]);
      e.store(at);
      sum[p] += e;
    });
  for (int p = 0; p < 2; ++p) {
    const Index lane = p * P::size;
    const P rescale = exp(P::load(running_max + lane) - top[p]);
    rescale.store(block_max + lane);
    fma(P::load(running_sum + lane), rescale, sum[p]).store(running_sum + lane);
    top[p].store(running_max + lane);
  }
}

// out[c][i] = rescale[i] out[c][i] + sum_j v[j][c] e[j][i]
template <class C>
LINATTN_NOINLINE void panel_values(const C* v, Index value_dim, Index keys, const C* e, const C* rescale,
                                   C* out) {
  using P = Pack<C>;
  constexpr Index panel = Tile<C>::columns;
  multiply_panel(v, Index{1}, value_dim, value_dim, e, keys,
                 [&]<std::size_t Rows>(Index row, P(&sums)[Rows][2]) LINATTN_INLINE_LAMBDA {
                   unroll<int{Rows}>([&](auto r) LINATTN_INLINE_LAMBDA {
                     unroll<2>([&](auto p) LINATTN_INLINE_LAMBDA {
                       C* const at = out + (row + r) * panel + p * P::size;
                       fma(P::load(at), P::load(rescale + p * P::size), sums[r][p]).store(at);
                     });
                   });
                 });
}

template <class C>
[[nodiscard]] LINATTN_INLINE bool is_finite(C value) {
  return value - value == C(0);
}

// 0 times a number is NaN where that is not finite. Four sums, so that none waits for itself.
template <class C>
[[nodiscard]] LINATTN_NOINLINE bool all_finite(const C* values, Index count) {
  using P = Pack<C>;
  P sums[4] = {P::zero(), P::zero(), P::zero(), P::zero()};
  Index i = 0;
  for (; i + 4 * P::size <= count; i += 4 * P::size)
    unroll<4>([&](auto n) LINATTN_INLINE_LAMBDA {
      sums[n] = fma(P::load(values + i + n * P::size), P::zero(), sums[n]);
    });
  C sum = reduce_add(sums[0] + sums[1] + (sums[2] + sums[3]));
  for (; i < count; ++i) sum += values[i] * C(0);
  return sum == C(0);
}

// out[c][i] += e[j][i] v[j][c] for the values that are not finite and the queries that see them.
template <class C, class T, class Sees>
LINATTN_NOINLINE void add_not_finite(const T* v, Index token_stride, Index keys, Index value_dim, const C* e,
                                     Index queries, const Sees& sees, C* out) {
  constexpr Index panel = Tile<C>::columns;
  for (Index j = 0; j < keys; ++j, v += token_stride) {
    if (std::all_of(v, v + value_dim, [](T value) { return is_finite(convert<C>(value)); })) continue;
    for (Index i = 0; i < std::min(panel, queries); ++i) {
      if (!sees(i, j)) continue;
      for (Index c = 0; c < value_dim; ++c)
        if (const C value = convert<C>(v[c]); !is_finite(value))
          out[c * panel + i] += e[j * panel + i] * value;
    }
  }
}

// The rows of out, from one pack's width of a panel: out[i][c] = from[c][i] / sum[i].
template <class C, class T>
LINATTN_NOINLINE void store_rows(const C* from, const C* sum, Index queries, Index value_dim, T* out,
                                 Index query_stride) {
  using P = Pack<C>;
  C inverse[P::size];
  for (int i = 0; i < P::size; ++i) inverse[i] = sum[i] == C(0) ? C(0) : C(1) / sum[i];
  const P factor = P::load(inverse);
  P block[P::size];
  for (Index c = 0; c < value_dim; c += P::size) {
    const int count = static_cast<int>(std::min(value_dim - c, Index{P::size}));
    for (int j = 0; j < P::size; ++j)
      block[j] = j < count ? P::load(from + (c + j) * Tile<C>::columns) * factor : P::zero();
    transpose(block);
    for (int i = 0; i < P::size && i < queries; ++i) {
      T* const to = out + i * query_stride + c;
      if (count == P::size) {
        store(to, block[i]);
      } else {
        store_partial(to, block[i], count);
      }
    }
  }
}

template <class C, class T>
LINATTN_NOINLINE void copy_tokens(const T* from, Index token_stride, Index tokens, Index channels, C* to) {
  for (Index t = 0; t < tokens; ++t, from += token_stride, to += channels) {
    Index c = 0;
    for (; c + Pack<C>::size <= channels; c += Pack<C>::size) load<C>(from + c).store(to + c);
    for (; c < channels; ++c) to[c] = convert<C>(from[c]);
  }
}

// Rows that the next block will copy: in a packed projection they lie too far apart for the machine to guess.
template <class T>
LINATTN_INLINE void prefetch_tokens(const T* from, Index token_stride, Index tokens, Index channels) {
  constexpr Index line = 64 / sizeof(T);
  for (Index t = 0; t < tokens; ++t, from += token_stride)
    for (Index c = 0; c < channels; c += line) prefetch(from + c);
}

template <class T>
void softmax_task(const TensorView<const T, 4>& q, const TensorView<const T, 4>& k,
                  const TensorView<const T, 4>& v, const TensorView<T, 4>& out,
                  const SoftmaxAttentionOptions<Compute<T>>& options, const SoftmaxPlan<Compute<T>>& plan,
                  Index task, const SoftmaxWork<Compute<T>>& work) {
  using C = Compute<T>;
  constexpr Index panel = SoftmaxPlan<C>::panel, half_panel = Pack<C>::size;
  const Index d = plan.head_dim, dv = plan.value_dim;
  const Index first_query = task % plan.query_blocks * plan.queries;
  const Index h = task / plan.query_blocks % plan.head_count, b = task / plan.query_blocks / plan.head_count;
  const Index queries = std::min(plan.queries, q.extent(1) - first_query);
  const C scale = static_cast<C>(options.scale.value_or(1.0 / std::sqrt(static_cast<double>(d))));
  const Index diagonal = k.extent(1) - q.extent(1);  // causal: query i sees the keys up to i + diagonal
  const bool biased = !options.bias.empty();

  const Index panels = padded_columns<C>(queries) / panel;
  for (Index i = 0; i < panels * panel; i += half_panel) {
    if (i + half_panel < queries)
      prefetch_tokens(q.pointer(b, first_query + i + half_panel, h), q.step(1),
                      std::min(half_panel, queries - i - half_panel), d);
    pack_transposed(q.pointer(b, first_query + i, h), q.step(1), d, queries - i,
                    work.q + i / panel * panel * d + i % panel);
  }
  std::fill(work.out, work.out + panels * panel * dv, C(0));
  std::fill(work.max, work.max + panels * panel, std::numeric_limits<C>::lowest());
  std::fill(work.sum, work.sum + panels * panel, C(0));

  // The keys that the last query of [0, queries) sees.
  const auto visible = [&](Index end) {
    return options.causal ? std::min(k.extent(1), first_query + end + diagonal) : k.extent(1);
  };
  for (Index first_key = 0; first_key < visible(queries); first_key += plan.keys) {
    const Index keys = std::min(plan.keys, k.extent(1) - first_key);
    copy_tokens(k.pointer(b, first_key, h), k.step(1), keys, d, work.k);
    copy_tokens(v.pointer(b, first_key, h), v.step(1), keys, dv, work.v);
    const bool hides = biased || first_key + keys > visible(1);
    const bool finite = !hides || all_finite(work.v, keys * dv);
    if (!finite)
      std::replace_if(
          work.v, work.v + keys * dv, [](C value) { return !is_finite(value); }, C(0));
    const Index next_key = first_key + keys;
    const Index next_keys = std::clamp(visible(queries) - next_key, Index{0}, plan.keys);
    for (Index i = 0; i < queries; i += panel) {
      // Each panel asks for its share of the next block.
      const Index first = next_keys * (i / panel) / panels,
                  count = next_keys * (i / panel + 1) / panels - first;
      if (first_key >= visible(i + panel)) continue;
      prefetch_tokens(k.pointer(b, next_key + first, h), k.step(1), count, d);
      const Index last_visible = first_query + i + diagonal - first_key;  // in this block, to query i
      const bool masked = options.causal && last_visible < keys - 1;
      const C* const query = work.q + i * d;
      const C* const bias = biased ? options.bias.pointer(b, h, first_query + i, first_key) : nullptr;
      const Index bias_stride = biased ? options.bias.step(2) : 0;
      alignas(64) C rescale[std::size_t{panel}];
      if (biased || masked) {
        pack_bias(bias, bias_stride, queries - i, keys, masked, last_visible, work.logits);
        panel_logits<true>(work.k, d, keys, query, scale, work.logits, rescale);
      } else {
        panel_logits<false>(work.k, d, keys, query, scale, work.logits, rescale);
      }
      prefetch_tokens(v.pointer(b, next_key + first, h), v.step(1), count, dv);
      panel_exponentials(work.logits, keys, work.max + i, work.sum + i, rescale);
      panel_values(work.v, dv, keys, work.logits, rescale, work.out + i * dv);
      if (!finite)
        add_not_finite(
            v.pointer(b, first_key, h), v.step(1), keys, dv, work.logits, queries - i,
            [&](Index row, Index j) {
              return !(masked && j > last_visible + row) &&
                     !(biased && bias[row * bias_stride + j] == -std::numeric_limits<C>::infinity());
            },
            work.out + i * dv);
    }
  }

  for (Index i = 0; i < queries; i += half_panel)
    store_rows(work.out + i / panel * panel * dv + i % panel, work.sum + i, queries - i, dv,
               out.pointer(b, first_query + i, h), out.step(1));
  if (!options.lse.empty())
    for (Index i = 0; i < queries; ++i)
      options.lse(b, first_query + i, h) =
          work.sum[i] == C(0) ? -std::numeric_limits<C>::infinity() : work.max[i] + std::log(work.sum[i]);
}

template <class T>
[[nodiscard]] constexpr SoftmaxPlan<Compute<T>> softmax_plan(const TensorView<const T, 4>& q,
                                                             const TensorView<const T, 4>& k,
                                                             const TensorView<const T, 4>& v) {
  return {q.extent(0), q.extent(1), k.extent(1), q.extent(2), q.extent(3), v.extent(3)};
}

}  // namespace detail::inline LINATTN_TARGET

inline namespace LINATTN_TARGET {

// Bytes of workspace that the same call of `softmax_attention` needs; grows with the workers and the head
// size, not with the tokens.
template <ParallelPolicy P, Storage T>
[[nodiscard]] std::size_t softmax_attention_workspace(const Cpu<P>& ctx, const In<T, 4>& q, const In<T, 4>& k,
                                                      const In<T, 4>& v, const TensorView<T, 4>&,
                                                      const SoftmaxAttentionOptions<Compute<T>>& = {}) {
  if (q.empty() || k.empty() || v.empty()) return 0;
  Carver carver({});
  detail::SoftmaxWork<Compute<T>>(carver, ctx.parallel.workers(), detail::softmax_plan<T>(q, k, v));
  return carver.used();
}

template <ParallelPolicy P, Storage T>
Status softmax_attention(const Cpu<P>& ctx, const In<T, 4>& q, const In<T, 4>& k, const In<T, 4>& v,
                         const TensorView<T, 4>& out,
                         const SoftmaxAttentionOptions<Compute<T>>& options = {}) {
  if (const Status status = detail::check_softmax_attention<T>(q, k, v, out, options); !status.ok())
    return status;
  const auto plan = detail::softmax_plan<T>(q, k, v);
  Carver carver(ctx.workspace);
  const detail::SoftmaxWork<Compute<T>> work(carver, ctx.parallel.workers(), plan);
  if (const Status status = carver.check("softmax_attention, workspace"); !status.ok()) return status;
  ctx.parallel.run(plan.tasks, [&](Index task, Index worker) {
    detail::softmax_task(q, k, v, out, options, plan, task, work.scratch(worker));
  });
  return {};
}

}  // namespace LINATTN_TARGET
LINATTN_END
