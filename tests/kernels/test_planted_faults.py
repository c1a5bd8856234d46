"""The faults are planted by hand (planted_faults.py); here, that each still has a place to be planted."""

import runpy
from pathlib import Path


def test_every_fault_still_has_its_place_and_changes_it():
    found = runpy.run_path(str(Path(__file__).with_name("planted_faults.py")))
    faults = found["FAULTS"]
    assert found["moved"](faults) == []
    assert len({name for name, *_ in faults}) == len(faults) and all(old != new for _, _, old, new, *_ in faults)
