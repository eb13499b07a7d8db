"""Builds the emulator, and the native core with PTX in it on top of the emulator. Nothing is built twice.

Flags and sources of the core are those of CMakeLists.txt, but that its CUDA code is kept as PTX of one architecture,
its CPU kernels are the portable ones alone, ptx/host_ops.cpp stands for csrc/cuda/on_host.cpp, and the emulator stands
for the CUDA runtime.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
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
        sources = [path for path in sorted(HERE.glob("*.cpp")) if path.name != "host_ops.cpp"]
        headers = _digest(HERE.glob("*.h"))
        jobs = [(f"g++ {OWN_FLAGS} -c {path}", path, BUILD / "emulator" / f"{path.stem}.o") for path in sources]
        objects = _compile(jobs, headers)
        return _link(EMULATOR, objects, [])


def native(architecture: int) -> Path:
    """Build the core for the PTX of one architecture and return its library."""
    library = emulator()
    folder = BUILD / f"sm_{architecture}"
    with _alone(folder.name):
        headers = _digest(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh"))
        objects = _compile(list(_jobs(folder, architecture)), headers)
        beside = [str(library), "-Wl,-rpath,$ORIGIN/..", "-Wl,-z,now", "-ldl"]
        return _link(folder / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}", objects, beside)


def _jobs(folder: Path, architecture: int) -> Iterator[tuple[str, Path, Path]]:
    """Yield the command, source and object of every file of the core."""
    configure = ["cmake", "-S", ROOT, "-B", folder / "cmake", f"-DPython_EXECUTABLE={sys.executable}"]
    configure += ["-DFUSED_SAM_CUDA=ON", f"-DFUSED_SAM_CUDA_ARCHITECTURES={architecture}"]
    _run([*map(str, configure), "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"])
    for entry in json.loads((folder / "cmake" / "compile_commands.json").read_text()):
        flags, source = entry["command"], Path(entry["file"])
        if "FUSED_SAM_ISA=avx" in flags:
            continue
        if source.name == "on_host.cpp":
            source = HERE / "host_ops.cpp"
        words = shlex.split(flags)
        words = words[: words.index("-o")]
        words = _as_ptx(words) if source.suffix == ".cu" else _quickly_compiled(words)
        # What the CPU's code is worth is tested elsewhere; objects of all architectures share it.
        place = folder if source.suffix == ".cu" else BUILD / "host"
        yield shlex.join([*words, "-c", str(source)]), source, place / f"{source.parent.name}_{source.stem}.o"


def _as_ptx(words: list[str]) -> list[str]:
    """Return a command of nvcc that leaves PTX alone, as it is."""
    for_gpus = [word for word in words if word.startswith("--generate-code") and "code=[sm_" in word]
    kept = [word for word in words if word not in (*for_gpus, "-Xfatbin=-compress-all", "-c", "-x", "cu")]
    return [word for word in kept if not word.endswith(".cu")] + ["-no-compress"]


def _quickly_compiled(words: list[str]) -> list[str]:
    dropped = ("-DFUSED_SAM_X86", "-D_FORTIFY_SOURCE=2", "-O1", "-O2", "-O3")
    return [word for word in words if word not in dropped] + ["-O0" if "-D_native_EXPORTS" in words else "-O1"]


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

    # The longest first: nvcc takes most of the time.
    jobs.sort(key=lambda job: (job[1].suffix != ".cu", -job[1].stat().st_size))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, jobs))


def _link(library: Path, objects: list[str], more: list[str]) -> Path:
    aside = library.with_suffix(".part")
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
