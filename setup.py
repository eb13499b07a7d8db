"""Builds the native core with CMake. Sources, flags and options live in CMakeLists.txt; here is only when to build it.

FUSED_SAM_NATIVE=AUTO (default) goes on without the native core if it cannot be built, ON fails then, OFF does not try.
"""

from __future__ import annotations

import os
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
        mode = _mode()
        try:
            self._build(Path(self.get_ext_fullpath(ext.name)).resolve())
        except (OSError, subprocess.CalledProcessError) as error:
            reason = f"the native core could not be built ({error})"
            if mode == "ON":
                raise SystemExit(f"FUSED_SAM_NATIVE=ON, but {reason}. It needs a C++17 compiler.") from None
            print(f"warning: FusedSAM: {reason}; it will run on the slower eager backend.", file=sys.stderr)

    def _build(self, library: Path) -> None:
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        # It may name a compiler, a ninja or a pybind11 of an isolated build environment that is gone.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        cmake = shutil.which("cmake") or "cmake"
        configure = [cmake, "-S", str(Path(__file__).resolve().parent), "-B", str(build)]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Release"]
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


def _mode() -> str:
    mode = os.environ.get("FUSED_SAM_NATIVE", "AUTO").upper()
    if mode not in CHOICES:
        raise SystemExit(f"Invalid FUSED_SAM_NATIVE={mode!r}. Must be one of {CHOICES}.")
    return mode


setup(
    # Optional: setuptools must not look for a library that AUTO went on without.
    ext_modules=[] if _mode() == "OFF" else [Extension("fused_sam._native", sources=[], optional=_mode() == "AUTO")],
    cmdclass={"build_ext": CMakeBuild},
)
