// Backward of a whole problem: workspace, passes, items, and the sums over items. It includes both kinds of
// items, chunked/ and recurrent/, and instances/ alone includes it.
#pragma once

#include "cpu/chunked/backward_sweeps.h"
#include "cpu/drive_state.h"
#include "cpu/recurrent/backward.h"

namespace rebased::cpu::REBASED_ISA {

// The gradients of gamma and beta: sums the items' rows in order. rows: [item][per_item][2][feature_dim],
// where the head of a row is kv_head * per_item + its place within the item.
template <class T>
inline void sum_affine(const Sizes<T>& s, const T* rows, int64_t items, int64_t kv_heads, int64_t per_item,
                       const Affine& affine, const AffineGradient& gradient) {
  const int d = s.feature_dim;
  for (int which = 0; which < 2; which++) {
    T* target = static_cast<T*>(which == 0 ? gradient.gamma : gradient.beta);
    if (!target) continue;
    const int64_t head_stride = which == 0 ? affine.gamma_head_stride : affine.beta_head_stride;
    const int64_t heads = kv_heads * per_item;
    for (int64_t i = 0; i < (head_stride ? heads : 1) * d; i++) target[i] = 0;
    for (int64_t item = 0; item < items; item++)
      for (int64_t place = 0; place < per_item; place++) {
        T* sum = target + (item % kv_heads * per_item + place) * head_stride;
        const T* row = rows + ((item * per_item + place) * 2 + which) * d;
        for (int e = 0; e < d; e++) sum[e] += row[e];
      }
  }
}

// The end of LayerNorm::token's backward, which needs all heads of a token.
template <class T, class BackwardCall>
inline void finish_token_gradients(const BackwardCall& call, const Parallel& parallel) {
  const BackwardProblem& p = call.problem;
  const int64_t rows = Call<T>::kRowsOfItem, parts = (p.seqlen + rows - 1) / rows,
                tokens = p.batch * p.seqlen;
  for_items(parallel, 2 * p.batch * parts, [&](int64_t item, int) {
    const bool query = item < p.batch * parts;
    if (query ? !p.wants_queries() : !p.wants_keys()) return;
    const int64_t batch = item / parts % p.batch, begin = item % parts * rows;
    const T* mean = call.statistics + (query ? 0 : 2) * tokens + batch * p.seqlen;
    const MutableRows& written = query ? call.query_target : call.key_target;
    const ConstRows source{written.data, written.batch_stride, written.head_stride, written.row_stride};
    with_element<T>(p.dtype, [&](auto element) {
      using E = typename decltype(element)::type;
      const auto finish = [&](auto source_element) {
        using S = typename decltype(source_element)::type;
        finish_token_gradient<T, S, E>(query ? p.q : p.k, source, query ? p.grad_q : p.grad_k, batch,
                                       query ? p.heads : p.kv_heads, call.sizes.feature_dim, begin,
                                       smaller(begin + rows, p.seqlen), mean, mean + tokens);
      };
      if (call.accumulator_target)
        finish(ElementType<T>{});
      else
        finish(element);
    });
  });
}

// Returns the workspace's bytes where `parallel` is null, else 0.
template <class T, class BackwardCall>
inline int64_t run_backward_as(const BackwardProblem& p, int threads, const Parallel* parallel) {
  if (p.part == BackwardPart::reverse_state) return run_reverse_state<T, BackwardCall>(p, threads, parallel);
  Arena arena = workspace_of(p, parallel);
  const bool needs_state = p.initial_state.kv || p.grad_final_state.kv || p.grad_initial_state.kv;
  const int64_t parts = p.part == BackwardPart::all ? 2 : 1;
  BackwardCall call(p, threads, arena, needs_state, parts);
  const Sizes<T>& s = call.sizes;
  const Schedule<T>& schedule = call.schedule;
  const int64_t most_items = Schedule<T>::bound(p, s, threads, parts) * p.kv_heads;
  T* key_states = call.take_states(arena, most_items);
  T* query_states = call.take_states(arena, most_items);
  call.query_affine = arena.take<T>(most_items * call.group() * 2 * s.feature_dim);
  const int64_t key_affine_size = most_items * 2 * s.feature_dim;
  call.key_affine = arena.take<T>(key_affine_size), call.shared_key_affine = arena.take<T>(key_affine_size);
  const Scratches scratches(arena, [&](Arena& own) { return call.scratch(own); });
  if (!parallel) return scratches.workspace_bytes(threads);

  const auto item_of = [&](int64_t number) {  // part 0: of keys, 1: of queries
    Item item = schedule.item(number);
    if (!p.wants_keys()) item.part = 1;
    return item;
  };
  call.compute_statistics(*parallel);
  if (schedule.cut()) {
    for_items(*parallel, schedule.items(), [&](int64_t number, int worker) {
      const Item item = item_of(number);
      if (item.quadratic) return;
      if (item.part == 0 && !item.first)
        call.local_query_state(item, scratches(worker), query_states + item.number * s.state_size);
      if (item.part == 1 && !item.last)
        call.local_key_state(item, scratches(worker), key_states + item.number * s.state_size);
    });
    if (p.wants_queries()) call.sum_states(*parallel, key_states, p.initial_state, false);
    if (p.wants_keys()) call.sum_states(*parallel, query_states, p.grad_final_state, true);
  }
  for (int64_t i = 0; i < key_affine_size; i++) call.shared_key_affine[i] = 0;
  const int64_t together = call.heads_together(threads);
  for_items(*parallel, schedule.items() / together, [&](int64_t number, int worker) {
    Item first = schedule.run_of_heads(number, together);
    if (!p.wants_keys()) first.part = 1;
    // the state before an item's queries, or after its keys
    call.run(first, together, scratches(worker), [&](const Item& item, bool queries, T* state) {
      return queries ? call.take_start_state(item, item.first, p.initial_state, key_states, state)
                     : call.take_start_state(item, item.last, p.grad_final_state, query_states, state);
    });
  });
  sum_affine(s, call.query_affine, schedule.heads(), p.kv_heads, call.group(), p.query_affine,
             p.grad_query_affine);
  for (int64_t i = 0; i < schedule.heads() * 2 * s.feature_dim && p.wants_keys(); i++)
    call.key_affine[i] += call.shared_key_affine[i];
  sum_affine(s, call.key_affine, schedule.heads(), p.kv_heads, 1, p.key_affine, p.grad_key_affine);
  if (p.layer_norm == LayerNorm::token) finish_token_gradients<T>(call, *parallel);
  call.zero_unowned_rows(p.grad_q, p.heads, p.feature_dim);
  call.zero_unowned_rows(p.grad_k, p.kv_heads, p.feature_dim);
  call.zero_unowned_rows(p.grad_v, p.kv_heads, p.head_dim);
  return 0;
}

template <class T>
inline int64_t run_backward(const BackwardProblem& p, int threads, const Parallel* parallel) {
  return is_elementwise(p) ? run_backward_as<T, ElementwiseBackward<T>>(p, threads, parallel)
                           : run_backward_as<T, BackwardSweeps<T>>(p, threads, parallel);
}

}  // namespace rebased::cpu::REBASED_ISA
