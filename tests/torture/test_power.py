"""Proof 3: 600 power losses; `make proof-long` has 10,000."""

import inspect

import pytest

from batchgen.storage import Disk
from tests.torture.disks import CALLS, SpoiltDisk
from tests.torture.harness import prove
from tests.torture.power import PowerLossDisk


def test_whatever_a_power_loss_forgets_nothing_is_lost_or_doubled():
    told = prove("tests.torture.power", "--losses", "600")
    assert "losses after success was reported" in told


@pytest.mark.parametrize("disk", [SpoiltDisk, PowerLossDisk])
def test_every_call_of_the_disk_is_under_test(disk: type[Disk]):
    calls = {name for name, _ in inspect.getmembers(Disk, inspect.isfunction) if name[0] != "_"}
    assert calls == set(CALLS)
    assert calls <= vars(disk).keys()
