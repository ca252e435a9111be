import assert from "node:assert/strict"
import { test } from "node:test"

import { sentences, source, surroundings, unconnected, values } from "../../web/looks.mjs"
import { WORDS } from "../../web/words.mjs"

/** A node as the page has it: `inputs` by name, each a node or null; `outside` for a link from outside of a subgraph. */
function node(type, widgets = {}, inputs = {}) {
  const names = Object.keys(inputs)
  return {
    type,
    title: type.replace("Anchor", ""),
    widgets: Object.entries(widgets).map(([name, value]) => ({ name, value })),
    inputs: names.map((name) => ({ name })),
    getInputNode: (slot) => (inputs[names[slot]] === "outside" ? null : inputs[names[slot]]),
    isInputConnected: (slot) => Boolean(inputs[names[slot]]),
  }
}

const checkpoint = node("CheckpointLoaderSimple", { ckpt_name: "sd.safetensors" })
const concept = node("AnchorConcept", { token: "sks", class_word: "dog", template: "a photo of a {}" })
const pictures = node("AnchorLoadReferences", { references: "dog", size: 512 })
const training = (inputs = {}, widgets = {}) =>
  node("AnchorTrainLoRA", { steps: 300, preset: "auto", ...widgets }, {
    model: checkpoint, clip: checkpoint, vae: checkpoint, images: null, concept, references: pictures, options: null, masks: null, ...inputs,
  })

test("what stands around a training is told with its types and values", () => {
  assert.deepEqual(surroundings(training()), {
    training: { steps: 300, preset: "auto" },
    options: {},
    loras: [],
    concept: { token: "sks", class_word: "dog", template: "a photo of a {}" },
    pictures: { type: "AnchorLoadReferences", references: "dog", size: 512 },
    model: { type: "CheckpointLoaderSimple", ckpt_name: "sd.safetensors" },
  })
})

test("the way from the model leads through LoRAs, patches and reroutes", () => {
  const lora = node("LoraLoader", { lora_name: "a.safetensors", strength_model: 1 }, { model: checkpoint })
  const patch = node("ModelSamplingFlux", {}, { model: node("Reroute", {}, { "": lora }) })
  const { loras, model } = surroundings(training({ model: patch }))
  assert.deepEqual([loras, model.ckpt_name], [["a.safetensors"], "sd.safetensors"])
})

test("a value with a link in its place, a button and what is no plain value do not count", () => {
  const linked = node("AnchorConcept", { token: "sks", class_word: "dog" }, { class_word: checkpoint })
  assert.deepEqual(values(linked), { token: "sks" })
  const odd = node("AnchorTrainLoRA", { steps: 3, more: null, control_after_generate: "fixed" })
  odd.widgets.push({ name: "run", value: "", serialize: false })
  assert.deepEqual(values(odd), { steps: 3 })
  assert.equal(source(training(), "options"), null)
  assert.equal(source(training(), "nothing"), null)
})

test("what the connections alone say", () => {
  assert.deepEqual(unconnected(training()), [])
  assert.deepEqual(unconnected(training({ references: null })), ["no_pictures"])
  assert.deepEqual(unconnected(training({ references: "outside" })), [])
  assert.deepEqual(unconnected(training({ images: pictures, masks: pictures })), ["both", "masks"])
  assert.deepEqual(unconnected(training({ concept: null, vae: null })), ["no_vae", "no_concept"])
  assert.deepEqual(unconnected(node("AnchorTrainLoRA", {}, { model: null, images: null })), []) // just made
})

test("a sentence names the node that it is about, and is said once", () => {
  const mistakes = [
    { about: "concept", text: "class_word is ''" },
    { about: "training", text: "rank is 999" },
    { about: "training", text: "rank is 999" },
  ]
  const told = sentences(training({ references: null }), mistakes, WORDS)
  assert.deepEqual(told, [WORDS.looks.no_pictures, "Concept: class_word is ''", "rank is 999"])
})
