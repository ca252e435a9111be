import assert from "node:assert/strict"
import { test } from "node:test"

import { take, targets } from "../../web/targets.mjs"

function node(type, widgets = {}, inputs = {}) {
  const names = Object.keys(inputs)
  return {
    type,
    widgets: Object.entries(widgets).map(([name, value]) => ({ name, value })),
    inputs: names.map((name) => ({ name })),
    getInputNode: (slot) => inputs[names[slot]],
    isInputConnected: (slot) => Boolean(inputs[names[slot]]),
  }
}
const names = (found) => found.map(([{ type }, { name }]) => `${type}.${name}`)

test("a strength goes to what applies the same LoRA, connected or by its file", () => {
  const lora = node("AnchorLoadAdapter", { file: "dog.safetensors" })
  const sweep = node("AnchorSweep", {}, { lora })
  const same = node("AnchorApplyAdapter", { strength: 1, file: "[connected lora]" }, { lora })
  const stock = node("LoraLoader", { lora_name: "dog.safetensors", strength_model: 1, strength_clip: 1 })
  const other = node("AnchorApplyAdapter", { strength: 1, file: "cat.safetensors" }, { lora: null })
  assert.deepEqual(names(targets([lora, sweep, same, stock, other], sweep, "strength")), ["AnchorApplyAdapter.strength", "LoraLoader.strength_model"])
  assert.deepEqual(names(targets([sweep, other], sweep, "strength")), ["AnchorApplyAdapter.strength"]) // the only one
  assert.deepEqual(targets([sweep, other, node("LoraLoader", { lora_name: "x", strength_model: 1 })], sweep, "strength"), [])
})

test("w and steps go to the training of the same concept", () => {
  const [dog, cat] = [node("AnchorConcept"), node("AnchorConcept")]
  const sweep = node("AnchorSweep", {}, { concept: dog })
  const ours = node("AnchorTrainLoRA", { w: 0.5, steps: 300 }, { concept: dog })
  const other = node("AnchorTrainLoRA", { w: 0.5, steps: 300 }, { concept: cat })
  assert.deepEqual(targets([sweep, ours, other], sweep, "w").map(([found]) => found === ours), [true])
  assert.deepEqual(names(targets([sweep, other], sweep, "steps")), ["AnchorTrainLoRA.steps"])
  assert.deepEqual(targets([sweep], sweep, "w"), [])
})

test("a value that a preset decides makes it manual, with what is shown", () => {
  const training = node("AnchorTrainLoRA", { w: 0.5, steps: 150, rank: 8, preset: "auto" })
  training.widgets[2].anchorShown = 8
  training.widgets[1].disabled = true
  const heard = []
  training.widgets[0].callback = (value) => heard.push(value)
  take([training, training.widgets[0]], 0.75)
  assert.deepEqual([training.widgets[0].value, heard, training.widgets[3].value], [0.75, [0.75], "auto"])
  take([training, training.widgets[1]], 100)
  assert.deepEqual(training.widgets.map(({ value }) => value), [0.75, 100, 8, "manual"])
  assert.deepEqual([training.widgets[1].disabled, training.widgets[2].anchorShown], [false, undefined])
})
