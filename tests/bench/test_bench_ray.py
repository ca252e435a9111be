"""The runner on a Ray cluster of this machine, one worker of which is lost half-way."""

from __future__ import annotations

import json
import threading
import time

import pytest

from anchor_core.bench import runner
from anchor_core.bench.config import parse
from tests.bench.test_bench_runner import SMALL

ray = pytest.importorskip("ray", reason="ray is not installed")

pytestmark = pytest.mark.long


@pytest.fixture
def cluster():
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield made
    ray.shutdown()
    made.shutdown()


def test_a_cluster_that_loses_a_worker_makes_every_cell_once(cluster, tmp_path):
    lost = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    raw = SMALL | {
        "subjects": ["bolt", "pip"],
        "training": {**SMALL["training"], "steps": 12},
        "trainings": {f"w = {w}": {"objective": "anchor", "w": w} for w in (0.25, 0.5, 1.0)},
    }
    config, out = parse(raw), tmp_path / "out"
    seen: dict = {}

    def lose() -> None:
        """When the second cell is there, so that both workers are at work."""
        while len(list((out / "cells").rglob("*.json"))) < 2:
            time.sleep(0.1)
        seen.update({file: file.stat().st_mtime_ns for file in (out / "cells").rglob("*.json")})
        cluster.remove_node(lost, allow_graceful=False)
        seen["lost"] = True

    thread = threading.Thread(target=lose)
    thread.start()
    runner.run(config, out, ray=cluster.address)
    thread.join()
    assert seen.pop("lost")
    cells = [json.loads(file.read_text()) for file in (out / "cells").rglob("*.json")]
    assert {(cell["row"], cell["subject"]) for cell in cells} == {
        (row, subject) for row in config.rows for subject in ("bolt", "pip")
    }
    assert {file: file.stat().st_mtime_ns for file in seen} == seen
    assert not [file for file in out.rglob("*.part")]


def test_a_cluster_that_is_not_there_is_said(tmp_path):
    config = parse(SMALL | {"trainings": {"plain": {}}})
    with pytest.raises(ValueError, match="ray is '127.0.0.1:1', where no cluster answers"):
        runner.run(config, tmp_path / "out", ray="127.0.0.1:1")
