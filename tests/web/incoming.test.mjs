import assert from "node:assert/strict"
import { test } from "node:test"

import { assetOf, filesOf, inputOf, mayHold, placeOf, upload, viewOf } from "../../web/incoming.mjs"

const HERE = "http://127.0.0.1:8188"
const ASSET = "application/x-comfy-asset-info"
const transfer = (data) => ({ types: Object.keys(data), getData: (kind) => data[kind] ?? "" })

function server(status = 200) {
  const taken = []
  const fetchApi = async (path, { method, body }) => {
    taken.push([path, method, Object.fromEntries([...body].map(([name, value]) => [name, value.name ?? value]))])
    const made = { name: "dog (1).png", subfolder: body.get("subfolder"), type: "input" }
    return { ok: status === 200, status, statusText: "Too large", json: async () => made }
  }
  return { taken, fetchApi, apiURL: (path) => `/api${path}` }
}

test("what can hold pictures is taken, text is not", () => {
  for (const kind of ["Files", ASSET, "text/uri-list"]) assert.ok(mayHold(transfer({ [kind]: "" })), kind)
  for (const other of [transfer({ "text/plain": "x" }), null, undefined]) assert.ok(!mayHold(other))
})

test("a picture of the assets panel or of a node is the file that it shows", () => {
  const asset = { filename: "a.png", subfolder: "b", type: "output" }
  assert.deepEqual(assetOf(transfer({ [ASSET]: JSON.stringify(asset) }), HERE), asset)
  const view = `${HERE}/api/view?filename=a.png&subfolder=b&type=output&rand=1`
  assert.deepEqual(assetOf(transfer({ "text/uri-list": `${view}\n#more` }), HERE), asset)
  assert.equal(assetOf(transfer({ "text/uri-list": `${HERE}/view?filename=a.png` }), HERE).type, "output")
})

test("pictures of other pages, and what is none, are left", () => {
  for (const uri of ["http://evil.example/view?filename=a.png", `${HERE}/other?filename=a.png`, `${HERE}/view`, "x", ""]) {
    assert.equal(assetOf(transfer({ "text/uri-list": uri }), HERE), null, uri)
  }
  assert.equal(assetOf(transfer({ [ASSET]: "{" }), HERE), null)
  assert.equal(assetOf(transfer({ [ASSET]: "{}" }), HERE), null)
})

test("a name of the input folder is a place for ComfyUI's routes", () => {
  assert.deepEqual(placeOf("a/b/dog.png"), { filename: "dog.png", subfolder: "a/b", type: "input" })
  assert.deepEqual(placeOf("dog.png [input]"), { filename: "dog.png", subfolder: "", type: "input" })
  assert.equal(viewOf(server(), placeOf("a/d g.png")), "/api/view?filename=d+g.png&subfolder=a&type=input")
})

test("a file is copied by ComfyUI's route, and has the name that this gives", async () => {
  const api = server()
  assert.equal(await upload(api, new File(["x"], "dog.png")), "semantic_anchor/dog (1).png")
  const said = { image: "dog.png", type: "input", subfolder: "semantic_anchor" }
  assert.deepEqual(api.taken, [["/upload/image", "POST", said]])
  await assert.rejects(upload(server(413), new File(["x"], "dog.png")), /413 Too large/)
})

test("what is in the input folder already is not copied", async () => {
  const api = server()
  assert.equal(await inputOf(api, { filename: "a.png", subfolder: "b", type: "input" }), "b/a.png")
  assert.equal(await inputOf(api, { filename: "a.png", type: "input" }), "a.png")
  assert.deepEqual(api.taken, [])
})

test("a folder that is dropped is its files, those of folders in it too", async () => {
  const file = (name) => ({ isFile: true, file: (done) => done(new File([name], name)) })
  const folder = (...parts) => ({
    createReader: () => ({ readEntries: (done) => done(parts.splice(0, 2)) }), // some at a time
  })
  const item = (entry) => ({ kind: "file", webkitGetAsEntry: () => entry })
  const inner = folder(file("c.png"))
  const items = [item(file("a.png")), { kind: "string" }, item(folder(file("b.png"), inner, file("d.png")))]
  const found = await filesOf({ items })
  assert.deepEqual(found.map(({ name }) => name), ["a.png", "b.png", "c.png", "d.png"])
})
