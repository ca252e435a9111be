"""The runner with several processes on one machine."""

from __future__ import annotations

import pytest

from anchor_core.bench import results, runner
from anchor_core.bench.config import parse
from tests.bench.test_bench_runner import SMALL

pytestmark = pytest.mark.long


def test_two_processes_make_the_cells_of_one(tmp_path):
    config = parse(
        SMALL | {"subjects": ["bolt", "pip"], "trainings": {"plain": {"objective": "reconstruction"}, "anchored": {}}}
    )
    found = []
    for jobs in (1, 2):
        runner.run(config, tmp_path / str(jobs), jobs=jobs)
        _, cells = results.read(tmp_path / str(jobs))
        assert not cells.missing and not cells.failed
        found.append({key: (cell["scores"], cell["by_picture"]) for key, cell in cells.by_key.items()})
    assert found[0] == found[1]
