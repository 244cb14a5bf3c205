// Memory asked for before it is read. What no cache holds takes 100 ns and more to come; a loop
// that waits for it keeps a few lines on their way, a loop that asks ahead keeps dozens.
#pragma once

#include <cstdint>

namespace fastcl {

// Into the first-level cache (CLOSE), or into the second: more requests can be under way to there.
constexpr int CLOSE = 3, NEAR = 2;

constexpr int64_t AHEAD = 1024;  // numbers from the one that is read to the one that is asked for

// The cache line of one number.
template <int LOCALITY, class T>
inline void prefetch(const T* x) {
  __builtin_prefetch(x, 0, LOCALITY);
}

// All lines of `count` numbers.
template <int LOCALITY, class T>
inline void prefetch(const T* x, int64_t count) {
  const char* bytes = reinterpret_cast<const char*>(x);
  for (int64_t b = 0; b < count * int64_t(sizeof(T)); b += 64)
    __builtin_prefetch(bytes + b, 0, LOCALITY);
}

}  // namespace fastcl
