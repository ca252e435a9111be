import assert from "node:assert/strict"
import { test } from "node:test"

import { asOneStep, newestOf, nodeAt, replaces } from "../../web/graphs.mjs"

const graph = (...nodes) => ({ getNodeById: (id) => nodes.find((node) => node.id === id) })
const train = { id: 3 }
const other = { id: 4 }
const inner = graph(train)
const root = graph(other, { id: 5, subgraph: inner }, { id: 6, subgraph: graph({ id: 5, subgraph: inner }) })

test("an execution id leads to its node, through subgraphs", () => {
  assert.equal(nodeAt(root, "4"), other)
  assert.equal(nodeAt(root, "5:3"), train)
  assert.equal(nodeAt(root, "6:5:3"), train)
  for (const wrong of ["3", "4:3", "5:9", "", "x", "5:"]) assert.ok(!nodeAt(root, wrong), wrong)
  assert.ok(!nodeAt(undefined, "4"))
})

test("each node gets its own newest run", () => {
  const runs = [
    { id: "a", node: "4", begun: 1 },
    { id: "b", node: "5:3", begun: 5 },
    { id: "c", node: "6:5:3", begun: 7 },
    { id: "d", node: "4", begun: 3 },
    { id: "e", node: null, begun: 9 },
  ]
  assert.equal(newestOf(runs, root, other).id, "d")
  assert.equal(newestOf(runs, root, train).id, "c") // one definition, two places
  assert.equal(newestOf([], root, train), undefined)
})

test("a run replaces older ones and itself, not younger ones", () => {
  const shown = { id: "b", begun: 5 }
  assert.ok(replaces({ id: "a", begun: 1 }, undefined))
  assert.ok(replaces({ id: "b", begun: 5 }, shown) && replaces({ id: "c", begun: 6 }, shown))
  assert.ok(!replaces({ id: "a", begun: 1 }, shown))
})

test("a step of undo has an end, whatever happens in it", () => {
  const told = []
  const canvas = { emitBeforeChange: () => told.push("before"), emitAfterChange: () => told.push("after") }
  assert.equal(asOneStep(canvas, () => told.push("work")), 2)
  assert.throws(() => asOneStep(canvas, () => JSON.parse("")))
  assert.deepEqual(told, ["before", "work", "after", "before", "after"])
  assert.equal(asOneStep(undefined, () => 1), 1)
})
