// Checks every instance of the tensor-core path against scalar_reference.h: maps, feature dims, LayerNorms,
// widths, rows in pieces, segments, grouped heads, packed sequences and states, where the path is forced and
// where the plan chooses it. run_cases.h says which arguments the program takes.
#include "op/feature_map.h"
#include "tests/run_cases.h"

namespace {

using namespace rebased;
using namespace rebased::tests;

// Cases whose rows all lie at multiples of 16 bytes, or `narrow` ones, whose rows come in smaller pieces.
void add_cases(FeatureMap map, int64_t dim, bool narrow, std::vector<Case>* all) {
  Case c;
  c.map = map, c.dtype = Dtype::bfloat16, c.dim = dim, c.path = Path::tensor_core;
  c.scale = 0.25, c.eps = 1;  // y of a first score far below eps would be all rounding of q' and k'
  c.normalize = map != FeatureMap::identity;  // q' and k' of any sign have denominators near 0
  c.packed_heads = true;                      // x.view(B, N, H, d).transpose(1, 2)
  struct Sizes {
    int64_t batch, kv_heads, group, seqlen, width;
    int segments;  // 0 leaves the number to the plan
  };
  const auto add = [&](LayerNorm norm, const Sizes& size, bool affine, bool states) {
    Case next = c;
    next.norm = norm, next.gamma = next.beta = affine, next.states = states;
    next.batch = size.batch, next.kv_heads = size.kv_heads, next.group = size.group;
    next.seqlen = size.seqlen, next.width = size.width;
    next.plan.segments = size.segments;
    if (size.segments) next.plan.force_path = true, next.plan.path = Path::tensor_core;
    all->push_back(next);
    return &all->back();
  };
  const LayerNorm none = LayerNorm::none, head = LayerNorm::head, token = LayerNorm::token;
  if (narrow) {
    // with an odd padding q and k too begin in the middle of words
    add(token, {1, 2, 1, 150, 5, 2}, true, true);
    add(head, {1, 2, 2, 100, 12, 1}, true, true);
    add(head, {1, 2, 1, 70, 42, 0}, true, true)->padding = 2;
    add(head, {2, 1, 2, 130, 21, 2}, true, true)->padding = 1;
    add(none, {1, 2, 1, 97, 130, 0}, true, true)->padding = 3;
    add(head, {1, 1, 1, 66, 255, 1}, true, true)->packed_heads = false;
    add(head, {1, 1, 3, 65, 1, 0}, true, true)->padding = 1;
    return;
  }
  add(head, {1, 1, 1, 64, 64, 1}, false, false);
  add(head, {2, 2, 1, 150, 64, 1}, true, true);
  add(none, {1, 1, 1, 300, 64, 2}, true, true);
  add(token, {1, 2, 1, 259, 64, 3}, true, false)->packed_heads = false;
  add(head, {1, 1, 1, 600, 16, 9}, true, false);  // more segments than blocks sum by themselves
  add(head, {2, 2, 1, 1, 64, 1}, false, true);
  add(head, {1, 1, 1, 70, 64, 4}, true, true)->normalize = false;
  add(head, {1, 2, 1, 100, 16, 1}, true, true)->padding = 8;
  add(head, {1, 1, 1, 140, 208, 2}, true, true);
  add(head, {2, 2, 3, 130, 64, 2}, true, true)->shared_affine = true;
  add(head, {1, 1, 2, 200, 80, 2}, true, true)->cu_seqlens = {0, 70, 70, 73, 200};
  // large v beside small grad y
  add(head, {1, 1, 1, 320, 64, 2}, true, false)->value_size = 300;
  if (is_polynomial(map) && dim <= 16) {  // a device whose blocks walk shorter chunks
    constexpr int64_t shared_memory = 163 << 10;
    add(token, {1, 2, 1, 259, 64, 3}, true, true)->plan.shared_memory_per_block = shared_memory;
    add(head, {2, 2, 3, 130, 64, 2}, true, true)->plan.shared_memory_per_block = shared_memory;
  }
  // what the plan chooses by itself; packed, with rows before, between and after the sequences
  add(token, {2, 2, 2, 90, 32, 0}, true, true);
  add(token, {1, 3, 1, 150, 16, 0}, true, true)->cu_seqlens = {5, 80, 60, 140, 133};
  add(head, {1, 1, 1, 1100, 16, 0}, true, true);  // in two segments
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const bool narrow : {false, true}) {
    for (const FeatureMap map :
         {FeatureMap::outer, FeatureMap::square, FeatureMap::taylor, FeatureMap::elu, FeatureMap::identity}) {
      add_cases(map, 16, narrow, &all);
    }
    for (const int64_t dim : {8, 32}) add_cases(FeatureMap::outer, dim, narrow, &all);
  }
  for (size_t i = 0, count = all.size(); i < count; ++i) {
    // there is one such case of every instance, with states
    if (all[i].seqlen != 1 || !all[i].normalize) continue;
    Case c = all[i];
    c.negative = c.gamma = c.beta = true;
    c.batch = c.kv_heads = 1, c.group = 2, c.seqlen = 16;
    all.push_back(c);
  }
  return all;
}

}  // namespace

int main(int count, char** arguments) { return run_cases(cases(), false, count, arguments); }
