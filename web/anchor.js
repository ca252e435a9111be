// The pack in ComfyUI's page. A page starts with what a node needs when it is made; what it shows comes with the first
// graph that has such a node, else when the page has nothing to do.

import { api } from "../../scripts/api.js"
import { app } from "../../scripts/app.js"
import { addFold } from "./fold.mjs"
import { prepare } from "./presets.mjs"
import { adopt, WORDS } from "./words.mjs"

const [TRAINING, SWEEP, REFERENCES] = ["AnchorTrainLoRA", "AnchorSweep", "AnchorLoadReferences"]
const PARTS = {
  [TRAINING]: () => import("./training.mjs"),
  [SWEEP]: () => import("./sweep.mjs"),
  [REFERENCES]: () => import("./references.mjs"),
}
const WIDGET = "ANCHOR_PICTURES"
const loading = {} // node class -> the promise of its part
const parts = {} // node class -> its part, once it is there
const defaults = {} // of the training node's inputs, by name

function load(name) {
  loading[name] ??= PARTS[name]().then(
    (part) => (parts[name] = part),
    (error) => {
      delete loading[name] // the next node asks again
      throw error
    },
  )
  return loading[name]
}

/** At once where the part is there, as for every graph that is loaded; else as soon as it is. */
function withPart(name, work) {
  if (parts[name]) work(parts[name])
  else load(name).then(work)
}

function whenIdle(work) {
  if (window.requestIdleCallback) requestIdleCallback(work)
  else setTimeout(work, 1000)
}

/** The widget of an input of that type: it holds the list of pictures as a text, which its part shows. */
function pictures(node, name, inputData) {
  const root = document.createElement("div")
  let [text, picker] = [inputData[1]?.default ?? "", null]
  withPart(REFERENCES, ({ pickerOf }) => {
    picker = pickerOf(node, root)
    picker.set(text)
  })
  const widget = node.addDOMWidget(name, WIDGET, root, {
    hideOnZoom: false,
    getMinHeight: () => picker?.height ?? 0,
    getValue: () => picker?.text ?? text,
    setValue: (value) => {
      text = value
      picker?.set(value)
    },
  })
  return { widget }
}

async function translate() {
  const language = app.extensionManager?.setting?.get("Comfy.Locale") ?? "en"
  if (language === "en") return
  const answer = await api.fetchApi("/i18n")
  const trees = answer.ok ? await answer.json() : {}
  adopt(WORDS, (trees[language] ?? trees[language.split("-")[0]])?.anchor)
}

app.registerExtension({
  name: "semantic_anchor",
  setup: translate,
  getCustomWidgets: () => ({ [WIDGET]: pictures }),
  beforeRegisterNodeDef(_, { name, input }) {
    if (name !== TRAINING) return
    const all = Object.entries({ ...input.required, ...input.optional })
    for (const [input, [, options]] of all) defaults[input] = options?.default
  },
  async beforeConfigureGraph(graph) {
    const missing = Object.keys(PARTS).filter((name) => !parts[name])
    const text = missing.length ? JSON.stringify(graph) : ""
    await Promise.all(missing.filter((name) => text.includes(`"${name}"`)).map(load))
  },
  nodeCreated(node) {
    const name = node.comfyClass
    if (!(name in PARTS)) return
    if (name === TRAINING) prepare(node, defaults, WORDS)
    if (name !== REFERENCES) addFold(node, WORDS)
    withPart(name, ({ follow }) => follow(node))
  },
  afterConfigureGraph() {
    loading[TRAINING]?.then(({ records }) => records.restore())
    whenIdle(() => Object.keys(PARTS).forEach(load))
  },
})
