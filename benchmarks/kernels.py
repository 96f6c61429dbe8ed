"""The same as `thalweg bench kernels`. The compiled core alone: `thalweg_bench` (cpp/bench)."""

import sys

from thalweg.cli import app

app(["bench", "kernels", *sys.argv[1:]])
