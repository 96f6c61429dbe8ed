// Thirty lines of test harness: TEST(name) { CHECK(condition); CLOSE(a, b, tolerance); THROWS(expression, "text"); }
#pragma once
#include <cmath>
#include <cstdio>
#include <exception>
#include <string>
#include <vector>

namespace minitest {
struct Case {
  const char* name;
  void (*body)();
};
inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}
inline int& failures() {
  static int count = 0;
  return count;
}
struct Register {
  Register(const char* name, void (*body)()) { cases().push_back({name, body}); }
};
inline void fail(const char* file, int line, const std::string& what) {
  ++failures();
  std::printf("  %s:%d: %s\n", file, line, what.c_str());
}
inline int run() {
  int bad = 0;
  for (const Case& c : cases()) {
    const int before = failures();
    try {
      c.body();
    } catch (const std::exception& e) {
      fail(c.name, 0, std::string("unexpected exception: ") + e.what());
    }
    std::printf("%s %s\n", failures() == before ? "ok  " : "FAIL", c.name);
    bad += failures() != before;
  }
  std::printf("%zu passed, %d failed\n", cases().size() - static_cast<std::size_t>(bad), bad);
  return bad != 0 || cases().empty();
}
}  // namespace minitest

#define TEST(id)                                                 \
  static void test_##id();                                       \
  static const minitest::Register register_##id(#id, test_##id); \
  static void test_##id()
#define CHECK(...)                                                                     \
  do {                                                                                 \
    if (!(__VA_ARGS__)) minitest::fail(__FILE__, __LINE__, "CHECK(" #__VA_ARGS__ ")"); \
  } while (0)
#define CLOSE(a, b, tolerance)                                                                          \
  do {                                                                                                  \
    const double va = (a), vb = (b);                                                                    \
    if (!(std::abs(va - vb) <= (tolerance)))                                                            \
      minitest::fail(__FILE__, __LINE__,                                                                \
                     #a " = " + std::to_string(va) + ", expected " + std::to_string(vb) + ", off by " + \
                         std::to_string(std::abs(va - vb) / (tolerance)) + " tolerances");              \
  } while (0)
#define THROWS(expression, text)                                                                                 \
  do {                                                                                                           \
    std::string came = "nothing";                                                                                \
    try {                                                                                                        \
      (void)(expression);                                                                                        \
    } catch (const std::exception& e) {                                                                          \
      came = e.what();                                                                                           \
    }                                                                                                            \
    if (came.find(text) == std::string::npos)                                                                    \
      minitest::fail(__FILE__, __LINE__, std::string("expected an error with '") + (text) + "', came: " + came); \
  } while (0)
#define MINITEST_MAIN \
  int main() { return minitest::run(); }
