// SPDX-License-Identifier: MIT
#pragma once

namespace gs::gpu {

// How a launch's blocks run: each for itself; as one cluster; or all at once, with barriers across the grid. A cluster
// has at most 8 blocks, and compute capability 9.0.
enum class Blocks { kApart, kCluster, kGrid };
constexpr int kMaxCluster = 8;

}  // namespace gs::gpu
