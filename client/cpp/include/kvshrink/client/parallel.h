// A loop over independent items on several threads.
#pragma once

#include <cstddef>
#include <functional>

namespace kvshrink::client {

// threads = 0: one per core. Runs `work` for 0 .. count - 1, each once, in any order; returns when
// all are done.
void ParallelFor(size_t count, int threads, const std::function<void(size_t)>& work);

}  // namespace kvshrink::client
