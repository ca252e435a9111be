"""The runner on the embedded model: every cell is made once, and a second start goes on."""

from __future__ import annotations

import json

import numpy as np
import pytest

from anchor_core import cli
from anchor_core.bench import results, runner
from anchor_core.bench.cells import cell_file, slug
from anchor_core.bench.config import parse, read_config
from anchor_core.bench.rows import ORACLE, PRETRAINED, UNTRAINED
from anchor_core.bench.work import common_of, jobs_of

SMALL = {
    "subjects": ["bolt"],
    "seeds": [1],
    "training": {"steps": 2, "probe_every": 1, "class_pictures": 2, "batch_size": 1, "learning_rate": 1e-2},
    "sampling": {"steps": 2},
    "probe": {"timesteps": 1, "noises": 1, "class_pictures": 2},
}
ROWS = {
    "at": [1],
    "trainings": {
        "plain": {"objective": "reconstruction"}, "word": {"method": "textual_inversion", "initial": "{class}"},
    },
    "samplings": {
        "early": {"of": ["plain"], "rule": "autoguidance", "early": True},
        "mixed": {"of": ["plain"], "rule": "mixed"},
        "{adjust}": {"of": ["plain"], "adjust": ["token"]},
        "adjusted": {"of": ["word"], "adjust": "vectors"},
    },
    "claims": [{"name": "n", "of": "word", "against": "plain", "score": "drift", "expect": "lower"}],
    "figures": [
        {"name": "f", "lines": {"plain": "plain"}}, {"name": "g", "lines": {"plain": "plain"}, "curves": ["drift"]},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "out"
    config = parse(SMALL | ROWS)
    runner.run(config, out, jobs=1)
    return config, out


def cells(out) -> dict[str, dict]:
    found = [json.loads(file.read_text()) for file in (out / "cells").rglob("*.json")]
    return {cell["row"]: cell for cell in found}


def times(out) -> dict:
    return {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file()}


def test_every_cell_is_there_and_tells_its_scores(made):
    config, out = made
    found = cells(out)
    assert set(found) == set(config.rows)
    plain = found["plain"]
    assert set(plain["scores"]) == {"1", "2"} and set(found[PRETRAINED]["scores"]) == {"0"}
    scores = {"subject_fidelity", "picture_similarity", "text_alignment", "background", "drift", "drift_class"}
    assert scores <= set(plain["scores"]["2"]) and scores <= set(plain["scores"]["1"])
    assert len(plain["by_picture"]["text_alignment"]) == 25
    assert sum(plain["by_picture"]["text_alignment"]) / 25 == pytest.approx(plain["scores"]["2"]["text_alignment"])
    assert [point["step"] for point in plain["curve"]] == [0, 1, 2]
    assert plain["curve"][-1]["drift"] == pytest.approx(plain["scores"]["2"]["drift"], rel=1e-4)
    sampled = [row for row in config.rows if row.startswith("plain + ")]
    assert {found[row]["scores"]["2"]["drift"] for row in sampled} == {plain["scores"]["2"]["drift"]}
    assert len({found[row]["scores"]["2"]["subject_fidelity"] for row in ("plain", *sampled)}) == 1 + len(sampled)
    word = found["word + adjusted"]["scores"]["2"]
    assert word["drift"] != found["word"]["scores"]["2"]["drift"]
    assert found["word"]["options"]["initial"] == "{class}"


def test_a_cell_is_what_its_case_measures(made):
    """The same training and sampling without the runner, as the demo does it."""
    from anchor_core.backends.diffusers.denoiser import DiffusersDenoiser
    from anchor_core.bench.case import Case
    from anchor_core.bench.subjects import SandboxSubject
    from anchor_core.sandbox import model
    from anchor_core.sandbox.judge import Judge

    config, out = made
    case = Case(DiffusersDenoiser.from_pretrained(model.WEIGHTS), SandboxSubject("bolt", Judge()), 1, config)
    case.train(config.trainings["plain"], lambda event: None)
    scores, _ = case.score()
    wanted = cells(out)["plain"]["scores"]["2"]
    assert {name: wanted[name] for name in scores} == pytest.approx(scores, abs=1e-5)
    assert case.concept.subject_prompt == "a photo of a sks square"


def test_a_second_start_makes_what_is_missing_and_nothing_else(made):
    config, out = made
    before, first = times(out), cells(out)
    runner.run(config, out, jobs=1)
    kept = times(out)
    assert {file: time for file, time in kept.items() if file.name != "config.json"} == {
        file: time for file, time in before.items() if file.name != "config.json"
    }
    gone = cell_file(out, "plain + mixed", "bolt", 1)
    gone.unlink()
    runner.run(config, out, jobs=1)  # by the adapter's file
    again = cells(out)
    assert again["plain + mixed"]["scores"]["2"] == pytest.approx(first["plain + mixed"]["scores"]["2"])
    changed = {file for file, time in times(out).items() if before.get(file) != time and file.name != "config.json"}
    assert changed == {gone}


def test_a_changed_config_is_refused_and_an_added_row_is_not(made):
    config, out = made
    for changed, told in (
        ({"sampling": {"steps": 3}}, "sampling: steps is 2 there and 3 here"),
        ({"training": {**SMALL["training"], "learning_rate": 0.5}}, "learning_rate is 0.01 there and 0.5 here"),
        ({"trainings": {"plain": {"objective": "anchor"}}, "samplings": {}, "claims": [], "figures": []},
         "plain: objective is reconstruction there and its default here"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            runner.run(parse(SMALL | ROWS | changed), out, jobs=1)
    more = parse(SMALL | ROWS | {"subjects": ["bolt", "pip"], "seeds": [1, 2]})
    runner.run(more, out, subjects=["bolt"], seeds=[1], jobs=1)
    _, held = results.read(out)
    assert len(held.by_key) == len(config.rows) and len(held.missing) == 3 * len(config.rows)
    runner.run(config, out, jobs=1)


def test_the_report_is_made_of_the_stored_cells_alone(made, tmp_path, capsys):
    config, out = made
    assert cli.main(["bench", "report", str(out), "--out", str(tmp_path / "report")]) == 0
    written = json.loads((tmp_path / "report" / "report.json").read_text())
    assert written["missing"] == [] and set(written["rows"]) == set(config.rows)
    assert written["claims"][0]["verdict"] == "not shown"  # of one subject
    for plot in written["figures"]:
        assert (tmp_path / "report" / plot).stat().st_size > 5000
    text = (tmp_path / "report" / "report.md").read_text()
    assert text in capsys.readouterr().out and f"{len(config.rows)} of {len(config.rows)} cells" in text
    assert "## After 1 steps" in text and "Difference to plain, run by run" in text


def test_the_oracle_follows_every_prompt_and_has_no_place(made):
    _, out = made
    oracle, text = cells(out)[ORACLE], results.write(out, out)
    assert set(oracle["scores"]["0"]) == set(cells(out)[PRETRAINED]["scores"]["0"]) - {"drift", "drift_class"}
    assert oracle["scores"]["0"]["subject_fidelity"] > 0.8 and oracle["scores"]["0"]["background"] == 1
    changed, kept = (np.mean(oracle["by_picture"]["subject_fidelity"][part]) for part in (slice(20, 23), slice(20)))
    assert changed < kept - 0.1
    assert [line for line in text.splitlines() if line.startswith(f"| {ORACLE} | 1 |") and line.endswith("|  |  |")]
    assert len([line for line in text.splitlines() if ORACLE in line]) == 2  # a line a table, none of differences


def test_pictures_are_kept_of_every_row(tmp_path):
    raw = SMALL | {"trainings": {"plain": {}}, "keep_pictures": True}
    runner.run(parse(raw), tmp_path / "out", rows=[PRETRAINED, ORACLE], jobs=1)
    kept = [file.parent.parent.parent.name for file in (tmp_path / "out/pictures").rglob("*.png")]
    assert {row: kept.count(row) for row in kept} == {slug(row): 25 for row in (PRETRAINED, ORACLE)}


def test_a_training_that_diverges_is_named_and_left_out(tmp_path):
    raw = SMALL | {"trainings": {"plain": {}, "wild": {"learning_rate": 1e30, "grad_clip": 0}}}
    runner.run(parse(raw), tmp_path / "out", rows=["plain", "wild"], jobs=1)
    text = results.write(tmp_path / "out", tmp_path / "out")
    assert "Left out: wild, bolt, seed 1 (" in text and "| wild |" not in text and "| plain | 1 |" in text


def test_what_fails_is_told_after_the_others_are_made(tmp_path):
    raw = SMALL | {"trainings": {"deep": {"rank": 4096}, "plain": {}}}
    with pytest.raises(ValueError, match="1 of 4 jobs failed, first deep, bolt, seed 1"):
        runner.run(parse(raw), tmp_path / "out", jobs=1)
    assert set(cells(tmp_path / "out")) == {"plain", PRETRAINED, ORACLE}
    assert "Traceback" in (tmp_path / "out" / "failed.txt").read_text()


def test_processes_have_jobs_of_their_own(tmp_path):
    config = parse(SMALL | {"trainings": {"plain": {}}})
    runner.run(config, tmp_path / "out", jobs=2, devices=["cpu"])
    assert set(cells(tmp_path / "out")) == {"plain", PRETRAINED, ORACLE}


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="holds something else than a benchmark"):
        runner.run(parse(SMALL | ROWS), tmp_path, jobs=1)
    with pytest.raises(ValueError, match="rows is 'none', but it takes one of"):
        runner.run(parse(SMALL | ROWS), tmp_path / "out", rows=["none"])
    with pytest.raises(ValueError, match=r"which holds no config\.json"):
        results.read(tmp_path)


def test_the_command_line_runs_a_config(tmp_path, capsys):
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(SMALL | {"trainings": {"plain": {}}}))
    run = ["bench", "run", str(file), "--out", str(tmp_path / "out"), "--jobs", "1", "--rows", PRETRAINED]
    assert cli.main(run) == 0
    assert "1 of 3 cells" in capsys.readouterr().out
    assert cli.main([*run, "--subjects", "nobody"]) == 2
    assert "--subjects: subjects is 'nobody'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["bench"])
    assert "run,report,speed" in capsys.readouterr().err


def test_jobs_stay_together_by_subject_and_a_cell_knows_its_options():
    config = read_config("methods")
    jobs = jobs_of(config, ["pip", "momo"], [0, 1], config.rows)
    assert [(job.subject, job.seed) for job in jobs[:: len(UNTRAINED) + len(config.trainings)]] == [
        ("pip", 0), ("pip", 1), ("momo", 0), ("momo", 1),
    ]  # fmt: skip
    assert "batch" not in common_of(config)["sampling"]
