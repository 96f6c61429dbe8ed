// What a descriptor says of settings and workspaces that make no sense. Private.
#pragma once

#include <cstdio>
#include <string>

#include "thalweg/core.hpp"

namespace thalweg {

/// Throws Error unless good: "OF: NAME must be WANTED, but it is CAME".
inline void expect_setting(bool good, const char* of, const char* name, const char* wanted, double came) {
  if (good) return;
  char number[32];
  std::snprintf(number, sizeof number, "%.10g", came);
  throw Error(std::string(of) + ": " + name + " must be " + wanted + ", but it is " + number);
}

/// The state of a workspace. Throws Error unless the descriptor that is asked made it: another one may look for
/// neighbours less far. layout: the descriptor's.
template <class Workspace>
auto& own_state(Workspace& workspace, const void* layout) {
  if (workspace.state->maker != layout)
    throw Error("the workspace was made by another descriptor; take one that this one makes");
  return *workspace.state;
}

}  // namespace thalweg
