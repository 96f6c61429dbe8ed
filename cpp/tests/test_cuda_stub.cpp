// A build without CUDA refuses, and says how to get it.
#include "minitest.hpp"
#include "thalweg/cuda.hpp"

using namespace thalweg;

TEST(says_how_to_get_it) {
  CHECK(std::string(cuda::backend()) == "none" && !cuda::available());
  THROWS(cuda::require(), "-DTHALWEG_CUDA=ON");
  THROWS(cuda::Array<double>(3), "-DTHALWEG_CUDA=ON");
  THROWS(cuda::Tersoff(Tersoff::published("C")), "-DTHALWEG_CUDA=ON");
  bool caught = false;
  try {
    cuda::require();
  } catch (const cuda::BackendUnavailable&) {
    caught = true;
  }
  CHECK(caught);
}

MINITEST_MAIN
