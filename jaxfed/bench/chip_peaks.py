"""What accelerators can do at most, by their makers' data sheets, and which share of it a benchmark takes."""

from typing import NamedTuple


class ChipPeak(NamedTuple):
    """The most that one chip does in a second."""

    flops: float  # of a GPU in float32, outside of its matrix units; of a TPU in bfloat16
    bytes: float  # to and from its memory


# by what `jax.Device.device_kind` begins with
PEAKS = {
    "NVIDIA H200": ChipPeak(66.9e12, 4.8e12),
    "NVIDIA H100 80GB HBM3": ChipPeak(66.9e12, 3.35e12),
    "NVIDIA A100-SXM4-80GB": ChipPeak(19.5e12, 2.04e12),
    "NVIDIA A100-SXM4-40GB": ChipPeak(19.5e12, 1.56e12),
    "TPU v6 lite": ChipPeak(918e12, 1.6e12),
    "TPU v5 lite": ChipPeak(197e12, 0.82e12),
}


def find_peak(device_kind: str) -> ChipPeak | None:
    """The peak of a chip. None: it is not known, as that of a CPU."""
    return next((peak for kind, peak in PEAKS.items() if device_kind.startswith(kind)), None)


def compare_to_peak(
    device_kind: str, bytes_per_second: float, flops_per_second: float | None
) -> dict[str, float | None]:
    """How much of its peak a chip was used.

    Args:
        device_kind: see `PEAKS`.
        bytes_per_second: what was read and written.
        flops_per_second: what was computed. None: it is not known.

    Returns:
        {name: share of the peak}. None: it is not known. Caches serve some of the bytes, so that it may exceed 1.
    """
    peak = find_peak(device_kind)
    return {
        "share_of_peak_bandwidth": round(bytes_per_second / peak.bytes, 6) if peak else None,
        "share_of_peak_flops": round(flops_per_second / peak.flops, 6) if peak and flops_per_second else None,
    }
