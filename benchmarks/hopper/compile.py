"""Compile a CUDA source for sm_90a with the NVRTC that PyTorch brings; no GPU and no nvcc needed.

    python benchmarks/hopper/compile.py benchmarks/hopper/fprop.cu

Prints registers, stack and shared memory. An experiment outside the package: `fprop.cu` has never run. Its forward
pass of a 3x3 layer packs three horizontal taps of 40 maps into N = 120 columns (docs/log.md, 2026-11-30).
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

OPTIONS = (b"--gpu-architecture=sm_90a", b"--std=c++17", b"-default-device")


def compile_source(source: Path) -> bytes:
    """Return the cubin of a CUDA source.

    Raises:
        ValueError: with the compiler's log.
    """
    import nvidia

    folders = [Path(folder, "cu13", "lib") for folder in nvidia.__path__]
    (builtins,) = (path for folder in folders for path in folder.glob("libnvrtc-builtins.so*"))
    (library,) = (path for folder in folders for path in folder.glob("libnvrtc.so.13"))
    ctypes.CDLL(str(builtins))  # NVRTC looks it up by name
    nvrtc, program, size = ctypes.CDLL(str(library)), ctypes.c_void_p(), ctypes.c_size_t()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.read_bytes(), source.name.encode(), 0, None, None)
    failed = nvrtc.nvrtcCompileProgram(program, len(OPTIONS), (ctypes.c_char_p * len(OPTIONS))(*OPTIONS))
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    if failed:
        raise ValueError(log.value.decode())
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, cubin)
    return cubin.raw


def main() -> None:
    import triton

    cubin = Path(sys.argv[1]).with_suffix(".cubin")
    cubin.write_bytes(compile_source(Path(sys.argv[1])))
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    subprocess.run([str(tool), "-res-usage", str(cubin)], check=True)


if __name__ == "__main__":
    main()
