"""The energy that a device has used, where it tells: NVIDIA's counter through NVML, Intel's and AMD's through RAPL."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

_POWERCAP = Path("/sys/class/powercap")


class Meter(Protocol):
    """A counter of energy."""

    def joules(self) -> float:
        """Energy used since some fixed time; only differences mean anything."""


def meter_of(device: torch.device) -> Meter | None:
    """The counter of a GPU (package ``nvidia-ml-py``), or of the processor; None where none can be read."""
    if device.type != "cuda":
        return Rapl.find(_POWERCAP)
    try:
        return _Nvml(device)
    except Exception:  # no pynvml, an old driver, or a GPU without the counter
        return None


class _Nvml:
    """Volta and later: ``nvmlDeviceGetTotalEnergyConsumption``, in millijoules since the driver was loaded."""

    def __init__(self, device: torch.device) -> None:
        import pynvml

        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"  # indices of NVML ignore CUDA_VISIBLE_DEVICES
        self._nvml: Any = pynvml
        self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        self.joules()

    def joules(self) -> float:
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3


class Rapl:
    """The processor packages in the kernel's powercap interface, in microjoules; most systems let only root read it.

    https://docs.kernel.org/power/powercap/powercap.html

    Args:
        zones: folders of the packages, each with ``energy_uj`` and ``max_energy_range_uj``.
    """

    def __init__(self, zones: list[Path]) -> None:
        self._zones = zones
        self._last = [_number(zone / "energy_uj") for zone in zones]
        self._ranges = [_number(zone / "max_energy_range_uj") for zone in zones]
        self._total = 0

    @classmethod
    def find(cls, powercap: Path) -> Rapl | None:
        """The packages below this folder; None if there is none, or one cannot be read."""
        try:
            return (
                cls(zones)
                if (zones := sorted(z for z in powercap.glob("intel-rapl:*") if z.name.count(":") == 1))
                else None
            )
        except (OSError, ValueError):
            return None

    def joules(self) -> float:
        """Energy since this object was created; the counters wrap around."""
        now = [_number(zone / "energy_uj") for zone in self._zones]
        for before, after, whole in zip(self._last, now, self._ranges, strict=True):
            self._total += after - before if after >= before else after - before + whole
        self._last = now
        return self._total / 1e6


def _number(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))
