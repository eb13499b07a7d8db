"""Building and installing as users do: with and without a compiler, and never with torch in the build environment."""

from __future__ import annotations

import email
import email.message
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers import PATIENCE
from ptx import build

ROOT = Path(__file__).parent.parent

# The build requirements may come from the environment under test, so that these tests need no network.
needs_build_tools = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("setuptools", "pybind11", "cmake")),
    reason="needs the build requirements of pyproject.toml: setuptools, pybind11, cmake",
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what a source distribution has, so that a build leaves nothing in the checkout."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, copy)
    for name in ("csrc", "fused_sam"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return copy


# What the install of the tests themselves has compiled of these sources takes most of the time: it is taken from there.
QUICK_COMPILER = """#!/bin/sh
for word; do
  test "$before" = -o && object=$word
  before=$word
done
if test -f "{installed}/$object"; then
  cp "{installed}/$object" "$object"
  echo "$object:" > "$object.d"
else
  exec c++ "$@" -O0
fi
"""


@pytest.fixture
def quick_compiler(tmp_path: Path) -> str:
    """A C++ compiler that does not optimize."""
    compiler = tmp_path / "c++"
    compiler.write_text(QUICK_COMPILER.format(installed=build.INSTALLED))
    compiler.chmod(0o755)
    return str(compiler)


def build_wheel(source: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    # Without CUDA unless a test is about it: its kernels take a minute.
    env = {k: v for k, v in os.environ.items() if not k.startswith("FUSED_SAM_")} | {"FUSED_SAM_CUDA": "OFF"}
    # Any import of torch during the build fails.
    (source / "torch.py").write_text("raise ImportError('the build must not import torch')")
    env |= {"PYTHONPATH": str(source), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"} | environment
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-v", "-w", "dist", "."]
    return subprocess.run(command, cwd=source, env=env, capture_output=True, text=True, timeout=300)


def contents(source: Path) -> list[str]:
    (wheel,) = (source / "dist").glob("fused_sam-*.whl")
    return zipfile.ZipFile(wheel).namelist()


def has_library(names: list[str]) -> bool:
    return any(name.startswith("fused_sam/_native.") and name.endswith(".so") for name in names)


def gpus(folder: Path, capability: str) -> dict[str, str]:
    """Return a PATH on which nvidia-smi knows a GPU of that compute capability, or none."""
    tool = folder / "tools" / "nvidia-smi"
    tool.parent.mkdir(exist_ok=True)
    tool.write_text(f"#!/bin/sh\necho {capability}\n" if capability else "#!/bin/sh\nexit 9\n")
    tool.chmod(0o755)
    return {"PATH": os.pathsep.join([str(tool.parent), str(Path(sys.executable).parent), os.environ["PATH"]])}


# A PATH with compilers and without nvcc.
NO_NVCC = {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}/usr/bin{os.pathsep}/bin",
    "CMAKE_ARGS": "-DFUSED_SAM_CUDA_PATHS=",
    "CUDA_HOME": "",
    "CUDA_PATH": "",
}


@pytest.mark.slow
@needs_build_tools
def test_without_torch_and_nvcc_the_wheel_is_built_and_is_complete(source: Path, quick_compiler: str) -> None:
    built = build_wheel(source, FUSED_SAM_CUDA="AUTO", FUSED_SAM_NATIVE="ON", CXX=quick_compiler, **NO_NVCC)
    output = built.stdout + built.stderr
    assert built.returncode == 0, output
    assert "warning: FusedSAM" not in output
    names = contents(source)
    assert has_library(names)
    modules = (
        "optimizer.py",
        "analysis/objective.py",
        "cli/main.py",
        "backends/eager.py",
        "backends/native.py",
        "backends/triton/kernels.py",
        "py.typed",
        "_aten.pyi",
        "_native.pyi",
    )
    for module in modules:
        assert f"fused_sam/{module}" in names
    assert any(name.endswith(".dist-info/entry_points.txt") for name in names)
    assert not any(name.startswith(("tests", "bench", "csrc")) for name in names)
    assert re.search(r"^ *\[\d+/\d+\] Building CXX", output, re.MULTILINE)  # with -v one sees how far it is
    # An nvcc alone is no reason: AUTO leaves it, and says so. What has been compiled is still there.
    nvcc = {"FUSED_SAM_CUDA": "AUTO", "FUSED_SAM_NATIVE": "ON", "CXX": quick_compiler, "CUDACXX": "/bin/false"}
    built = build_wheel(source, **nvcc, **gpus(source.parent, ""))
    output = built.stdout + built.stderr
    assert built.returncode == 0, output
    assert output.count("no GPU is: the CUDA kernels are left out. FUSED_SAM_CUDA=ON builds them.") == 1
    assert "Building CXX" not in output
    # With a GPU it tries, and goes on without where nvcc is broken.
    built = build_wheel(source, **nvcc, **gpus(source.parent, "9.0"))
    output = built.stdout + built.stderr
    assert built.returncode == 0, output
    assert output.count("warning: FusedSAM: the CUDA kernels could not be built, only those for the CPU.") == 1
    assert has_library(contents(source))


@needs_build_tools
@pytest.mark.parametrize(("mode", "warnings"), [("AUTO", 1), ("off", 0)])
def test_without_a_compiler_the_wheel_is_pure(mode: str, warnings: int, source: Path) -> None:
    """AUTO says so once; OFF does not try."""
    built = build_wheel(source, FUSED_SAM_NATIVE=mode, CXX="/nowhere/c++")
    output = built.stdout + built.stderr
    assert built.returncode == 0, output
    assert output.count("warning: FusedSAM: the native core could not be built") == warnings
    assert output.count("could not be built") == warnings
    assert not has_library(contents(source))
    (wheel,) = (source / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")


@pytest.mark.slow
@needs_build_tools
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc not installed")
def test_the_cuda_kernels_are_built_for_the_gpus_that_are_here_or_for_what_is_asked(tmp_path: Path) -> None:
    def architectures(*options: str) -> set[str]:
        command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path / "build"), f"-DPython_EXECUTABLE={sys.executable}"]
        command += ["-G", "Ninja", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", *options]
        env = os.environ | gpus(tmp_path, "8.6")
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
        return set(re.findall(r"\bsm_(\d+)\]", (tmp_path / "build" / "compile_commands.json").read_text()))

    assert architectures() == {"86"}
    assert {"75", "80", "86"} < architectures("-DFUSED_SAM_CUDA_ARCHITECTURES=all")


def described(source: Path, repository: str) -> email.message.Message:
    """Return the metadata of a build that is told that address of the repository."""
    told = {"FUSED_SAM_NATIVE": "OFF", "FUSED_SAM_REPOSITORY": repository, "GITHUB_SHA": "f00d"}
    egg_info = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(source.parent)]
    done = subprocess.run(egg_info, cwd=source, env=os.environ | told, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return email.message_from_string((source.parent / "fused_sam.egg-info" / "PKG-INFO").read_text())


@needs_build_tools
def test_what_an_index_shows_leads_to_the_repository_that_the_build_is_told_of(source: Path) -> None:
    readme = (source / "README.md").read_text()
    untold = described(source, "")
    assert untold.get_payload().strip() == readme.strip()
    assert untold.get_all("Project-URL") is None
    here = "https://forge.invalid/some/one"
    told = described(source, here)
    assert {url.split(", ")[0] for url in told.get_all("Project-URL")} == {
        "Source",
        "Documentation",
        "Changelog",
        "Issues",
    }
    link = r"(!?)\[[^]]*\]\(([^)]*)\)"
    before, after = (re.findall(link, text) for text in (readme, told.get_payload()))
    assert [picture for picture, _ in before] == [picture for picture, _ in after]
    for (picture, old), (_, new) in zip(before, after, strict=True):
        if old.startswith("https://"):
            assert new == old
        else:
            assert (ROOT / old.split("#")[0]).exists()
            assert new == f"{here}/{'raw' if picture else 'blob'}/f00d/{old}"
    assert not re.search(r"\]\((?!https://|mailto:|#)", told.get_payload())
    assert re.sub(link, "", told.get_payload()).strip() == re.sub(link, "", readme).strip()


HOPPER = "Invalid CUDA architectures ['Hopper']. Must be compute capabilities"
REFUSED: dict[str, tuple[dict[str, str], list[str]]] = {
    "no compiler": (
        {"CXX": "/nowhere/c++", "FUSED_SAM_NATIVE": "ON"},
        ["FUSED_SAM_NATIVE=ON, but the native core could not be built", "It needs a C++17 compiler."],
    ),
    "no nvcc": (
        {"FUSED_SAM_CUDA": "ON", **NO_NVCC},
        [
            "FUSED_SAM_CUDA=ON, but no nvcc was found",
            "They need nvcc of a CUDA toolkit (on PATH, in CUDA_HOME, or named by CUDACXX)",
        ],
    ),
    "no core to read tensors for": (
        {"CXX": "/nowhere/c++", "FUSED_SAM_ATEN": "ON"},
        ["FUSED_SAM_ATEN=ON, but the reader of tensors could not be built (there is no native core)"],
    ),
    "no core asked for": (
        {"FUSED_SAM_NATIVE": "OFF", "FUSED_SAM_ATEN": "ON"},
        ["FUSED_SAM_ATEN=ON, but FUSED_SAM_NATIVE=OFF."],
    ),
    "misspelt mode": ({"FUSED_SAM_NATIVE": "MAYBE"}, ["Invalid FUSED_SAM_NATIVE='MAYBE'"]),
    "our architectures": ({"FUSED_SAM_CUDA_ARCHITECTURES": "9.0 Hopper"}, [HOPPER]),
    "torch's architectures": ({"TORCH_CUDA_ARCH_LIST": "9.0 Hopper"}, [HOPPER]),
}


@needs_build_tools
@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_asked_for_and_cannot_be_built_is_refused_with_the_reason(source: Path, reason: str) -> None:
    environment, sentences = REFUSED[reason]
    built = build_wheel(source, **environment)
    assert built.returncode != 0
    for sentence in sentences:
        assert sentence in built.stdout + built.stderr


@needs_build_tools
@pytest.mark.parametrize(
    ("stand_in", "sentence"),
    [
        ("sys.platform = 'darwin'", "it is for Linux, this is macOS"),
        ("sys.platform = 'win32'", "it is for Linux, this is Windows"),
        ("sys.modules['pybind11'] = None", "pybind11 not installed: pip install pybind11, or leave out"),
        ("setuptools.__version__ = '59.6.0'", "is built by setuptools >= 77, this is 59.6.0: pip install --upgrade"),
    ],
)
def test_a_machine_that_cannot_build_it_is_told_so_in_a_sentence(stand_in: str, sentence: str, source: Path) -> None:
    code = f"""
import runpy, sys, sysconfig, setuptools
sysconfig.get_config_vars()  # of the system that this is
{stand_in}
sys.argv = ["setup.py", "--name"]
command = runpy.run_path("setup.py")["CMakeBuild"](setuptools.Distribution())
command.build_extension(setuptools.Extension("fused_sam._native", []))
"""
    env = os.environ | {"FUSED_SAM_NATIVE": "ON", "FUSED_SAM_CUDA": "OFF"}
    done = subprocess.run([sys.executable, "-c", code], cwd=source, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert sentence in done.stderr.splitlines()[-1]


@needs_build_tools
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_the_source_distribution_has_what_its_tests_need(tmp_path: Path) -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tracked = [name for name in listed.splitlines() if (ROOT / name).exists()]
    for name in tracked:
        (tmp_path / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / "checkout" / name)
    made = subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)],
        cwd=tmp_path / "checkout",
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path, filter="data")
    unpacked = tmp_path / archive.name.removesuffix(".tar.gz")
    assert [name for name in tracked if not (unpacked / name).exists()] == [".gitignore"]
    shutil.copy2(importlib.import_module("fused_sam._native").__file__, unpacked / "fused_sam")
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_reference.py"]
    env = os.environ | {"PYTHONPATH": str(unpacked)}
    done = subprocess.run(tests, cwd=unpacked, env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout[-4000:]
