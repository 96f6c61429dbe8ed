// What a descriptor says of a setting that makes no sense. Private.
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

}  // namespace thalweg
