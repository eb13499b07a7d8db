"""Builds the native core with CMake. Sources, flags and options live in CMakeLists.txt; here is only when to build it.

FUSED_SAM_NATIVE=AUTO (default) goes on without the native core if it cannot be built, ON fails then, OFF does not try.
FUSED_SAM_CUDA says the same of its CUDA part; there, AUTO asks whether there is an nvcc, never whether there is a GPU.
FUSED_SAM_CUDA_ARCHITECTURES (or TORCH_CUDA_ARCH_LIST) is a list such as 80,90; by default all that nvcc knows from 75.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CHOICES = ("AUTO", "ON", "OFF")


class CMakeBuild(build_ext):
    """Runs CMake in a directory per interpreter and platform, and puts the library where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        cuda = _mode("FUSED_SAM_CUDA")
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            self._build(library, cuda)
            return
        except (OSError, subprocess.CalledProcessError) as error:
            if cuda == "ON":
                raise SystemExit(
                    f"FUSED_SAM_CUDA=ON, but the CUDA kernels could not be built ({error}). They need nvcc of a CUDA "
                    "toolkit (on PATH, in CUDA_HOME, or named by CUDACXX) and a host compiler that it supports."
                ) from None
        try:
            self._build(library, "OFF")
            print("warning: FusedSAM: the CUDA kernels could not be built, only those for the CPU.", file=sys.stderr)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = f"the native core could not be built ({error})"
            if NATIVE == "ON":
                raise SystemExit(f"FUSED_SAM_NATIVE=ON, but {reason}. It needs a C++17 compiler.") from None
            print(f"warning: FusedSAM: {reason}; it will run on the slower eager backend.", file=sys.stderr)

    def _build(self, library: Path, cuda: str) -> None:
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        # It may name a compiler, a ninja or a pybind11 of an isolated build environment that is gone.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        cmake = shutil.which("cmake") or "cmake"
        configure = [cmake, "-S", str(Path(__file__).resolve().parent), "-B", str(build)]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Release"]
        configure += [f"-DFUSED_SAM_CUDA={cuda}", f"-DFUSED_SAM_CUDA_ARCHITECTURES={_architectures()}"]
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        configure += os.environ.get("CMAKE_ARGS", "").split()
        self._run(configure)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        self._run([cmake, "--build", str(build), "--parallel", jobs])
        (built,) = build.glob("_native*.so")
        library.parent.mkdir(parents=True, exist_ok=True)
        # Written aside and renamed: overwriting a library in place crashes the processes that have it loaded.
        aside = library.with_suffix(f".{os.getpid()}.part")
        shutil.copy2(built, aside)
        os.replace(aside, library)

    def _run(self, command: list[str]) -> None:
        """Quiet unless it fails: then the compiler's words are what the user needs."""
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if result.returncode != 0:
            print(result.stdout, file=sys.stderr)
            raise subprocess.CalledProcessError(result.returncode, " ".join(command[:2]))


def _mode(variable: str) -> str:
    mode = os.environ.get(variable, "AUTO").upper()
    if mode not in CHOICES:
        raise SystemExit(f"Invalid {variable}={mode!r}. Must be one of {CHOICES}.")
    return mode


def _architectures() -> str:
    """As CMake wants them, "80;90", from "80,90" or torch's "8.0 9.0+PTX"."""
    asked = os.environ.get("FUSED_SAM_CUDA_ARCHITECTURES") or os.environ.get("TORCH_CUDA_ARCH_LIST") or ""
    names = re.split(r"[,; ]+", asked.replace(".", "").replace("+PTX", "").strip())
    unknown = [name for name in names if name and not re.fullmatch(r"\d{2,3}[af]?", name)]
    if unknown:
        raise SystemExit(f"Invalid CUDA architectures {unknown}. Must be compute capabilities, such as 80,90.")
    return ";".join(filter(None, names))


# CUDA kernels are part of the native core.
NATIVE = "ON" if _mode("FUSED_SAM_CUDA") == "ON" else _mode("FUSED_SAM_NATIVE")

setup(
    # Optional: setuptools must not look for a library that AUTO went on without.
    ext_modules=[] if NATIVE == "OFF" else [Extension("fused_sam._native", sources=[], optional=NATIVE == "AUTO")],
    cmdclass={"build_ext": CMakeBuild},
)
