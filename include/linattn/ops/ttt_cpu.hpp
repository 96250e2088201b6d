// Test-time-training attention on the host. Contract: ttt.hpp. The tiles and products are in
// detail/ttt_tiles.hpp.
//
// A head's keys pass once, in tiles of 64 tokens; each chunk of 512 sums its own gradient, and the chunks'
// sums are added in their order, whoever computed them. With many heads a task is a head: its updated weights
// stay where they are and its queries follow at once. With few heads a task is a chunk, and a bounded number
// of chunks is in flight.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>

#include <linattn/core/context.hpp>
#include <linattn/core/dtype.hpp>
#include <linattn/core/status.hpp>
#include <linattn/core/tensor.hpp>
#include <linattn/detail/ttt_tiles.hpp>
#include <linattn/ops/ttt.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN
namespace detail::inline LINATTN_TARGET {

// How the work is cut into tasks. Only the cut depends on the workers; the order of the sums does not.
struct TttPlan {
  Index heads;     // of all batch entries
  Index k_chunks;  // a head; 0 if there are no keys to read
  Index q_chunks;  // a head; 0 if there are no queries to answer
  bool by_head;
  Index slots;  // chunk gradients in flight, if not by head

  [[nodiscard]] static constexpr TttPlan of(Index workers, Index heads, Index k_tokens, Index q_tokens) {
    const auto chunks = [](Index tokens) { return (tokens + ttt_chunk - 1) / ttt_chunk; };
    TttPlan plan{heads, chunks(k_tokens), chunks(q_tokens), true, 0};
    // Four tasks a worker even out; one chunk a head leaves nothing to cut.
    plan.by_head = workers == 1 || heads >= 4 * workers || std::max(plan.k_chunks, plan.q_chunks) <= 1;
    if (!plan.by_head) plan.slots = std::min(heads * plan.k_chunks, 4 * workers);
    return plan;
  }
};

// What one worker needs for one head at a time.
template <class C>
struct TttScratch {
  // To answer queries:
  C* fast = nullptr;        // updated weights; before that, the sum of the chunks' gradients
  C* x = nullptr;           // a tile of keys or queries
  C* activation = nullptr;  // for each chained matrix a tile of what it reads
  C* rows = nullptr;        // a tile of errors or outputs
  ConvTaps<C>* taps = nullptr;
  C* stage = nullptr;
  // To learn from keys:
  C* weights = nullptr;      // projections, then the chained matrices
  C* transposed = nullptr;   // the chained matrices
  C* gradient = nullptr;     // of one chunk
  C* errors = nullptr;       // those of `rows` once more, in panels
  C* derivatives = nullptr;  // of the function, wherever it is applied; then those times the errors there

  [[nodiscard]] static TttScratch take(Carver& carver, const TttShape<C>& shape, bool learns,
                                       const TokenGrid* grid) {
    TttScratch s;
    s.fast = carver.take<C>(shape.size());
    s.x = carver.take<C>(shape.tile());
    s.activation = carver.take<C>(shape.activations());
    s.rows = carver.take<C>(shape.tile());
    if (grid != nullptr) {
      s.taps = carver.take<ConvTaps<C>>(shape.packs);
      s.stage = carver.take<C>(TokenReader<C, C>::stage_rows(*grid) * shape.width);
    }
    if (learns) {
      s.weights = carver.take<C>(shape.size());
      s.transposed = carver.take<C>(shape.chained_size(shape.chained));
      s.gradient = carver.take<C>(shape.size());
      s.errors = carver.take<C>(shape.errors());
      s.derivatives = carver.take<C>(shape.derivatives());
    }
    return s;
  }
};

// The memory of one call: the statistics of the keys, a scratch for each worker and, if chunks are the tasks,
// the gradients in flight and the sums.
template <class C>
struct TttMemory {
  TttShape<C> shape;
  TttPlan plan;
  const TokenGrid* grid;  // null: no conv
  bool learns;
  TokenStats<C> stats{};
  std::byte* workers = nullptr;
  std::size_t worker_size = 0;
  C* slots = nullptr;  // [plan.slots][shape.size()]
  C* sums = nullptr;   // [plan.heads][shape.size()]

  template <class Model, class T, class W>
  [[nodiscard]] static TttMemory take(Carver& carver, Index workers, const TensorView<const T, 4>* k,
                                      const TensorView<const T, 4>* q, const TttOptions<W>& options) {
    const TensorView<const T, 4>& any = k != nullptr ? *k : *q;
    const TttPrologue<W>& prologue = options.prologue;
    const bool convolves =
        (k != nullptr && prologue.k_conv.extent(0) != 0) || (q != nullptr && prologue.q_conv.extent(0) != 0);
    TttMemory m{TttShape<C>::template of<Model>(any.extent(3)),
                TttPlan::of(workers, any.extent(0) * any.extent(2), k != nullptr ? k->extent(1) : 0,
                            q != nullptr ? q->extent(1) : 0),
                convolves ? &prologue.grid : nullptr, k != nullptr};
    if (k != nullptr && prologue.key_norm)
      m.stats = take_token_stats<C>(carver, k->extent(0), k->extent(1), k->extent(2) * k->extent(3));
    Carver one(Workspace{});
    (void)TttScratch<C>::take(one, m.shape, m.learns, m.grid);
    m.worker_size = one.used() / Carver::alignment * Carver::alignment;  // the base is aligned already
    m.workers = carver.take<std::byte>(workers * static_cast<Index>(m.worker_size));
    if (!m.plan.by_head && k != nullptr) {
      m.slots = carver.take<C>(m.plan.slots * m.shape.size());
      m.sums = carver.take<C>(m.plan.heads * m.shape.size());
    }
    return m;
  }

  [[nodiscard]] TttScratch<C> scratch(Index worker) const {
    Carver carver(Workspace{workers + static_cast<std::size_t>(worker) * worker_size, worker_size});
    return TttScratch<C>::take(carver, shape, learns, grid);
  }
};

// Whole packs, as all panels are.
template <class C>
LINATTN_NOINLINE void add_to(C* sum, const C* terms, Index count) {
  for (Index i = 0; i < count; i += Pack<C>::size)
    (Pack<C>::load(sum + i) + Pack<C>::load(terms + i)).store(sum + i);
}

// A reader of the tokens of batch entry b, head h, and its taps in the scratch.
template <class C, class T, class W>
[[nodiscard]] TokenReader<C, T> ttt_reader(const TensorView<const T, 4>& x, Index b, Index h,
                                           const TttShape<C>& shape, const TensorView<const W, 4>& conv,
                                           const TensorView<const W, 1>& bias, const TokenGrid& grid,
                                           const TttScratch<C>& scratch) {
  TokenReader<C, T> reader;
  reader.data = x.pointer(b, 0, h);
  reader.step = x.step(1);
  reader.tokens = x.extent(1);
  reader.head_dim = shape.head_dim;
  reader.width = shape.width;
  if (conv.extent(0) != 0) {
    for (Index c = 0; c < shape.head_dim; c += Pack<C>::size)
      scratch.taps[c / Pack<C>::size] =
          load_conv_taps<C>(conv, bias, h * shape.head_dim + c,
                            static_cast<int>(std::min<Index>(Pack<C>::size, shape.head_dim - c)));
    reader.taps = scratch.taps;
    reader.grid = grid;
    reader.stage = scratch.stage;
  }
  return reader;
}

// The matrices of one head into panels and back; matrix(i) is the i-th as a view [d, d].
template <class Model, class C, class W, class Matrix>
void pack_matrices(const TttShape<C>& shape, const Matrix& matrix, C* panels) {
  if constexpr (Model::projections == 2) {
    pack_pair<C, W>(shape, matrix(0), matrix(1), panels);
  } else {
    pack_matrix<C, W>(shape, matrix(0), panels);
  }
  for (int i = 0; i < Model::chained; ++i)
    pack_matrix<C, W>(shape, matrix(Model::projections + i), panels + shape.chained_at(i));
}
template <class Model, class C, class Matrix>
void unpack_matrices(const TttShape<C>& shape, const C* panels, const Matrix& matrix) {
  for (int i = 0; i < Model::projections; ++i)
    unpack_matrix<C>(shape, panels, i, Model::projections, matrix(i));
  for (int i = 0; i < Model::chained; ++i)
    unpack_matrix<C>(shape, panels + shape.chained_at(i), 0, 1, matrix(Model::projections + i));
}

// Initial weights of head h.
template <class Model, class C, class W>
void pack_weights(const TttWeights<W>& weights, Index h, const TttShape<C>& shape,
                  const TttScratch<C>& scratch) {
  const auto matrix = [&](int i) -> TensorView<const W, 2> { return at(weights[i], h); };
  pack_matrices<Model, C, W>(shape, matrix, scratch.weights);
  for (int i = 0; i < Model::chained; ++i)
    pack_matrix_transposed<C, W>(shape, matrix(Model::projections + i),
                                 scratch.transposed + shape.chained_size(i));
}

// The gradients of one head from the keys and values of one chunk.
template <class Model, class Loss, class C, class T>
void chunk_gradient(const TttShape<C>& shape, TokenReader<C, T>& keys, const T* v, Index v_step, Index first,
                    Index end, const TttScratch<C>& s, C* gradient) {
  std::fill_n(gradient, shape.size(), C(0));
  keys.begin_chunk(first);
  for (Index t = first; t < end; t += ttt_tile) {
    const Index tokens = std::min(ttt_tile, end - t);
    keys.read(t, tokens, s.x);
    const T* const values = v + t * v_step;
    const Index next = t + tokens, calls = shape.key_products();
    Prefetch prefetch{
        keys.ahead(next, calls), Ahead::rows(v, v_step, next, keys.tokens, shape.head_dim, calls), {}};

    if constexpr (Model::has_activation && Model::chained == 0) {
      read_values(shape, values, v_step, tokens, s.rows);
      differentiate_loss<Model, Loss>(shape, s.x, tokens, s.weights, s.rows, s.derivatives, prefetch);
      accumulate_gradient(shape, s.x, tokens, s.derivatives, shape.in_panels, gradient, prefetch);
    } else {
      // Forward. The tile that a matrix reads, the matrix, and the derivatives of the function behind it.
      const auto input = [&](int i) { return i == 0 ? s.x : s.activation + (i - 1) * shape.tile(); };
      const auto weights = [&](int i) { return i == 0 ? s.weights : s.weights + shape.chained_at(i - 1); };
      const auto derivatives = [&](int i) { return s.derivatives + i * shape.tile(); };
      unroll<Model::chained>([&](auto i) {
        activate_and_differentiate<Model>(shape, input(i), tokens, weights(i), input(i + 1), derivatives(i),
                                          prefetch);
      });
      if constexpr (Loss::needs_prediction) {
        read_values(shape, values, v_step, tokens, s.rows);
        predict_errors<Loss>(shape, input(Model::chained), tokens, weights(Model::chained), s.rows, s.errors,
                             prefetch);
      } else {
        read_errors<Loss>(shape, values, v_step, tokens, s.rows, s.errors);
      }

      // Backward, chained matrices first. As rows the errors take the place of what the matrix has read.
      const C* rows = s.rows;
      const C* panels = s.errors;
      unroll<Model::chained>([&](auto step) {
        constexpr int i = Model::chained - 1 - step;
        accumulate_gradient(shape, input(i + 1), tokens, panels, shape.panels(),
                            gradient + shape.chained_at(i), prefetch);
        backpropagate<Model::projections, (i > 0)>(shape, rows, tokens, s.transposed + shape.chained_size(i),
                                                   derivatives(i), input(i + 1), prefetch);
        rows = input(i + 1);
        panels = derivatives(i);
      });
      accumulate_gradient(shape, s.x, tokens, panels, shape.in_panels, gradient, prefetch);
    }
  }
}

// W' = W - rate * sum, in place of the sum; the gradient is factor * sum. The columns of all matrices are
// lanes of their panels.
template <class Step, class C>
LINATTN_NOINLINE void take_step(const TttShape<C>& shape, const C* weights, double inner_lr, double factor,
                                C* sum) {
  using P = Pack<C>;
  const auto rate = [&](C squares) {
    return static_cast<C>(Step::rate(inner_lr, factor, std::sqrt(static_cast<double>(squares))));
  };
  for (Index panel = 0; panel < shape.size(); panel += shape.panel()) {
    for (Index lane = 0; lane < Tile<C>::columns; lane += P::size) {
      const C* w = weights + panel + lane;
      C* g = sum + panel + lane;
      C rates[P::size] = {};  // of the columns; before that, their sums of squares
      if constexpr (Step::needs_column_norm) {
        P squares = P::zero();
        for (Index r = 0; r < shape.head_dim; ++r) {
          const P gradient = P(static_cast<C>(factor)) * P::load(g + r * Tile<C>::columns);
          squares = fma(gradient, gradient, squares);
        }
        squares.store(rates);
      }
      for (C& x : rates) x = rate(x);
      for (Index r = 0; r < padded_rows<C>(shape.head_dim); ++r, w += Tile<C>::columns, g += Tile<C>::columns)
        (P::load(w) - P::load(rates) * P::load(g)).store(g);
    }
  }
}

// out = f(q; W') for the tokens [first, end) of one head.
template <class Model, class C, class T>
void answer_queries(const TttShape<C>& shape, TokenReader<C, T>& queries, T* out, Index out_step, Index first,
                    Index end, const C* fast, const TttScratch<C>& s) {
  queries.begin_chunk(first);
  for (Index t = first; t < end; t += ttt_tile) {
    const Index tokens = std::min(ttt_tile, end - t);
    queries.read(t, tokens, s.x);
    const Index next = t + tokens, calls = shape.query_products();
    Prefetch prefetch{
        queries.ahead(next, calls), {}, Ahead::rows(out, out_step, t, end, shape.head_dim, calls)};
    const C* layer = s.x;
    const C* weights = fast;
    unroll<Model::chained>([&](auto i) {
      C* const activation = s.activation + i * shape.tile();
      activate<Model>(shape, layer, tokens, weights, activation, prefetch);
      layer = activation;
      weights = fast + shape.chained_at(i);
    });
    if constexpr (Model::has_activation && Model::chained == 0) {
      activate<Model>(shape, layer, tokens, weights, s.rows, prefetch);
    } else {
      multiply_rows(shape, layer, tokens, weights, s.rows, prefetch);
    }
    write_rows(shape, s.rows, tokens, out + t * out_step, out_step);
  }
}

// The two halves of a call, each for one head and a range of its chunks.
template <class Model, class Loss, class Step, class T, class W>
struct TttLearner {
  using C = Compute<T>;
  const TensorView<const T, 4>& k;
  const TensorView<const T, 4>& v;
  const TttWeights<W>& weights;
  const TttOptions<W>& options;
  const TttMemory<C>& memory;

  [[nodiscard]] TokenReader<C, T> reader(Index b, Index h, const TttScratch<C>& s) const {
    const TttPrologue<W>& p = options.prologue;
    TokenReader<C, T> keys = ttt_reader<C, T, W>(k, b, h, memory.shape, p.k_conv, p.k_conv_bias, p.grid, s);
    if (p.key_norm) {
      const Index channel = (b * k.extent(2) + h) * k.extent(3);
      keys.shift = memory.stats.shift + channel;
      keys.delta = memory.stats.delta + channel;
      keys.scale = memory.stats.scale + channel;
    }
    return keys;
  }

  void gradient(Index b, Index h, TokenReader<C, T>& keys, Index chunk, const TttScratch<C>& s, C* to) const {
    const Index first = chunk * ttt_chunk;
    chunk_gradient<Model, Loss>(memory.shape, keys, v.pointer(b, 0, h), v.step(1), first,
                                std::min(first + ttt_chunk, k.extent(1)), s, to);
  }

  // The sum of the gradients becomes the updated weights; the packed weights are those of the head.
  void step(const TttScratch<C>& s, C* sum) const {
    const double scale = options.scale.value_or(1.0 / std::sqrt(static_cast<double>(memory.shape.head_dim)));
    take_step<Step>(memory.shape, s.weights, options.inner_lr, scale / static_cast<double>(k.extent(1)), sum);
  }

  // All chunks of one head: its updated weights in s.fast.
  void learn(Index b, Index h, const TttScratch<C>& s) const {
    pack_weights<Model>(weights, h, memory.shape, s);
    TokenReader<C, T> keys = reader(b, h, s);
    std::fill_n(s.fast, memory.shape.size(), C(0));
    for (Index chunk = 0; chunk < memory.plan.k_chunks; ++chunk) {
      gradient(b, h, keys, chunk, s, s.gradient);
      add_to(s.fast, s.gradient, memory.shape.size());
    }
    step(s, s.fast);
  }

  // All heads by chunks: the sums of the gradients in memory.sums. Slots are filled in waves and added in
  // order.
  template <ParallelPolicy P>
  void sum_gradients(const P& parallel) const {
    const Index size = memory.shape.size(), chunks = memory.plan.k_chunks, heads = k.extent(2);
    std::fill_n(memory.sums, memory.plan.heads * size, C(0));
    for (Index wave = 0; wave < memory.plan.heads * chunks; wave += memory.plan.slots) {
      const Index count = std::min(memory.plan.slots, memory.plan.heads * chunks - wave);
      parallel.run(count, [&](Index task, Index worker) {
        const Index head = (wave + task) / chunks, b = head / heads, h = head % heads;
        const TttScratch<C> s = memory.scratch(worker);
        pack_weights<Model>(weights, h, memory.shape, s);
        TokenReader<C, T> keys = reader(b, h, s);
        gradient(b, h, keys, (wave + task) % chunks, s, memory.slots + task * size);
      });
      const Index panel = memory.shape.panel();
      parallel.run(size / panel, [&](Index task, Index) {
        for (Index i = 0; i < count; ++i)
          add_to(memory.sums + (wave + i) / chunks * size + task * panel,
                 memory.slots + i * size + task * panel, panel);
      });
    }
  }
};

template <class Model, class T, class W>
struct TttAnswerer {
  using C = Compute<T>;
  const TensorView<const T, 4>& q;
  const TensorView<T, 4>& out;
  const TttOptions<W>& options;
  const TttMemory<C>& memory;

  // Chunks [begin, end) of one head, with the weights in panels.
  void answer(Index b, Index h, Index begin, Index end, const C* fast, const TttScratch<C>& s) const {
    const TttPrologue<W>& p = options.prologue;
    TokenReader<C, T> queries =
        ttt_reader<C, T, W>(q, b, h, memory.shape, p.q_conv, p.q_conv_bias, p.grid, s);
    for (Index chunk = begin; chunk < end; ++chunk) {
      const Index first = chunk * ttt_chunk;
      answer_queries<Model>(memory.shape, queries, out.pointer(b, 0, h), out.step(1), first,
                            std::min(first + ttt_chunk, q.extent(1)), fast, s);
    }
  }
};

}  // namespace detail::inline LINATTN_TARGET

inline namespace LINATTN_TARGET {

// Bytes of scratch: a set of tiles and weights a worker, and for the prologue the statistics of the keys and
// two rows of the grid a worker; it does not grow with the tokens.
template <InnerModel Model = SwiGlu, InnerLoss Loss = InnerProduct, InnerStep Step = Plain, ParallelPolicy P,
          Storage T, Storage W>
[[nodiscard]] std::size_t ttt_workspace(const Cpu<P>& ctx, In<T, 4> q, In<T, 4> k, In<T, 4>,
                                        const TttWeights<W>&, const TensorView<T, 4>&,
                                        const std::type_identity_t<TttOptions<W>>& options = {}) {
  Carver carver(Workspace{});
  (void)detail::TttMemory<Compute<T>>::template take<Model, T, W>(
      carver, static_cast<Index>(ctx.parallel.workers()), &k, &q, options);
  return carver.used();
}

// out = f(q; W - inner_lr * dl/dW (k, v)). See ttt.hpp.
template <InnerModel Model = SwiGlu, InnerLoss Loss = InnerProduct, InnerStep Step = Plain, ParallelPolicy P,
          Storage T, Storage W>
[[nodiscard]] Status ttt(const Cpu<P>& ctx, In<T, 4> q, In<T, 4> k, In<T, 4> v, const TttWeights<W>& weights,
                         const TensorView<T, 4>& out,
                         const std::type_identity_t<TttOptions<W>>& options = {}) {
  using C = Compute<T>;
  const Status status = detail::check_ttt<Model, T, W>(q, k, v, weights, out, options);
  if (!status.ok()) return status;
  Carver carver(ctx.workspace);
  const auto memory = detail::TttMemory<C>::template take<Model, T, W>(
      carver, static_cast<Index>(ctx.parallel.workers()), &k, &q, options);
  const Status space = carver.check("ttt, workspace");
  if (!space.ok()) return space;

  if (options.prologue.key_norm)
    detail::token_stats<C, T>(ctx.parallel, k, options.prologue.key_norm_eps, true, memory.stats);
  const detail::TttLearner<Model, Loss, Step, T, W> learner{k, v, weights, options, memory};
  const detail::TttAnswerer<Model, T, W> answerer{q, out, options, memory};
  const Index heads = q.extent(2), size = memory.shape.size(), chunks = memory.plan.q_chunks;
  if (memory.plan.by_head) {
    ctx.parallel.run(memory.plan.heads, [&](Index task, Index worker) {
      const Index b = task / heads, h = task % heads;
      const detail::TttScratch<C> s = memory.scratch(worker);
      learner.learn(b, h, s);
      answerer.answer(b, h, 0, chunks, s.fast, s);
    });
    return {};
  }
  learner.sum_gradients(ctx.parallel);
  ctx.parallel.run(memory.plan.heads, [&](Index task, Index worker) {
    const detail::TttScratch<C> s = memory.scratch(worker);
    detail::pack_weights<Model>(weights, task % heads, memory.shape, s);
    learner.step(s, memory.sums + task * size);
  });
  ctx.parallel.run(memory.plan.heads * chunks, [&](Index task, Index worker) {
    const Index head = task / chunks, chunk = task % chunks;
    answerer.answer(head / heads, head % heads, chunk, chunk + 1, memory.sums + head * size,
                    memory.scratch(worker));
  });
  return {};
}

template <InnerModel Model = SwiGlu, InnerLoss Loss = InnerProduct, InnerStep Step = Plain, ParallelPolicy P,
          class T, Storage W>
[[nodiscard]] std::size_t ttt_update_workspace(const Cpu<P>& ctx, const TensorView<T, 4>& k,
                                               In<std::remove_const_t<T>, 4>, const TttWeights<W>&,
                                               const FastWeights<Compute<T>>&,
                                               const std::type_identity_t<TttOptions<W>>& options = {}) {
  using Key = std::remove_const_t<T>;
  const TensorView<const Key, 4> keys = k;
  Carver carver(Workspace{});
  (void)detail::TttMemory<Compute<T>>::template take<Model, Key, W>(
      carver, static_cast<Index>(ctx.parallel.workers()), &keys, nullptr, options);
  return carver.used();
}

// fast_weights = W - inner_lr * dl/dW (k, v), for each batch entry and head. T is that of k. See ttt.hpp.
template <InnerModel Model = SwiGlu, InnerLoss Loss = InnerProduct, InnerStep Step = Plain, ParallelPolicy P,
          class T, Storage W>
[[nodiscard]] Status ttt_update(const Cpu<P>& ctx, const TensorView<T, 4>& k, In<std::remove_const_t<T>, 4> v,
                                const TttWeights<W>& weights, const FastWeights<Compute<T>>& fast_weights,
                                const std::type_identity_t<TttOptions<W>>& options = {}) {
  using C = Compute<T>;
  using Key = std::remove_const_t<T>;
  const TensorView<const Key, 4> keys = k;
  const Status status = detail::check_ttt_update<Model, Key, W>(keys, v, weights, fast_weights, options);
  if (!status.ok()) return status;
  Carver carver(ctx.workspace);
  const auto memory = detail::TttMemory<C>::template take<Model, Key, W>(
      carver, static_cast<Index>(ctx.parallel.workers()), &keys, nullptr, options);
  const Status space = carver.check("ttt_update, workspace");
  if (!space.ok()) return space;

  if (options.prologue.key_norm)
    detail::token_stats<C, Key>(ctx.parallel, keys, options.prologue.key_norm_eps, true, memory.stats);
  const detail::TttLearner<Model, Loss, Step, Key, W> learner{keys, v, weights, options, memory};
  if (!memory.plan.by_head) learner.sum_gradients(ctx.parallel);
  ctx.parallel.run(memory.plan.heads, [&](Index task, Index worker) {
    const Index b = task / k.extent(2), h = task % k.extent(2);
    const detail::TttScratch<C> s = memory.scratch(worker);
    C* fast = s.fast;
    if (memory.plan.by_head) {
      learner.learn(b, h, s);
    } else {
      fast = memory.sums + task * memory.shape.size();
      detail::pack_weights<Model>(weights, h, memory.shape, s);
      learner.step(s, fast);
    }
    const auto matrix = [&](int i) { return at(at(fast_weights[i], b), h); };
    detail::unpack_matrices<Model>(memory.shape, fast, matrix);
  });
  return {};
}

template <InnerModel Model = SwiGlu, ParallelPolicy P, Storage T, Storage W = T>
[[nodiscard]] std::size_t ttt_apply_workspace(const Cpu<P>& ctx, In<T, 4> q,
                                              const std::type_identity_t<FastWeights<const Compute<T>>>&,
                                              const TensorView<T, 4>&, const TttOptions<W>& options = {}) {
  Carver carver(Workspace{});
  (void)detail::TttMemory<Compute<T>>::template take<Model, T, W>(
      carver, static_cast<Index>(ctx.parallel.workers()), nullptr, &q, options);
  return carver.used();
}

// out = f(q; fast_weights). Of the options only the prologue's part for q matters. See ttt.hpp.
template <InnerModel Model = SwiGlu, ParallelPolicy P, Storage T, Storage W = T>
[[nodiscard]] Status ttt_apply(const Cpu<P>& ctx, In<T, 4> q,
                               const std::type_identity_t<FastWeights<const Compute<T>>>& fast_weights,
                               const TensorView<T, 4>& out, const TttOptions<W>& options = {}) {
  using C = Compute<T>;
  const Status status = detail::check_ttt_apply<Model, T, W>(q, fast_weights, out, options);
  if (!status.ok()) return status;
  Carver carver(ctx.workspace);
  const auto memory = detail::TttMemory<C>::template take<Model, T, W>(
      carver, static_cast<Index>(ctx.parallel.workers()), nullptr, &q, options);
  const Status space = carver.check("ttt_apply, workspace");
  if (!space.ok()) return space;

  const detail::TttAnswerer<Model, T, W> answerer{q, out, options, memory};
  const Index heads = q.extent(2), all = memory.plan.q_chunks, chunks = memory.plan.by_head ? all : 1;
  const Index tasks = all / chunks;
  ctx.parallel.run(memory.plan.heads * tasks, [&](Index task, Index worker) {
    const Index head = task / tasks, first = task % tasks * chunks;
    const detail::TttScratch<C> s = memory.scratch(worker);
    const auto matrix = [&](int i) { return at(at(fast_weights[i], head / heads), head % heads); };
    detail::pack_matrices<Model, C, C>(memory.shape, matrix, s.fast);
    answerer.answer(head / heads, head % heads, first, first + chunks, s.fast, s);
  });
  return {};
}

}  // namespace LINATTN_TARGET
LINATTN_END
