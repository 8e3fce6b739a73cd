"""What NVML tells of the GPU that CUDA calls the first: memory of a process, energy, power, clocks. Else all None.

Needs nvidia-ml-py (module pynvml). See https://docs.nvidia.com/deploy/nvml-api/.
"""

import os
from functools import cache
from typing import Any


@cache
def _nvml() -> tuple[Any, Any] | None:
    """The module and the handle of the first GPU in CUDA_VISIBLE_DEVICES, which NVML itself does not read."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    try:
        import pynvml

        pynvml.nvmlInit()
        by_index = first.isdecimal()
        return pynvml, (
            pynvml.nvmlDeviceGetHandleByIndex(int(first)) if by_index else pynvml.nvmlDeviceGetHandleByUUID(first)
        )
    except Exception:  # missing module, driver or GPU: each has its own class, none of them importable without it
        return None


def process_bytes(pid: int) -> int | None:
    """GPU memory that a process holds, its CUDA context included."""
    found = _nvml()
    if found is None:
        return None
    nvml, handle = found
    try:
        processes = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except nvml.NVMLError:
        return None
    return next((process.usedGpuMemory for process in processes if process.pid == pid), None)


def energy_j() -> float | None:
    """Energy that the GPU has taken since its driver was loaded, in joules."""
    found = _nvml()
    if found is None:
        return None
    nvml, handle = found
    try:
        return nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
    except nvml.NVMLError:  # older than Volta
        return None


def clock_mhz() -> int | None:
    """Clock of the multiprocessors now."""
    found = _nvml()
    if found is None:
        return None
    nvml, handle = found
    try:
        return nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)
    except nvml.NVMLError:
        return None
