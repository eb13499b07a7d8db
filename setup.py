"""Builds the native core with CMake. Sources, flags and options live in CMakeLists.txt; here is only when to build it.

FUSED_SAM_NATIVE=AUTO (default) goes on without the native core if it cannot be built, ON fails then, OFF does not try.
FUSED_SAM_CUDA says the same of its CUDA part; there, AUTO builds it where there are nvcc and a GPU.
FUSED_SAM_ATEN says the same of the extension that reads tensors through torch's headers; there, AUTO builds it where
there is a torch, for which it is compiled.
FUSED_SAM_CUDA_ARCHITECTURES (or TORCH_CUDA_ARCH_LIST) is a list such as 80,90, or "all" that nvcc knows from 75. By
default it is this machine's GPUs. Named architectures are built without a GPU, too.
FUSED_SAM_REPOSITORY is the address of the repository on GitHub, to which the page on a package index then leads. Our
workflow of releases sets it. What GitHub itself tells would be another address where others install these sources.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CHOICES = ("AUTO", "ON", "OFF")
NATIVE, ATEN = "fused_sam._native", "fused_sam._aten"
# Not setuptools' folder, which is gone after an editable install: what has been compiled is there the next time.
BUILD = ROOT / "build" / f"native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
OLDEST_SETUPTOOLS = 77  # the first that reads the licence in pyproject.toml


class CannotBuild(Exception):
    """Why the native core cannot be built here, in a few words."""


class CMakeBuild(build_ext):
    """Runs CMake in a directory per interpreter and platform, and puts the library where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        cuda = _mode("FUSED_SAM_CUDA")
        if ext.name == ATEN:
            self._build_aten(ext)
            return
        try:
            _require_tools()
            library = Path(self.get_ext_fullpath(ext.name)).resolve()
            try:
                _build(library, cuda)
            except (OSError, subprocess.CalledProcessError) as error:
                if cuda == "ON":
                    raise SystemExit(
                        f"FUSED_SAM_CUDA=ON, but the CUDA kernels could not be built ({error}). They need nvcc of a "
                        "CUDA toolkit (on PATH, in CUDA_HOME, or named by CUDACXX) and a host compiler that it "
                        "supports."
                    ) from None
                _build(library, "OFF")
                print(
                    "warning: FusedSAM: the CUDA kernels could not be built, only those for the CPU.", file=sys.stderr
                )
        except (CannotBuild, OSError, subprocess.CalledProcessError) as error:
            reason = f"the native core could not be built ({error})"
            if MODE == "ON":
                needed = "" if isinstance(error, CannotBuild) else " It needs a C++17 compiler."
                raise SystemExit(f"FUSED_SAM_NATIVE=ON, but {reason}.{needed}") from None
            print(f"warning: FusedSAM: {reason}; it will run on the slower eager backend.", file=sys.stderr)
            self._be_pure()

    def _build_aten(self, ext: Extension) -> None:
        needed = _mode("FUSED_SAM_ATEN") == "ON"
        if not needed and self.distribution.ext_modules == []:
            return  # the warning about the core says enough
        try:
            if self.distribution.ext_modules == []:
                raise CannotBuild("there is no native core")
            _run(["cmake", "--build", str(BUILD), "--target", "_aten"])
            _install("_aten", Path(self.get_ext_fullpath(ext.name)).resolve())
        except (CannotBuild, OSError, subprocess.CalledProcessError) as error:
            told = f"the reader of tensors could not be built ({error})"
            if needed:
                raise SystemExit(f"FUSED_SAM_ATEN=ON, but {told}.") from None
            print(f"warning: FusedSAM: {told}; tensors will be read in a slower way.", file=sys.stderr)

    def _be_pure(self) -> None:
        """Without a library in it a wheel serves every machine: py3-none-any."""
        self.distribution.ext_modules = []
        wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
        if wheel is not None:
            wheel.root_is_pure = True


def _require_tools() -> None:
    if sys.platform != "linux":
        system = {"darwin": "macOS", "win32": "Windows"}.get(sys.platform, sys.platform)
        raise CannotBuild(f"it is for Linux, this is {system}")
    # An isolated build has brought them.
    missing = [] if shutil.which("cmake") else ["cmake"]
    missing += [] if importlib.util.find_spec("pybind11") else ["pybind11"]
    if missing:
        packages = " ".join(missing)
        raise CannotBuild(f"{packages} not installed: pip install {packages}, or leave out --no-build-isolation")


def _torch() -> Path | None:
    """Return the folder of this environment's torch; an isolated build does not have it on its path."""
    there = [Path(sysconfig.get_path(name)) / "torch" for name in ("purelib", "platlib")]
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        there.insert(0, Path(spec.origin).parent)
    return next((torch for torch in there if (torch / "lib" / "libtorch_python.so").exists()), None)


def _build(library: Path, cuda: str) -> None:
    BUILD.mkdir(parents=True, exist_ok=True)
    # It may name a compiler, a ninja or a pybind11 of an isolated build environment that is gone.
    (BUILD / "CMakeCache.txt").unlink(missing_ok=True)
    cmake = shutil.which("cmake") or "cmake"
    configure = [cmake, "-S", str(ROOT), "-B", str(BUILD), f"-DFUSED_SAM_TORCH={TORCH or ''}"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Release"]
    configure += [f"-DFUSED_SAM_CUDA={cuda}", f"-DFUSED_SAM_CUDA_ARCHITECTURES={_architectures()}"]
    if shutil.which("ninja"):
        configure += ["-G", "Ninja"]
    configure += os.environ.get("CMAKE_ARGS", "").split()
    _run(configure)
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    _run([cmake, "--build", str(BUILD), "--target", "_native", "--parallel", jobs])
    _install("_native", library)


def _install(name: str, library: Path) -> None:
    (built,) = BUILD.glob(f"{name}*.so")
    library.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and renamed: overwriting a library in place crashes the processes that have it loaded.
    aside = library.with_suffix(f".{os.getpid()}.part")
    shutil.copy2(built, aside)
    os.replace(aside, library)


def _run(command: list[str]) -> None:
    """What it says goes to pip, which shows it with -v, as it comes, and where the install fails."""
    sys.stdout.flush()
    result = subprocess.run(command, stderr=subprocess.STDOUT)
    if result.returncode != 0:
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
    if unknown and names != ["all"]:
        raise SystemExit(f"Invalid CUDA architectures {unknown}. Must be compute capabilities, such as 80,90, or all.")
    return ";".join(filter(None, names))


def _description() -> dict[str, Any]:
    """Return the long description, and the addresses where one is known: there are no relative ones on an index."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found: dict[str, Any] = {"long_description": text, "long_description_content_type": "text/markdown"}
    repository, revision = os.environ.get("FUSED_SAM_REPOSITORY"), os.environ.get("GITHUB_SHA") or "HEAD"
    if repository:
        pages = f"{repository}/blob/{revision}"
        places = {"Documentation": f"{pages}/docs/index.md", "Changelog": f"{pages}/CHANGELOG.md"}
        found["project_urls"] = {"Source": repository, **places, "Issues": f"{repository}/issues"}
        text = re.sub(r"(!\[[^]]*\])\((?!\w+:|#)", rf"\1({repository}/raw/{revision}/", text)
        found["long_description"] = re.sub(r"(\[[^]]*\])\((?!\w+:|#)", rf"\1({pages}/", text)
    return found


if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
    raise SystemExit(
        f"FusedSAM is built by setuptools >= {OLDEST_SETUPTOOLS}, this is {setuptools.__version__}: "
        "pip install --upgrade setuptools, or leave out --no-build-isolation."
    )

# CUDA kernels are part of the native core.
MODE = "ON" if _mode("FUSED_SAM_CUDA") == "ON" else _mode("FUSED_SAM_NATIVE")
TORCH = None if _mode("FUSED_SAM_ATEN") == "OFF" or MODE == "OFF" else _torch()
if TORCH is None and _mode("FUSED_SAM_ATEN") == "ON":
    lacks = "FUSED_SAM_NATIVE=OFF" if MODE == "OFF" else "there is no torch in this environment"
    raise SystemExit(f"FUSED_SAM_ATEN=ON, but {lacks}.")

# Optional: setuptools must not look for a library that AUTO went on without.
extensions = [] if MODE == "OFF" else [Extension(NATIVE, sources=[], optional=MODE == "AUTO")]
extensions += [] if TORCH is None else [Extension(ATEN, sources=[], optional=True)]

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": CMakeBuild},
    **_description(),
)
