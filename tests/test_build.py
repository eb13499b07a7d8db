"""The flags that the native core is built with, and what the built library says of them."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import PATIENCE

ROOT = Path(__file__).parent.parent

needs_cmake = pytest.mark.skipif(
    shutil.which("cmake") is None or importlib.util.find_spec("pybind11") is None, reason="needs cmake and pybind11"
)


def configure(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = ["cmake", "-S", str(ROOT), "-B", str(folder), f"-DPython_EXECUTABLE={sys.executable}"]
    command += ["-DFUSED_SAM_CUDA=OFF", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)


@needs_cmake
def test_every_file_is_hardened_and_none_is_bound_to_this_machine_or_to_loose_arithmetic(tmp_path: Path) -> None:
    configured = configure(tmp_path)
    assert configured.returncode == 0, configured.stderr
    commands = json.loads((tmp_path / "compile_commands.json").read_text())
    assert len(commands) > 15
    for entry in commands:
        flags = entry["command"].split()
        for needed in ("-fstack-protector-strong", "-D_FORTIFY_SOURCE=2", "-O3", "-ffp-contract=off"):
            assert needed in flags, (needed, entry["file"])
        # -ffast-math also makes the library flush subnormals in the whole process.
        loose = ("-march=", "-mtune=", "-ffast-math", "-Ofast", "-funsafe", "-fassociative", "-fsanitize")
        assert not [flag for flag in flags if flag.startswith(loose)], entry["file"]


@needs_cmake
def test_a_sanitized_core_is_refused_in_a_release_build(tmp_path: Path) -> None:
    configured = configure(tmp_path, "-DFUSED_SAM_SANITIZE=address")
    assert configured.returncode != 0
    assert "FUSED_SAM_SANITIZE=address in a Release build" in configured.stderr


def test_nothing_is_downloaded_at_build_time() -> None:
    sources = (ROOT / "CMakeLists.txt").read_text() + (ROOT / "setup.py").read_text()
    for name in ("FetchContent", "ExternalProject", "file(DOWNLOAD", "https://", "http://", "urllib", "git clone"):
        assert name not in sources


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_the_library_is_hardened() -> None:
    """Read-only relocations, bound when it is loaded; no executable stack; checks of the stack and of copies."""
    spec = importlib.util.find_spec("fused_sam._native")
    if spec is None or spec.origin is None:
        pytest.skip("the native core is not built")

    def readelf(option: str) -> str:
        return subprocess.run(["readelf", "-W", option, spec.origin], capture_output=True, text=True, check=True).stdout

    segments, dynamic, symbols = readelf("-l"), readelf("-d"), readelf("--dyn-syms")
    assert "GNU_RELRO" in segments
    assert re.search(r"GNU_STACK.* RW ", segments)
    assert re.search(r"\(FLAGS\).*BIND_NOW|\(FLAGS_1\).*NOW", dynamic)
    assert "TEXTREL" not in dynamic
    # One binary serves every torch, and no second thread pool is loaded beside torch's. CUDA's runtime is inside, and
    # the driver is looked up when there is one.
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert any(name.startswith("libc.") for name in needed)
    assert not [name for name in needed if re.search("torch|omp|cuda", name)]
    assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic)
    assert "__stack_chk_fail" in symbols
    exported = [line for line in symbols.splitlines() if re.search(r"GLOBAL\s+DEFAULT\s+\d+", line)]
    assert [line.split()[-1] for line in exported] == ["PyInit__native"]


MAPPED_AFTER_A_STEP = """
import torch
from fused_sam import FusedSAM
p = torch.nn.Parameter(torch.ones(67))
opt = FusedSAM([p], lr=0.1, momentum=0.9)
def closure():
    loss = (p * p).sum()
    loss.backward()
    return loss
opt.step(closure)
for line in open("/proc/self/maps"):
    fields = line.split(maxsplit=5)
    if "x" in fields[1] and len(fields) == 6 and fields[5].startswith("/"):
        print(fields[5].strip())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_code_comes_from_where_anybody_may_write() -> None:
    """Of the whole process, torch included, after a step."""
    done = subprocess.run([sys.executable, "-c", MAPPED_AFTER_A_STEP], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    files = {Path(line) for line in done.stdout.splitlines()}
    assert any("torch" in str(file) for file in files)
    for file in files:
        assert file.is_file(), f"{file} was deleted after it was loaded"
        for place in (file, file.parent):
            assert not place.stat().st_mode & stat.S_IWOTH, place
