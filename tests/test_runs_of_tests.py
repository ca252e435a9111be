"""What runs the suites: the versions at the ends of what is allowed, and the counts of the long tests."""

from __future__ import annotations

import re

from tests import bounds, long_run


def test_the_lowest_versions_are_those_of_pyproject_and_torch_is_pinned():
    lowest, newest = (bounds.requirements(end) for end in ("lowest", "newest"))
    assert lowest[0] == newest[0] and lowest[0].startswith("torch==")
    assert len(lowest) == len(newest) > 12
    assert all(re.fullmatch(r"[\w.-]+==[\d.]+", each) for each in lowest), lowest
    assert [re.split("[=>]=", each)[0] for each in lowest] == [re.split("[=>]=", each)[0] for each in newest]


def test_counts_are_found_in_what_a_file_prints():
    printed = [
        "disk, ENOSPC: 40 cases, 3 finished all the same, 37 refused in one sentence, 0 wrong",
        "soak: 200 trainings of 7 kinds and 6 objectives, 54 finished; 485 MB after the first",
        "155 inputs of 15 nodes; outside of the folder: 0",
        "loading a LoRA of 62 MB: 298 MB at most, 298 without the checks",
    ]
    assert all(long_run.COUNT.match(line) for line in printed)
    assert not long_run.COUNT.match("memory, seed 3: ValueError: it had 3 cases")
    told = {"file": "a.py", "printed": printed[:1], "ended": "1 passed", "seconds": 1234}
    assert f"| `a.py` | {printed[0]} | 1 passed | 1,234 |" in long_run.table([told])
