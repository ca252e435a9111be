// What the chart draws of a record, without a page: node --test tests/web
import assert from "node:assert/strict"
import test from "node:test"

import { prepare } from "../../web/chart.mjs"

const curve = (step, values) => ({ every: 1, step, values })
const losses = curve([1, 2, 3], { reconstruction: [1, 0.9, 0.8] })
const steps = curve([1, 2, 3], { reconstruction: [4, 3, 2], drift: [0, 2, 4] })

const drawn = (record) => {
  const found = prepare({ losses, ...record }).curves.find(({ name }) => name === "drift")
  return found && [found.steps, found.values, found.axis]
}

test("the drift is that of the measurements, and without any that of the steps", () => {
  assert.deepEqual(drawn({ probes: curve([2], { drift: [5] }), distances: steps }), [[2], [5], "right"])
  assert.deepEqual(drawn({ probes: curve([], {}), distances: steps }), [[1, 2, 3], [0, 2, 4], "right"])
  assert.deepEqual(prepare({ losses, probes: curve([], {}), distances: steps }).right, [0, 4])
})

test("an objective without an anchor, or a record of an earlier version, has no drift", () => {
  const alone = curve([1, 2, 3], { reconstruction: [4, 3, 2] })
  for (const distances of [alone, undefined]) assert.equal(drawn({ probes: curve([], {}), distances }), undefined)
})
