#include "minitest.hpp"
MINITEST_MAIN
