"""A driver for Triton whose GPU is the emulator: kernels are compiled as for a real one, and run on CPU tensors."""

from __future__ import annotations

import ctypes
import functools
import struct
from typing import Any

from ptx import bounds
from ptx.emulator import Emulator

FORMATS = {"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u32": "I", "u64": "Q", "fp32": "f", "fp64": "d"}


class Utils:
    """What Triton asks of a driver about kernels and devices."""

    def __init__(self, emulator: Emulator) -> None:
        self.emulator = emulator

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """Return handles of the module and the kernel, its registers and spills, and its most threads."""
        loaded = self.emulator.library.emulator_load(kernel, name.encode())
        if not loaded:
            raise RuntimeError(f"the emulator cannot load {name}: {self.emulator.take_reports()}")
        return loaded, loaded, 0, 0, 1024

    def unload_module(self, module: int) -> None: ...

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 101376, "multiprocessor_count": 108, "warpSize": 32, "max_num_regs": 65536}


class Launcher:
    """One kernel's launches."""

    def __init__(self, emulator: Emulator, source: Any, metadata: Any) -> None:
        self.emulator = emulator
        assert metadata.global_scratch_size == 0
        self.types = list(source.signature.values())
        self.name, self.shared, self.threads = metadata.name, metadata.shared, 32 * metadata.num_warps

    def __call__(self, x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
        if x * y * z == 0:
            return
        _metadata, _data, _enter, _leave, *given = rest
        library = self.emulator.library
        places = (ctypes.c_uint32 * 128)()
        count = library.emulator_parameters(function, places, 64)
        buffer = bytearray(places[2 * count - 2] + places[2 * count - 1])
        values = [(kind, value) for kind, value in zip(self.types, given, strict=True) if kind != "constexpr"]
        # Behind them come addresses of scratch memory, which these kernels have none of.
        for k, (kind, value) in enumerate(values):
            packed_value = self._as_bytes(kind, value)
            offset, size = places[2 * k : 2 * k + 2]
            assert len(packed_value) == size, (self.name, kind)
            buffer[offset : offset + size] = packed_value
        memory = (ctypes.c_char * len(buffer)).from_buffer(buffer)
        if not library.emulator_launch(function, (ctypes.c_uint32 * 3)(x, y, z), self.threads, self.shared, memory):
            raise RuntimeError(f"{self.name} was stopped: {self.emulator.take_reports()}")

    def _as_bytes(self, kind: str, value: Any) -> bytes:
        if not kind.startswith("*"):
            return struct.pack(FORMATS[kind], value)
        if not hasattr(value, "data_ptr"):
            return struct.pack("Q", value or 0)
        bounds.register(self.emulator, bounds.spans(value))
        return struct.pack("Q", value.data_ptr())


class Driver:
    """The one GPU there is."""

    def __init__(self, emulator: Emulator, architecture: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.utils, self.target = Utils(emulator), GPUTarget("cuda", architecture, 32)
        self.launcher_cls = functools.partial(Launcher, emulator)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def install(emulator: Emulator, architecture: int) -> None:
    """Make Triton, and the backend that uses it, take CPU tensors for this process."""
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime import driver

    # PTX is what the emulator runs: no machine code is made of it.
    CUDABackend.make_cubin = lambda self, source, *_: source.encode()
    driver.set_active(Driver(emulator, architecture))

    from fused_sam.backends import triton as backend

    backend.why_not = lambda device_type: None if device_type == "cpu" else "the emulator is for CPU tensors"
