"""Whether data that are made fit into the machine: found before they are made, and said in one line."""

import jax
import psutil


def device_memory() -> int:
    """Bytes of one device; where the device does not say, those that are free on the machine."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or free_memory()


def free_memory() -> int:
    """Bytes of the machine that programs may still take."""
    return psutil.virtual_memory().available


def check_room(need: float, mend: str) -> None:
    """Raises ValueError where there is no memory to make data.

    Args:
        need: bytes that making them takes.
        mend: what to lower.
    """
    if need > (free := free_memory()):
        raise ValueError(
            f"data of this size take {need / 1e9:,.1f} GB to make, {free / 1e9:,.1f} GB are free: lower {mend}"
        )
