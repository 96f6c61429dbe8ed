// Atoms of one structure, shared out to threads.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace thalweg {

/// Into how many parts, each with a scratch of its own, for_each_center() divides n centres.
inline int center_parts(std::size_t n, int threads) {
  return static_cast<int>(std::clamp<std::size_t>(n, 1, static_cast<std::size_t>(std::max(threads, 1))));
}

/// Calls work(center, part) for every centre, which must not throw.
template <class Work>
void for_each_center(std::size_t centers, int threads, const Work& work) {
  const int parts = center_parts(centers, threads);
  const auto n = static_cast<std::int64_t>(centers);
  if (parts == 1) {
    for (std::int64_t center = 0; center < n; ++center) work(static_cast<std::size_t>(center), std::size_t{0});
    return;
  }
#pragma omp parallel for num_threads(parts) schedule(static, 1)
  for (int part = 0; part < parts; ++part)
    for (std::int64_t center = n * part / parts; center < n * (part + 1) / parts; ++center)
      work(static_cast<std::size_t>(center), static_cast<std::size_t>(part));
}

}  // namespace thalweg
