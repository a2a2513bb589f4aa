"""What GPUs can do, by their makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sheet:
    """A data sheet's figures: TFLOP/s dense, GB, GB/s in one direction."""

    fp32: float
    tf32: float
    halves: float
    memory: float
    bandwidth: float
    link: float
    network: float
    source: str
    bf16: bool = True


GPUS: dict[str, Sheet] = {
    "V100": Sheet(15.7, 15.7, 125, 32, 900, 150, 12.5, "NVIDIA V100 SXM2 32 GB data sheet; 100 Gb/s NIC", bf16=False),
    "A100-40": Sheet(19.5, 156, 312, 40, 1555, 300, 25, "NVIDIA A100 SXM 40 GB data sheet; 200 Gb/s NIC per GPU"),
    "A100": Sheet(19.5, 156, 312, 80, 2039, 300, 25, "NVIDIA A100 SXM 80 GB data sheet; 200 Gb/s NIC per GPU"),
    "L4": Sheet(30.3, 60, 121, 24, 300, 32, 12.5, "NVIDIA L4 data sheet (dense); PCIe 4 x16, 100 Gb/s NIC"),
    "L40S": Sheet(91.6, 183, 362, 48, 864, 32, 25, "NVIDIA L40S data sheet (dense); PCIe 4 x16, 200 Gb/s NIC"),
    "RTX4090": Sheet(82.6, 82.6, 165, 24, 1008, 32, 12.5, "NVIDIA Ada white paper (dense, fp32 sums); PCIe 4 x16"),
    "H100": Sheet(67, 494, 989, 80, 3350, 450, 50, "NVIDIA H100 SXM data sheet (dense); 400 Gb/s NIC per GPU"),
    "H100-PCIe": Sheet(51, 378, 756, 80, 2000, 64, 50, "NVIDIA H100 PCIe data sheet (dense); PCIe 5 x16"),
    "H200": Sheet(67, 494, 989, 141, 4800, 450, 50, "NVIDIA H200 SXM data sheet (dense); 400 Gb/s NIC per GPU"),
    "GH200": Sheet(67, 494, 989, 96, 4000, 450, 50, "NVIDIA GH200 96 GB data sheet (dense); 400 Gb/s NIC"),
    "B200": Sheet(75, 1100, 2250, 180, 7700, 900, 50, "NVIDIA HGX B200 data sheet, per GPU (dense); 400 Gb/s NIC"),
    "MI300X": Sheet(163.4, 653.7, 1307.4, 192, 5300, 448, 50, "AMD Instinct MI300X data sheet (dense); 400 Gb/s NIC"),
}
"""Links are NVLink or Infinity Fabric, in one direction, where a GPU has them; NICs are what is usual."""

_REPORTED = {
    "H100 PCIe": "H100-PCIe",
    "GH200": "GH200",
    "H100": "H100",
    "H200": "H200",
    "A100-SXM4-40": "A100-40",
    "A100-PCIE-40": "A100-40",
    "A100": "A100",
    "L40S": "L40S",
    "L4": "L4",
    "V100": "V100",
    "RTX 4090": "RTX4090",
    "B200": "B200",
    "MI300X": "MI300X",
}
"""Part of the name that a driver reports -> the table's. The first that fits."""


def peak_flops(reported: str, precision: str, float32_matmul_precision: str = "highest") -> float | None:
    """Operations per second of a device at a training precision, dense; None for a device that is not in the table.

    Args:
        reported: as of `torch.cuda.get_device_name`.
    """
    sheet = next((GPUS[name] for part, name in _REPORTED.items() if part in reported), None)
    if sheet is None:
        return None
    if precision == "fp32":
        return 1e12 * (sheet.fp32 if float32_matmul_precision == "highest" else sheet.tf32)
    return 1e12 * sheet.halves
