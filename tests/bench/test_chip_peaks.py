"""Shares of what a chip can do."""

import jax
import pytest

from jaxfed.bench.chip_peaks import PEAKS, compare_to_peak, find_peak


def test_a_chip_is_known_by_what_its_kind_begins_with():
    assert find_peak("NVIDIA H100 80GB HBM3").bytes < find_peak("NVIDIA H200").bytes
    assert find_peak("NVIDIA H100 PCIe") is None
    assert find_peak("NVIDIA A100-SXM4-80GB").bytes > find_peak("NVIDIA A100-SXM4-40GB").bytes
    assert find_peak("TPU v5 lite") == PEAKS["TPU v5 lite"]
    assert find_peak(jax.devices("cpu")[0].device_kind) is None


def test_no_kind_hides_a_longer_one():
    kinds = [*PEAKS]
    for place, kind in enumerate(kinds):
        assert not any(later.startswith(kind) for later in kinds[place + 1 :])


def test_a_share_is_of_bytes_and_operations_in_a_second():
    shares = compare_to_peak("NVIDIA H100 80GB HBM3", 0.335e12, 6.69e12)
    assert shares == pytest.approx({"share_of_peak_bandwidth": 0.1, "share_of_peak_flops": 0.1})
    assert compare_to_peak("NVIDIA H200", 1.0, None)["share_of_peak_flops"] is None
    assert set(compare_to_peak("cpu", 1.0, 1.0).values()) == {None}
