"""Builds the emulator, and links the native core to it in the place of the CUDA runtime.

The core is made of the very objects of the installed library: CUDA code is in them as PTX, too, which the emulator
runs. Where the install has been made for another architecture, or before the sources were changed, CMake builds the
core in a folder of its own.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "ptx"
INSTALLED = ROOT / "build" / f"native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"  # as in setup.py
OWN_FLAGS = "-std=c++17 -O2 -ffp-contract=off -fPIC -Wall -Wextra -Wshadow"
EMULATOR = BUILD / "libptx_emulator.so"


def why_not(with_nvcc: bool = True) -> str | None:
    """Return what is missing on this machine, or None."""
    tools = ("g++", "cmake", "nvcc") if with_nvcc else ("g++",)
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if with_nvcc and importlib.util.find_spec("pybind11") is None:
        missing.append("pybind11")
    return f"{', '.join(missing)} not installed" if missing else None


def emulator() -> Path:
    """Build the emulator and return its library."""
    with _alone("emulator"):
        headers, sources = _digest(HERE.glob("*.h")), sorted(HERE.glob("*.cpp"))
        jobs = [(f"g++ {OWN_FLAGS} -c {path}", path, BUILD / "emulator" / f"{path.stem}.o") for path in sources]
        objects = _compile(jobs, headers)
        return _link(EMULATOR, objects, [])


def native(architecture: int) -> Path:
    """Link the core for the PTX of one architecture to the emulator and return its library."""
    library = emulator()
    folder = BUILD / f"sm_{architecture}"
    with _alone(folder.name):
        core = INSTALLED if _is_installed_for(architecture) else _build_core(folder / "cmake", architecture)
        found = sorted(core.glob("CMakeFiles/*.dir/**/*.o"))
        objects = [str(path) for path in found if path.name != "access.cpp.o"]  # a library of its own
        beside = [str(library), "-Wl,-rpath,$ORIGIN/..", "-Wl,-z,now", "-ldl"]
        return _link(folder / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}", objects, beside)


def _is_installed_for(architecture: int) -> bool:
    """Return whether the install has left the objects of today's sources, with readable PTX of an architecture."""
    cache, libraries = INSTALLED / "CMakeCache.txt", list(INSTALLED.glob("_native*.so"))
    if not cache.exists() or len(libraries) != 1:
        return False
    settings = cache.read_text().splitlines()
    wanted = {f"FUSED_SAM_CUDA_ARCHITECTURES:STRING={architecture}", "FUSED_SAM_READABLE_PTX:BOOL=ON"}
    sources = [ROOT / "CMakeLists.txt", *(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]
    newest = max(path.stat().st_mtime for path in sources)
    has_cuda = any(INSTALLED.glob("CMakeFiles/*.dir/**/*.cu.o"))
    return has_cuda and wanted.issubset(settings) and libraries[0].stat().st_mtime > newest


def _build_core(folder: Path, architecture: int) -> Path:
    configure = ["cmake", "-S", ROOT, "-B", folder, f"-DPython_EXECUTABLE={sys.executable}", "-DFUSED_SAM_CUDA=ON"]
    configure += [f"-DFUSED_SAM_CUDA_ARCHITECTURES={architecture}", "-DFUSED_SAM_READABLE_PTX=ON"]
    configure += ["-G", "Ninja"] if shutil.which("ninja") else []
    _run([*map(str, configure)])
    _run(["cmake", "--build", str(folder), "--target", "_native", "--parallel", str(os.cpu_count() or 1)])
    return folder


def _compile(jobs: list[tuple[str, Path, Path]], headers: str) -> list[str]:
    """Run the commands whose objects are not those of their command, source and headers; return all objects."""

    def compile_one(job: tuple[str, Path, Path]) -> str:
        command, source, target = job
        stamp, key = target.with_suffix(".key"), headers + _digest([source]) + command
        if not target.exists() or not stamp.exists() or stamp.read_text() != key:
            target.parent.mkdir(parents=True, exist_ok=True)
            stamp.unlink(missing_ok=True)
            _run([*shlex.split(command), "-o", str(target)])
            stamp.write_text(key)
        return str(target)

    jobs.sort(key=lambda job: -job[1].stat().st_size)  # the longest first
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, jobs))


def _link(library: Path, objects: list[str], more: list[str]) -> Path:
    aside = library.with_suffix(".part")
    library.parent.mkdir(exist_ok=True)
    if not library.exists() or any(Path(o).stat().st_mtime > library.stat().st_mtime for o in objects):
        _run(["g++", "-shared", "-o", str(aside), *objects, *more])
        os.replace(aside, library)
    return library


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}:\n{done.stdout}")


def _digest(files: object) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()


@contextmanager
def _alone(name: str) -> Iterator[None]:
    """Make other processes, which may run tests beside this one, wait for what is built here."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    print(*map(native, map(int, sys.argv[1:])), sep="\n")
