import assert from "node:assert/strict"
import { test } from "node:test"

import { chosenLine, DECIDED, isSaved, showDecided, wordOf } from "../../web/presets.mjs"
import { WORDS } from "../../web/words.mjs"

const CHOSEN = { steps: 150, learning_rate: 0.002, batch_size: 4, rank: 8, layers: "attention" }

function trainingNode(preset, own = {}) {
  const given = { steps: 300, learning_rate: 1e-3, batch_size: 4, rank: 16, layers: "all_linear", ...own }
  const widgets = Object.entries(given).map(([name, value]) => ({ name, value, options: { anchorDefault: `default ${name}` } }))
  return { widgets: [...widgets, { name: "preset", value: preset }, { name: "more", serialize: false }] }
}
const widget = (node, name) => node.widgets.find((each) => each.name === name)

test("a node that was saved without a preset is told from one with it", () => {
  const node = trainingNode("auto")
  assert.equal(isSaved(node, { widgets_values: [300, 1e-3, 4, 16, "all_linear"] }), false)
  assert.equal(isSaved(node, { widgets_values: [300, 1e-3, 4, 16, "all_linear", "subject"] }), true)
  assert.equal(isSaved(node, { widgets_values: [1, 2, 3, 4, 5, 6], widgets_values_named: { steps: 300 } }), false)
  assert.equal(isSaved(node, {}), false)
  assert.equal(isSaved(node, { widgets_values: { steps: 300, preset: "auto" } }), true)
  assert.equal(isSaved(node, { widgets_values: { steps: 300 } }), false)
})

test("decided widgets are off, with the value taken, and manual gives them back as they were", () => {
  const node = trainingNode("auto")
  showDecided(node, null, WORDS, { classic: true })
  assert.equal(widget(node, "steps").label, "steps · by preset")
  assert.deepEqual(DECIDED.map((name) => widget(node, name).disabled), Array(5).fill(true))
  assert.equal(widget(node, "steps").value, 300)

  showDecided(node, CHOSEN, WORDS, { classic: true })
  assert.deepEqual(DECIDED.map((name) => widget(node, name).value), DECIDED.map((name) => CHOSEN[name]))
  assert.equal(widget(node, "rank").label, "rank · 8")
  showDecided(node, CHOSEN, WORDS, { classic: false })
  assert.equal(widget(node, "rank").label, "rank")

  widget(node, "preset").value = "manual"
  showDecided(node, CHOSEN, WORDS, { classic: true })
  assert.deepEqual(DECIDED.map((name) => widget(node, name).value), [300, 1e-3, 4, 16, "all_linear"])
  for (const name of DECIDED) {
    assert.equal(widget(node, name).disabled, false)
    assert.equal(widget(node, name).label, undefined)
    assert.equal(widget(node, name).serializeValue, undefined)
  }
})

test("the prompt does not change when a value comes to be known", () => {
  const node = trainingNode("auto")
  showDecided(node, null, WORDS, { classic: true })
  const before = DECIDED.map((name) => widget(node, name).serializeValue())
  showDecided(node, CHOSEN, WORDS, { classic: true })
  assert.deepEqual(DECIDED.map((name) => widget(node, name).serializeValue()), before)
  assert.equal(before[0], "default steps")
})

test("w has a word for each of its regions", () => {
  assert.deepEqual([0, 0.2, 0.25, 0.5, 0.7, 0.75, 1, 2, 7].map((w) => WORDS.w.indexOf(wordOf(w, WORDS))), [0, 0, 1, 1, 1, 2, 2, 2, 2])
})

test("the line says what was chosen that is worth saying", () => {
  const more = { ...CHOSEN, accumulation: 1, micro_batch: 0, gradient_checkpointing: false, timestep_sampling: "uniform", timestep_mean: 0 }
  const line = "auto (sandbox) · steps 150 · learning_rate 0.002 · batch_size 4 · rank 8 · layers attention · timestep_sampling uniform"
  assert.equal(chosenLine({ preset: "auto (sandbox)", chosen: more }), line)
  assert.equal(chosenLine({ preset: "manual", chosen: { micro_batch: 2, gradient_checkpointing: true } }), "micro_batch 2 · gradient_checkpointing")
  assert.equal(chosenLine({ preset: "manual", chosen: {} }), "")
  assert.equal(chosenLine({}), "") // of an earlier version
})
