import assert from "node:assert/strict"
import { test } from "node:test"

import { Records } from "../../web/records.mjs"

const settled = () => new Promise((done) => setTimeout(done, 5))

/** A page with nodes 4 and 7, and a server that holds `records`. */
function page(records) {
  const nodes = [4, 7].map((id) => ({ id, properties: {} }))
  const graph = { id: "w", getNodeById: (id) => nodes.find((node) => node.id === id) }
  const asked = []
  const api = {
    async fetchApi(path, options) {
      asked.push(path)
      const id = path.split("/").at(-1)
      const listed = path.includes("?") && { runs: records.map(({ losses, ...header }) => header) }
      const found = listed || records.find((record) => record.id === id)
      return { ok: Boolean(found), json: async () => found ?? { error: "there is no run" } }
    },
  }
  const shown = nodes.map(() => [])
  const made = new Records({ rootGraph: graph }, api)
  nodes.forEach((node, i) => {
    made.add(node, { show: (record) => shown[i].push(record.id), head: (run) => shown[i].push(`${run.id}'`) })
  })
  return { made, nodes, shown, asked }
}

const record = (id, node, begun, more) => ({ id, node, begun, workflow: "w", losses: {}, ...more })
const header = ({ losses, ...rest }) => rest

test("an event reaches its own node, in its own graph, alone", async () => {
  const runs = [record("a", "4", 1), record("b", "7", 2), record("c", "4", 3, { workflow: "elsewhere" })]
  const { made, shown } = page(runs)
  runs.forEach((run) => made.heard(header(run)))
  await settled()
  assert.deepEqual(shown, [["a'", "a"], ["b'", "b"]])
})

test("the second of two queued prompts takes the node over, and the first does not take it back", async () => {
  const [first, second] = [record("a", "4", 1), record("b", "4", 2)]
  const { made, shown, nodes } = page([first, second])
  made.heard(header(first))
  await settled()
  made.heard(header(second))
  made.heard(header(first))
  assert.deepEqual(shown[0], ["a'", "a", "b'"])
  assert.equal(nodes[0].properties.anchor_run, "b")
})

test("a load shows the newest run of each node", async () => {
  const { made, shown, asked } = page([record("a", "4", 1), record("b", "4", 2)])
  await made.restore()
  await settled()
  assert.deepEqual(shown, [["b'", "b"], []])
  assert.equal(asked[0], "/semantic_anchor/runs?workflow=w")
})

test("a graph that was saved under another id finds its run by the node's property, a copy of the node does not", async () => {
  const { made, shown, nodes } = page([record("a", "4", 1, { workflow: "before" })].map((each) => ({ ...each })))
  nodes.forEach((node) => (node.properties.anchor_run = "a"))
  made.api.fetchApi = ((ask) => (path) => (path.includes("?") ? ask("/nothing") : ask(path)))(made.api.fetchApi)
  await made.restore()
  assert.deepEqual(shown, [["a"], []])
})

test("many events ask for the record once, and once more", async () => {
  const run = record("a", "4", 1)
  const { made, asked } = page([run])
  for (let i = 0; i < 20; i++) made.heard(header(run))
  await new Promise((done) => setTimeout(done, 600))
  assert.equal(asked.length, 2)
})

test("a refusal is a sentence, and so is a server that is away", async () => {
  const { made } = page([])
  assert.equal(await made.order("x", { order: "stop" }, "away"), "there is no run")
  made.api.fetchApi = async () => {
    throw new TypeError("Failed to fetch")
  }
  assert.equal(await made.order("x", { order: "stop" }, "away"), "away")
  assert.equal(await made.get("/x"), null)
})
