"""Damaged checkpoints by the hundred: the training ends as the unbroken one, or in one sentence, in time.

Whatever befalls the contents of a checkpoint is noticed by its seal, so that none of the first two kinds goes on to
another end. Contents that somebody changed and sealed anew may do that, but no more.
"""

from __future__ import annotations

import os

import pytest

from tests.data.cases import run_cases
from tests.reliability import hostile_checkpoints

CASES = {"bytes": 130, "structure": 50, "tampered": 130}


@pytest.mark.long
@pytest.mark.parametrize("kind", CASES)
def test_checkpoints(tmp_path, kind):
    good = ("unbroken", "refused") if kind != "tampered" else ("unbroken", "refused", "otherwise", "diverged")
    cases = min(CASES[kind], int(os.environ.get("ANCHOR_CASES", CASES[kind])))
    told, wrong = run_cases(hostile_checkpoints.__file__, kind, cases, good, tmp_path, start=300)
    assert not wrong, "\n".join(wrong)
    assert told["unbroken"] and told["refused"]
