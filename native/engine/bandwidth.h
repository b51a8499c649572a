// How fast this machine reads memory: what a decoding step, which reads every weight once, cannot exceed.
#pragma once
#include <cstddef>

namespace shoal {

// Bytes a second that `threads` threads read together, each going once through its own part of a buffer of `bytes`
// bytes: the best of `passes` passes. The buffer must be far larger than the caches.
double read_bandwidth(int threads, size_t bytes, int passes);

}  // namespace shoal
