// The launch configurations that the plan can choose: every shape of the contract is asked for its plan.
#include "cuda/plan/configurations.h"

#include <algorithm>
#include <map>
#include <utility>

#include "cuda/plan/plan.h"
#include "op/backend.h"

namespace rebased {
namespace {

template <class AnyProblem>
AnyProblem problem_of(const Shape& shape) {
  alignas(16) static const char present[16] = {};
  AnyProblem p{};
  p.batch = 1, p.heads = shape.heads, p.kv_heads = shape.kv_heads, p.seqlen = shape.seqlen;
  p.feature_dim = shape.feature_dim, p.head_dim = shape.head_dim;
  p.num_sequences = shape.sequences ? shape.sequences : 1;
  p.cu_seqlens = shape.sequences ? reinterpret_cast<const int64_t*>(present) : nullptr;
  p.dtype = shape.dtype, p.feature_map = shape.feature_map, p.layer_norm = LayerNorm::none;
  p.normalize = true;
  const auto rows = [&](int64_t heads, int64_t width) {
    return ConstRows{present, heads * shape.seqlen * width, shape.seqlen * width, width};
  };
  p.q = rows(shape.heads, shape.feature_dim);
  p.k = rows(shape.kv_heads, shape.feature_dim);
  p.v = rows(shape.kv_heads, shape.head_dim);
  if (!shape.aligned) p.q.data = present + 1;
  return p;
}

// The plan of the shape's call, and the text of it, empty where there is none.
std::pair<Plan, std::string> planned(const Shape& shape) {
  const Device device{shape.multiprocessors, 90, shape.shared_memory_per_block};
  static char present[1];
  const auto described = [](const auto& problem, const Plan& plan) {
    return std::pair(plan, *plan.error ? std::string() : launch_configuration(problem, plan));
  };
  if (shape.direction == Direction::forward) {
    auto p = problem_of<ForwardProblem>(shape);
    if (shape.state) p.final_state = {present, present};
    return described(p, make_plan(p, device));
  }
  if (shape.direction == Direction::backward) {
    auto p = problem_of<BackwardProblem>(shape);
    if (shape.state) p.grad_final_state = {present, present};
    return described(p, make_plan(p, device));
  }
  const auto p = problem_of<StepProblem>(shape);
  return described(p, make_plan(p, device));
}

// About how many operations the call takes.
int64_t work_of(const Shape& shape) {
  const int64_t d = shape.feature_dim, dv = shape.head_dim;
  const int64_t state = std::max<int64_t>(num_features(shape.feature_map, d) * dv, 256);
  return shape.seqlen * shape.heads * (state + 64 * (d + dv));
}

// Whether the call's results are a few numbers, or its sequence does not fill a chunk, so that some threads
// have no row.
bool says_little(const Shape& shape, const Plan& plan) {
  const bool fills_no_chunk = shape.direction != Direction::step && shape.seqlen <= plan.tiles.chunk;
  return shape.feature_dim < 5 || shape.head_dim < 3 || fills_no_chunk;
}

class Found {
 public:
  void add(const Shape& shape) {
    const auto [plan, text] = planned(shape);
    if (text.empty()) return;
    const Configuration configuration{text, shape, says_little(shape, plan), work_of(shape)};
    const auto [position, is_new] = found_.try_emplace(text, configuration);
    if (!is_new && rank(configuration) < rank(position->second)) position->second = configuration;
  }
  const std::map<std::string, Configuration>& all() const { return found_; }

 private:
  static std::pair<bool, int64_t> rank(const Configuration& x) { return {x.says_little, x.work}; }
  std::map<std::string, Configuration> found_;
};

// All sizes of the contract, of one short sequence: every choice but that of segments and of what goes with
// their length. Tiles hold whole quads of columns, so that of four widths the first and the last will do, and
// for the pieces in which bfloat16 rows are read the second.
// Calls that need no state take the kernels without one only where these are cheaper: some of those fill
// chunks.
void add_short_sequences(int64_t shared_memory_per_block, Found* found) {
  constexpr int64_t widest_of_fixed_kernels = 32;  // feature dims past these take kernels for any size
  Shape shape{};
  shape.shared_memory_per_block = shared_memory_per_block, shape.multiprocessors = 1;
  shape.seqlen = 5, shape.kv_heads = 1;
  const auto add_calls = [&](bool fixed) {
    for (const int64_t group : {1, 2, 3, 4, 17}) {
      shape.heads = group, shape.state = shape.aligned = true;
      shape.direction = Direction::step;
      found->add(shape);
      if (group == 3 || group == 4 || (group == 17 && !fixed)) continue;  // like 2 but in a step
      for (const Direction direction : {Direction::forward, Direction::backward}) {
        for (const bool state : {false, true}) {
          for (const bool aligned : {true, false}) {
            if (!aligned && !fixed) continue;
            shape.direction = direction, shape.state = state, shape.aligned = aligned;
            for (const int64_t seqlen : {5, 36, 72}) {
              shape.seqlen = seqlen;
              if (seqlen == 5 || (!state && shape.head_dim % 4 == 0)) found->add(shape);
            }
            shape.seqlen = 5;
          }
        }
      }
    }
  };
  for (const Dtype dtype : {Dtype::float32, Dtype::float64, Dtype::float16, Dtype::bfloat16}) {
    for (const FeatureMap map :
         {FeatureMap::outer, FeatureMap::square, FeatureMap::taylor, FeatureMap::elu, FeatureMap::identity}) {
      for (int64_t d = 1; d <= 128; ++d) {
        const bool fixed = d <= widest_of_fixed_kernels;
        // kernels for any size know these from square by the features' values alone
        if (!fixed && (map == FeatureMap::elu || map == FeatureMap::identity)) continue;
        shape.dtype = dtype, shape.feature_map = map, shape.feature_dim = d;
        for (int64_t quad = 0; quad < 256; quad += 4) {
          for (const int64_t dv : {quad + 1, quad + 2, quad + 4}) {
            if (dv == quad + 2 && dtype != Dtype::bfloat16) continue;
            shape.head_dim = dv;
            add_calls(fixed);
          }
        }
      }
    }
  }
}

// Each of `short_ones` with sequences of other lengths, packed or not, on devices of other sizes. The plan
// cuts segments of at least eight chunks, or of 512 or 1024 rows, and more than eight are many; sums are
// compensated in segments longer than compensated_rows, nine of which take two blocks on each of five
// multiprocessors.
void add_lengths(const Found& short_ones, Found* found) {
  std::vector<int64_t> lengths = {5};
  for (int64_t n = 32; n <= 8192; n *= 2) {
    for (const int64_t rows : {n, n + n / 8}) {
      lengths.push_back(rows);
      if (rows % compensated_rows == 0) lengths.push_back(rows + 1);
    }
  }
  lengths.push_back(10 * compensated_rows + 1);
  for (const auto& [text, configuration] : short_ones.all()) {
    Shape shape = configuration.example;
    if (shape.direction == Direction::step) continue;
    const int64_t group = shape.heads;
    for (const int64_t kv_heads : {1, 2}) {
      for (const int multiprocessors : {1, 5, 132}) {
        for (const int64_t sequences : {0, 1}) {
          for (const int64_t seqlen : lengths) {
            shape.kv_heads = kv_heads, shape.heads = kv_heads * group;
            shape.multiprocessors = multiprocessors, shape.sequences = sequences, shape.seqlen = seqlen;
            found->add(shape);
          }
        }
      }
    }
  }
}

}  // namespace

std::vector<Configuration> reachable_configurations(int64_t shared_memory_per_block) {
  Found short_ones;
  add_short_sequences(shared_memory_per_block, &short_ones);
  Found found = short_ones;
  add_lengths(short_ones, &found);
  std::vector<Configuration> result;
  for (const auto& [text, configuration] : found.all()) result.push_back(configuration);
  return result;
}

}  // namespace rebased
