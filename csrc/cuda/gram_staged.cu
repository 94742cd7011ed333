// SPDX-License-Identifier: MIT
// Many tasks: the rows go once from global to shared memory, kStages steps of columns ahead. Each warp keeps the
// products of 16 rows, blocks 2 r and 2 r + 1, with themselves and the blocks after them in a circle, half way round:
// every pair of tasks once, and all warps have as much to do.
#include "cuda/tiles.cuh"

namespace gs::gpu {
namespace {

constexpr int kStages = 4;
constexpr int kWarps = 8;
constexpr int kMostTiles = 10;  // of 16 x 8 products, of a warp
constexpr int kRows = 16;
// With so many tasks a block holds all pairs, and a stage two vectors per row and lane instead of one.
constexpr int kMaxTasks = kRows * kWarps;

// How the warps share the pairs of tasks.
struct Split {
  int circle;            // row blocks of 16
  int row_parts, parts;  // blocks for a slot: first by rows, then by tiles
  int shares, splits;    // of a block: row blocks, warps for each of them
  int halves;            // vectors per row and lane of a stage

  GS_HOST_DEVICE explicit Split(int num_tasks) {
    circle = (num_tasks + kRows - 1) / kRows;
    row_parts = (circle + kWarps - 1) / kWarps;
    parts = row_parts * ((tiles_of(0) + kMostTiles - 1) / kMostTiles);
    shares = (circle + row_parts - 1) / row_parts;
    halves = num_tasks <= kMaxTasks ? 2 : 1;
    splits = 2 * shares <= kWarps ? halves : 1;
  }
  // Of half a stage. Rows past the last task are never written, nor their products.
  GS_HOST_DEVICE int half_vectors() const { return circle * kRows * kRowLanes; }
  // The tiles of a row block: its own two, and two for each of the row blocks up to the one opposite, whose products
  // with this one go to the first of the two.
  GS_HOST_DEVICE int tiles_of(int share) const {
    return circle % 2 ? circle + 1 : share < circle / 2 ? circle + 2 : circle;
  }
};

// In a row of a stage, vector c is at c ^ swizzle_of(row), so that 8 rows of one vector meet all banks.
GS_DEVICE int swizzle_of(int row) { return row / 2 % kRowLanes; }

// Copies the stages of a slot, through all of its pieces: whole steps, then the rest. A stage holds [halves][rows]
// [kRowLanes] vectors, of which a thread always copies the same ones.
template <class In>
class Copier {
  using Rows = Piece<In, kRowLanes>;

 public:
  GS_DEVICE Copier(const Table& table, int slot, int num_tasks, const Split& split)
      : table_(table),
        slot_(slot),
        num_tasks_(num_tasks),
        halves_(split.halves),
        padding_(split.half_vectors() - num_tasks * kRowLanes) {
    const Slot own(table, slot);
    param_ = static_cast<int>(own.first_param());
    open(own);
  }
  GS_DEVICE bool done() const { return stages_ == 0; }

  GS_DEVICE void fill(Vector<In>* stage) {
    if (index_ >= whole_) {
      fill_rest(stage);
    } else if (aligned_) {
#pragma unroll
      for (int c = 0; c < kCopies; c++) {
        if (source_[c]) {
          copy_to_shared(stage + place(c), reinterpret_cast<const Vector<In>*>(source_[c]));
          source_[c] += halves_ * Rows::kStep;
        } else if (is_mine(c)) {
          stage[place(c)] = {};
        }
      }
    } else {
#pragma unroll
      for (int c = 0; c < kCopies; c++) {
        Vector<In> vector = {};
        for (int e = 0; e < kVector<In> && source_[c]; e++) vector.set(e, source_[c][e * kRowLanes]);
        if (is_mine(c)) stage[place(c)] = vector;
        if (source_[c]) source_[c] += halves_ * Rows::kStep;
      }
    }
    if (++index_ < stages_) return;
    param_++;
    open(Slot(table_, slot_));
  }

 private:
  static constexpr int kCopies = 4;  // at most kMaxTasks rows of 2 halves, or more of one, by a thread for 8 of 16 rows

  GS_DEVICE int vector(int c) const { return thread() + c * threads(); }
  GS_DEVICE bool is_mine(int c) const { return vector(c) < num_tasks_ * kRowLanes * halves_; }
  GS_DEVICE int half(int c) const { return vector(c) >= num_tasks_ * kRowLanes; }
  GS_DEVICE int place(int c) const { return (vector(c) ^ swizzle_of(row(c))) + half(c) * padding_; }
  GS_DEVICE int row(int c) const { return vector(c) / kRowLanes - half(c) * num_tasks_; }
  GS_DEVICE int64_t column(int c) const { return half(c) * Rows::kStep; }

  GS_DEVICE void open(const Slot& slot) {
    index_ = stages_ = 0;
    if (!slot.holds(param_)) return;
    const Rows piece = slot.piece<In, kRowLanes>(param_);
    const Steps steps(piece, halves_ * Rows::kStep);
    aligned_ = piece.aligned;
    whole_ = static_cast<int>(steps.count);
    stages_ = whole_ + static_cast<int>((steps.rest + halves_ * Rows::kStep - 1) / (halves_ * Rows::kStep));
#pragma unroll
    for (int c = 0; c < kCopies; c++) {
      const In* from = is_mine(c) ? piece.row(row(c)) : nullptr;
      const int64_t first = steps.step(0) + column(c) + row_lane() * (aligned_ ? kVector<In> : 1);
      source_[c] = from ? from + first : nullptr;
    }
  }
  GS_DEVICE void fill_rest(Vector<In>* stage) const {
    const Rows piece = Slot(table_, slot_).piece<In, kRowLanes>(param_);
    const Steps steps(piece, halves_ * Rows::kStep);
#pragma unroll 1
    for (int c = 0; c < kCopies && is_mine(c); c++) {
      const int64_t i = (index_ - whole_) * halves_ * Rows::kStep + column(c);
      stage[place(c)] = load_rest<kRowLanes>(piece.row(row(c)), steps, i, row_lane());
    }
  }

  const Table& table_;
  const int slot_, num_tasks_, halves_, padding_;
  int param_, index_, whole_, stages_;
  bool aligned_;
  const In* source_[kCopies];  // the lane's first element, in steps as load_steps has them
};

// Where a lane reads in half a stage, in vectors from the first one of a block of 8 rows: for float64 tiles a vector of
// its own; for float32 ones what load_matrices distributes.
constexpr int kBlockVectors = 8 * kRowLanes;
template <class In, int kTiles>
GS_DEVICE int lane_offset(const DoubleTiles<In, 2, kTiles>&) {
  return row_in_block() * kRowLanes + (row_lane() ^ swizzle_of(row_in_block()));
}
template <class In, int kTiles>
GS_DEVICE int lane_offset(const FloatTiles<In, 2, kTiles>&) {
  return thread() % 8 * kRowLanes + (thread() % kWarp / 8 ^ swizzle_of(thread() % 8));
}

// Adds the products of the two blocks at `left` with those at right(j).
template <class In, int kTiles, class Right, class Needed>
GS_DEVICE void add_tiles(DoubleTiles<In, 2, kTiles>& tiles, const Vector<In>* left, const Right& right,
                         const Needed& needed) {
  const Vector<In> x[2] = {left[0], left[kBlockVectors]};
  tiles.add(x, [&](int j) { return *right(j); }, needed);
}
template <class In, int kTiles, class Right, class Needed>
GS_DEVICE void add_tiles(FloatTiles<In, 2, kTiles>& tiles, const Vector<In>* left, const Right& right,
                         const Needed& needed) {
  // Lanes 8 to 15 and 24 to 31 name rows of the second block, lanes from 16 on the other vector of the step.
  const int matrix = thread() % kWarp / 8, row = thread() % 8;
  const Vector<In>* start = left - lane_offset(tiles) + row * kRowLanes + matrix % 2 * kBlockVectors;
  const int place = matrix / 2 ^ swizzle_of(row);
  LeftWords words[1];
  load_matrices(words[0].step[0], start + place);
  load_matrices(words[0].step[1], start + (place ^ 2));
  const auto load = [&](int j) {
    Vector<In> vector;
    load_matrices(vector.word, right(j));
    return vector;
  };
  tiles.add(words, load, needed);
}

// kTiles: of a warp, with which some warps may leave the last two out.
template <class In, int kTiles, bool kDouble>
GS_KERNEL GS_BLOCKS(kWarps* kWarp, 1)
    staged_kernel(const GS_GRID_CONSTANT Table table, int num_tasks, double* partials) {
  wait_for_previous_kernel();
  const Split split(num_tasks);
  const int slot = static_cast<int>(block() / split.parts);
  const int part = static_cast<int>(block() % split.parts);
  const int own_split = thread() / kWarp / split.shares;
  // Neighbouring warps share a unit of the multiprocessor, so the second half of them begins half way round.
  const int share = (thread() / kWarp + own_split * (split.shares / 2)) % split.shares;
  const int row_block = part % split.row_parts * split.shares + share;
  const int first_tile = part / split.row_parts * kMostTiles;
  const int tiles_left = row_block < split.circle ? split.tiles_of(row_block) - first_tile : 0;
  // A tile's block of 8 rows; the circle closes before tile `wrap`.
  const int first_right = (2 * row_block + first_tile) % (2 * split.circle), wrap = 2 * split.circle - first_right;
  const auto right_block = [&](int j) { return first_right + j - (j < wrap ? 0 : 2 * split.circle); };
  const auto place = [&](int i, int j, int h) -> int64_t {
    const int row = row_block * kRows + 8 * i + row_in_block(), column = 8 * right_block(j) + 2 * row_lane() + h;
    const bool twice = first_tile + j < 2 && row > column;  // a row block's own products
    if (j >= tiles_left || row >= num_tasks || column >= num_tasks || twice) return -1;
    return row < column ? pair_index(row, column, num_tasks) : pair_index(column, row, num_tasks);
  };
  double* partial = partials + int64_t{slot} * pairs_of(num_tasks);
  auto* stages = &shared<Vector<In>>();
  const int half_vectors = split.half_vectors(), stage_vectors = half_vectors * split.halves;
  auto* sums = reinterpret_cast<double*>(stages + kStages * stage_vectors);  // [splits][shares][64]
  const bool all_tiles = tiles_left >= kTiles;

  const auto sum_and_write = [&](auto& tiles) {
    const int left = lane_offset(tiles) + 2 * row_block * kBlockVectors;
    const int right = lane_offset(tiles) + first_right * kBlockVectors;
    const int wrapped = right - 2 * split.circle * kBlockVectors;
    Copier<In> ahead(table, slot, num_tasks, split);
    int filled = 0;
    for (int n = 1 - kStages; n < filled; n++) {
      if (n >= 0) {
        wait_for_copies<kStages - 2>();
        sync_block();
      }
      if (!ahead.done()) ahead.fill(stages + filled++ % kStages * stage_vectors);
      close_copies();
      for (int half = own_split; n >= 0 && half < split.halves && tiles_left > 0; half += split.splits) {
        const Vector<In>* rows = stages + n % kStages * stage_vectors + half * half_vectors;
        add_tiles(
            tiles, rows + left, [&](int j) { return rows + (j < wrap ? right : wrapped) + j * kBlockVectors; },
            [&](int, int j) { return j < kTiles - 2 || all_tiles; });
      }
    }
    tiles.finish();
    let_next_kernel_start();
    write_tiles<2, kTiles>(tiles, share, split.shares, own_split, split.splits, place, sums, partial);
  };
  if constexpr (!kDouble) {
    FloatTiles<In, 2, kTiles> tiles;
    sum_and_write(tiles);
    if constexpr (std::is_same_v<In, float16>) return;  // always fits
    if (!any_misfit(tiles, row_block * kRows, num_tasks, table.width, partial)) return;
  }
  DoubleTiles<In, 2, kTiles> tiles;
  sum_and_write(tiles);
}

template <class In, bool kDouble, int kTiles>
gs_status launch_one(const Table& table, int num_tasks, double* partials, gs_stream stream) {
  const Split split(num_tasks);
  if constexpr (kTiles < kMostTiles) {
    if (split.circle + 2 > kTiles + split.circle % 2) {
      return launch_one<In, kDouble, kTiles + 2>(table, num_tasks, partials, stream);
    }
  }
  const int warps = split.shares * split.splits;
  const int64_t bytes = int64_t{kStages} * split.halves * split.half_vectors() * 16 + warps * 64 * 8;
  return launch(&staged_kernel<In, kTiles, kDouble>, table.slots * split.parts, warps * kWarp, bytes, stream, table,
                num_tasks, partials);
}

}  // namespace

gs_status launch_staged(const Table& table, int64_t tasks, double* partials, gs_stream stream) {
  const int num_tasks = static_cast<int>(tasks);
  return with_dtype(table.dtype, [&](auto in) {
    using In = decltype(in);
    // The check that float32 holds the sums needs all rows in one block.
    if constexpr (sizeof(In) <= 4) {
      if (num_tasks <= kMaxTasks) return launch_one<In, false, 4>(table, num_tasks, partials, stream);
    }
    return launch_one<In, true, 6>(table, num_tasks, partials, stream);
  });
}

}  // namespace gs::gpu
