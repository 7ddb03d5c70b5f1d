"""The matrix product of the CPU kernels next to torch.mm, by inner size, on one thread.

    python benchmarks/product.py
    CXXFLAGS=-march=haswell MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/product.py  # AVX2

1,024 rows, 128 at a time as the kernels take them, and 48 columns, a bottleneck of DenseNet-BC with k = 12. Both are
called in turns; each figure is the fastest of many calls.
"""

import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from densenet_dist.model.kernels import build

ROWS, COLUMNS, INNER, SECONDS = 1024, 48, (24, 48, 96, 120, 204, 300, 440), 0.5
SOURCE = """
#include "native_gemm.h"
extern "C" void product(int64_t rows, int64_t columns, int64_t inner, const float *a, const float *b, float *out) {
  for (int64_t row = 0; row < rows; row += 128)
    multiply(128, columns, Left<float>{a + row * inner, inner, inner}, b, columns, out + row * columns, columns);
}
"""


def main() -> None:
    torch.set_num_threads(1)
    ours = compiled()
    print("inner   ours  torch.mm  GFLOP/s      share")
    for inner in INNER:
        a, b, out = torch.randn(ROWS, inner), torch.randn(inner, COLUMNS), torch.empty(ROWS, COLUMNS)
        arguments = (ROWS, COLUMNS, inner, a.data_ptr(), b.data_ptr(), out.data_ptr())
        fastest = in_turns(lambda given=arguments: ours(*given), lambda a=a, b=b: torch.mm(a, b))  # type: ignore[misc]
        torch.testing.assert_close(out, a @ b, rtol=1e-4, atol=1e-4)
        own, torch_mm = (2e-9 * ROWS * COLUMNS * inner / seconds for seconds in fastest)
        print(f"{inner:5d}  {own:5.0f}     {torch_mm:5.0f}               {own / torch_mm:.2f}")


def compiled() -> Callable[..., None]:
    """The product as a function of rows, columns, inner size and three pointers."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "product.cpp"), Path(folder, "product.so")
        source.write_text(SOURCE)
        command = [*build.compiler(), *build.flags(), "-I", str(build.SOURCE.parent), str(source), "-o", str(library)]
        subprocess.run(command, check=True)
        function = ctypes.CDLL(str(library)).product
    function.argtypes, function.restype = [ctypes.c_int64] * 3 + [ctypes.c_void_p] * 3, None
    return function


def in_turns(*calls: Callable[[], object]) -> list[float]:
    """Seconds of the fastest call of each."""
    fastest, started = [float("inf")] * len(calls), time.perf_counter()
    while time.perf_counter() - started < SECONDS:
        for number, call in enumerate(calls):
            before = time.perf_counter()
            call()
            fastest[number] = min(fastest[number], time.perf_counter() - before)
    return fastest


if __name__ == "__main__":
    main()
