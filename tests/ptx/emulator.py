"""The emulator's library, and the native core that was built on it, in this process.

The environment says which: PTX_EMULATOR and PTX_NATIVE are their paths. PTX_SETTINGS="seed=3 quantum=100" changes how
threads are run.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

# Several blocks under way, in any order, and every check on. A quantum preempts threads after that many instructions at
# most; without one they run to where they wait for others.
SETTINGS = {"seed": 0, "resident": 3, "quantum": 0, "shuffle": 1, "races": 1, "bounds": 0}


class Emulator:
    """What the tests ask of the library; see ptx/control_panel.cpp."""

    def __init__(self, path: str) -> None:
        # Global: the native core finds the CUDA runtime's symbols in it.
        self.library = library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        library.emulator_reports.restype = library.emulator_launches.restype = ctypes.c_char_p
        library.emulator_load.restype = ctypes.c_void_p
        library.emulator_replay.restype = library.emulator_launch.restype = ctypes.c_bool
        library.emulator_capture.argtypes = library.emulator_replay.argtypes = [ctypes.c_bool]
        library.emulator_fail_after.argtypes = [ctypes.c_int64]
        library.emulator_register.argtypes = [ctypes.c_uint64, ctypes.c_uint64]
        library.emulator_configure.argtypes = [ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32, *[ctypes.c_bool] * 3]
        library.emulator_parameters.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32]
        library.emulator_launch.argtypes = [
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p)
        ]
        self.configure()

    def configure(self, **changed: int) -> None:
        """Set how threads are run, as the environment says but for what is given."""
        said = dict(pair.split("=") for pair in os.environ.get("PTX_SETTINGS", "").split())
        settings = SETTINGS | {name: int(value) for name, value in said.items()} | changed
        self.library.emulator_configure(*(settings[name] for name in SETTINGS))

    def edit(self, change: Callable[[str], str]) -> None:
        """Change the text of all PTX that is loaded from here on."""
        kept = []

        def changed(text: bytes) -> int | None:
            kept.append(ctypes.create_string_buffer(change(text.decode()).encode()))
            return ctypes.addressof(kept[-1])

        self._editor = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(changed)
        self.library.emulator_edit(self._editor)

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """Keep what is launched, as a graph does, rather than run it."""
        self.library.emulator_capture(True)
        yield
        self.library.emulator_capture(False)

    def replay(self, together: bool = False) -> None:
        """Run what was kept: one by one, or side by side as on streams of their own."""
        assert self.library.emulator_replay(together)

    def fail_after(self, good: int) -> None:
        """Have the launch fail that comes after so many; with a negative number none."""
        self.library.emulator_fail_after(good)

    def take_reports(self) -> list[str]:
        """Return what was wrong since it was last asked."""
        return self.library.emulator_reports().decode().splitlines()

    def launches(self) -> dict[str, int]:
        """Return how often each kernel ran."""
        lines = self.library.emulator_launches().decode().splitlines()
        return {name: int(count) for count, name in (line.split(" ", 1) for line in lines)}


class NativeFinder:
    """Gives the core that runs on the emulator for fused_sam's own."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "fused_sam._native":
            return None
        return importlib.util.spec_from_file_location(name, os.environ["PTX_NATIVE"])


def load() -> Emulator:
    """Load the emulator, before anything imports fused_sam."""
    assert "fused_sam" not in sys.modules
    emulator = Emulator(os.environ["PTX_EMULATOR"])
    if "PTX_NATIVE" in os.environ:
        sys.meta_path.insert(0, NativeFinder)
    return emulator
