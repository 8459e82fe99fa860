"""Peak FLOP/s of devices, from their vendors' data sheets."""

from __future__ import annotations

from dataclasses import dataclass

# Dense bf16 tensor-core TFLOP/s; the first entry whose name is part of the device's name applies.
DENSE_BF16_TFLOPS = {
    "B300": 2250.0,
    "B200": 2250.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H20": 148.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
}


@dataclass(frozen=True)
class Peak:
    """Peak operations per second, and the source of the figure."""

    flops_per_second: float
    source: str


def data_sheet_peak(name: str) -> Peak | None:
    """The dense bf16 peak of the device that torch calls `name`, such as "NVIDIA H100 80GB HBM3"; None if unlisted."""
    for known, tflops in DENSE_BF16_TFLOPS.items():
        if known in name:
            return Peak(tflops * 1e12, f"{name}, dense bf16 by data sheet")
    return None
