"""A training in a real ComfyUI, watched and steered through the node's routes, as a page or any other program does."""

from __future__ import annotations

import io
import json
import time
import urllib.error
import urllib.request
import uuid

import pytest
from PIL import Image

from tests.comfyui import comfy_server
from tests.nodes.graphs import loras, newest_lora, node, training

found = comfy_server.find()
pytestmark = pytest.mark.skipif(isinstance(found, str), reason=str(found))

RUNS = "/semantic_anchor/runs"
MANY = 100_000


def ask(server, path: str, method: str = "GET", body: bytes | None = None, **headers) -> tuple[int, bytes]:
    """Status and answer of a request that names its headers itself."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", body, named, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def queue(server, workflow: str, **changes) -> str:
    """A training queued as a page does it, with the graph's id; gives the prompt's id."""
    prompt = training(**changes) | {"5": node("PreviewAny", source=["4", 4])}
    extra = {"extra_pnginfo": {"workflow": {"id": workflow}}}
    status, answer = server.post("/prompt", {"prompt": prompt, "extra_data": extra})
    assert status == 200, answer
    return answer["prompt_id"]


def until(server, workflow: str, seen, seconds: float = 120):
    """The record of the newest run of a workflow, once `seen(record)`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        listed = server.get(f"{RUNS}?workflow={workflow}&node=4")["runs"]
        record = server.get(f"{RUNS}/{listed[0]['id']}") if listed else None
        if record is not None and seen(record):
            return record
        time.sleep(0.1)
    raise TimeoutError(f"the last record is {record}")


def order(server, run: str, name: str, **numbers) -> tuple[int, dict]:
    return server.post(f"{RUNS}/{run}/orders", {"order": name, **numbers})


@pytest.fixture
def going(server):
    """`going(**changes)`: (prompt, workflow, record) of a training that has made a step; it is ended afterwards."""
    begun = []

    def go(**changes):
        workflow = str(uuid.uuid4())
        prompt = queue(server, workflow, **{"steps": MANY, "seed": len(begun) + 1000, **changes})
        begun.append((prompt, until(server, workflow, lambda each: each["step"] > 0)))
        return prompt, workflow, begun[-1][1]

    yield go
    for prompt, record in begun:
        order(server, record["id"], "stop")
        server.wait(prompt)


def test_every_order_is_answered_and_the_record_tells_it(server, going):
    prompt, workflow, record = going(name="orders", probe_every=0, preview_every=0)
    run = record["id"]
    assert (record["prompt"], record["node"], record["workflow"], record["how"]) == (prompt, "4", workflow, None)
    assert order(server, run, "pause")[0] == 200
    paused = until(server, workflow, lambda each: each["phase"] == "paused")
    assert paused["memory"]["used"] > 0 and paused["seconds_per_step"] > 0
    for name in ("save_now", "picture_now"):
        assert order(server, run, name)[0] == 200
    record = until(server, workflow, lambda each: each["saved"] and each["pictures"])
    assert record["step"] == paused["step"] == record["saved"][0]["step"] == record["pictures"][0]["step"]
    step = record["step"]
    status, answer = ask(server, f"{RUNS}/{run}/pictures/{step}")
    assert status == 200 and Image.open(io.BytesIO(answer)).size == (512, 512)
    assert order(server, run, "extend", steps=20)[0] == 200
    assert order(server, run, "go_on")[0] == 200
    record = until(server, workflow, lambda each: each["step"] > step + 1)
    assert record["steps"] == MANY + 20 and record["phase"] == "training"
    assert order(server, run, "keep", step=step)[0] == 200
    outputs = server.wait(prompt)
    assert comfy_server.failure(outputs) is None  # the graph goes on
    assert outputs["outputs"]["4"]["anchor_run"] == [run]
    record = until(server, workflow, lambda each: each["how"] is not None)
    assert (record["how"], record["kept"]) == ("stopped", step) and record["losses"]["step"][-1] > step
    tensors, metadata, file = newest_lora(server)
    assert file.name == record["file"] and metadata["anchor.steps"] == str(step)
    assert json.loads(file.with_suffix(".run").joinpath("run.json").read_text()) == record
    assert order(server, run, "stop") == (409, {"error": "the training has ended; run it again"})


def test_two_trainings_in_one_graph_and_two_prompts_each_have_their_own(server):
    workflow = str(uuid.uuid4())
    two = training(name="two", seed=1, steps=3) | {"5": node("PreviewAny", source=["4", 4])}
    two["6"] = node("AnchorTrainLoRA", **two["4"]["inputs"] | {"seed": 2})
    two["7"] = node("PreviewAny", source=["6", 4])
    extra = {"extra_pnginfo": {"workflow": {"id": workflow}}}
    first = server.post("/prompt", {"prompt": two, "extra_data": extra})[1]["prompt_id"]
    two["4"]["inputs"]["seed"] = 3
    second = server.post("/prompt", {"prompt": two, "extra_data": extra})[1]["prompt_id"]
    outputs = [server.wait(prompt)["outputs"] for prompt in (first, second)]
    listed = server.get(f"{RUNS}?workflow={workflow}")["runs"]
    assert {(each["prompt"], each["node"]) for each in listed} == {(first, "4"), (first, "6"), (second, "4")}
    told = {(each["prompt"], each["node"]): each["id"] for each in listed}
    assert outputs[0]["4"]["anchor_run"] == [told[first, "4"]] and outputs[0]["6"]["anchor_run"] == [told[first, "6"]]
    assert outputs[1]["6"]["anchor_run"] == [told[first, "6"]]  # cached, and it says so
    assert len({each["file"] for each in listed}) == 3
    assert [each["begun"] for each in listed] == sorted((each["begun"] for each in listed), reverse=True)


def test_a_cancel_and_a_failure_are_recorded_as_what_they_are(server, going):
    prompt, workflow, record = going(name="cancelled")
    server.post("/interrupt", {})
    assert comfy_server.failure(server.wait(prompt)) == "interrupted"
    record = until(server, workflow, lambda each: each["how"] is not None)
    assert record["how"] == "cancelled" and record["step"] == record["kept"] == record["losses"]["step"][-1]

    workflow, files = str(uuid.uuid4()), {file.name for file in (server.base / "output/loras").iterdir()}
    prompt = queue(server, workflow, name="refused", objective="class_diffusion")
    assert "text side" in comfy_server.failure(server.wait(prompt))
    record = until(server, workflow, lambda each: each["how"] is not None)
    assert record["how"] == "failed" and "text side" in record["reason"] and record["step"] == 0
    assert {file.name for file in (server.base / "output/loras").iterdir()} == files  # nothing was begun


def test_what_comfyui_left_when_it_ended_is_told_as_failed(server):
    folder = server.base / "output/loras/deep/left_00001_.run"
    folder.mkdir(parents=True)
    left = {"id": "0123", "begun": 1, "how": None, "phase": "training", "reason": "", "step": 7, "node": "4",
            "workflow": "w-left", "pictures": [{"step": 5}], "saved": [], "losses": {}, "probes": {}}  # fmt: skip
    (folder / "run.json").write_text(json.dumps(left))
    (folder / "step-000005.jpg").write_bytes(b"a picture")
    record = server.get(f"{RUNS}/0123")
    assert (record["how"], record["phase"], record["step"]) == ("failed", "ended", 7)
    assert record["reason"] == "ComfyUI ended before the training did"
    assert server.get(f"{RUNS}?workflow=w-left")["runs"][0]["how"] == "failed"
    assert ask(server, f"{RUNS}/0123/pictures/5") == (200, b"a picture")
    assert ask(server, f"{RUNS}/0123/pictures/6")[0] == 404
    (folder / "run.json").write_text("{")  # as a disk full leaves one of another program
    assert ask(server, f"{RUNS}/0123")[0] == 404
    (folder / "run.json").unlink()
    assert server.get(f"{RUNS}?workflow=w-left") == {"runs": []}


def test_unknown_runs_and_paths_are_not_found(server):
    (server.base / "output/secret.json").write_text("{}")
    for run in ("nothing", "..%2F..%2Fsecret", "%2Fetc", "loras", "%00"):
        for path, method in ((f"{RUNS}/{run}", "GET"), (f"{RUNS}/{run}/pictures/1", "GET")):
            assert ask(server, path, method)[0] == 404, path
        assert ask(server, f"{RUNS}/{run}/orders", "POST", b"{}", Content_Type="application/json")[0] == 404
    assert ask(server, f"{RUNS}/x/pictures/..%2Frun.json")[0] == 404


def test_only_the_expected_method_of_an_own_page_is_taken(server, going):
    _, _, record = going(name="origins")
    orders, one = f"{RUNS}/{record['id']}/orders", f"{RUNS}/{record['id']}"
    host = f"127.0.0.1:{server.port}"
    asked = {"body": b'{"order": "stop"}', "Content_Type": "application/json"}
    assert ask(server, orders)[0] == 404  # ComfyUI looks for a file where no GET is known
    assert ask(server, one, "DELETE")[0] == ask(server, one, "POST", b"{}")[0] == ask(server, RUNS, "PUT")[0] == 405
    for foreign in (
        {"Sec_Fetch_Site": "cross-site"}, {"Sec_Fetch_Site": "same-site"}, {"Origin": "http://evil.example"},
        {"Origin": "http://127.0.0.1:9999"}, {"Origin": "null"},
    ):  # fmt: skip
        for path, method, body in ((orders, "POST", asked), (one, "GET", {}), (RUNS, "GET", {})):
            assert ask(server, path, method, **body, **foreign)[0] == 403, (path, foreign)
    assert ask(server, orders, "POST", asked["body"], Content_Type="text/plain")[0] == 415
    for own in ({"Sec_Fetch_Site": "same-origin", "Origin": f"http://{host}"}, {"Origin": f"http://{host}"}, {}):
        assert ask(server, one, **own)[0] == 200
    assert until(server, record["workflow"], lambda each: each["step"] > record["step"])["how"] is None


def test_what_is_no_order_is_refused_in_a_sentence(server, going):
    _, _, record = going(name="refusals")
    for body, why in (
        ({}, "order is 'None', but it takes one of stop, pause"),
        ([], "order is 'None', but"),
        ({"order": "__init__"}, "order is '__init__', but"),
        ({"order": ["stop"]}, "order is \"['stop']\", but"),
        ({"order": "extend"}, "steps is None, but it takes a whole number"),
        ({"order": "keep", "step": [1]}, r"step is [1], but it takes a whole number"),
        ({"order": "keep", "step": 1}, "step is 1, whose weights were not saved"),
    ):
        status, answer = server.post(f"{RUNS}/{record['id']}/orders", body)
        assert status == 400 and answer["error"].startswith(why), answer
    assert ask(server, f"{RUNS}/{record['id']}/orders", "POST", b"{", Content_Type="application/json")[0] == 400
    assert loras(server)  # and the training was not disturbed
    assert server.get(f"{RUNS}/{record['id']}")["how"] is None


@pytest.mark.parametrize("file", sorted(path.name for path in (comfy_server.ROOT / "web").glob("*js")))
def test_a_page_asks_for_every_script_again(server, file):
    """A module of the version before, kept by the browser, does not fit a script of the new one."""
    url = f"http://127.0.0.1:{server.port}/extensions/{comfy_server.PACK}/{file}"
    with urllib.request.urlopen(url, timeout=60) as answer:
        kept, mark = answer.headers["Cache-Control"], answer.headers["ETag"]
    assert kept in ("no-cache", "no-store")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(url, headers={"If-None-Match": mark}), timeout=60)
    assert refused.value.code == 304
