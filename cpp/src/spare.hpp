// Workspaces that wait for the next call.
#pragma once

#include <cstddef>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

namespace thalweg {

/// A pool that any thread may take from and give back to; keeps 64 at most.
template <class Workspace>
class Spare {
 public:
  std::optional<Workspace> take() {
    const std::lock_guard<std::mutex> lock(guard_);
    if (kept_.empty()) return std::nullopt;
    std::optional<Workspace> workspace(std::move(kept_.back()));
    kept_.pop_back();
    return workspace;
  }
  void give(Workspace&& workspace) {
    const std::lock_guard<std::mutex> lock(guard_);
    if (kept_.size() < kMost) kept_.push_back(std::move(workspace));
  }

 private:
  static constexpr std::size_t kMost = 64;
  std::mutex guard_;
  std::vector<Workspace> kept_;
};

}  // namespace thalweg
