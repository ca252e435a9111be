// Semantic Anchor in ComfyUI's page: the training node shows its training.

import { api } from "../../scripts/api.js"
import { app } from "../../scripts/app.js"
import { trainOn } from "./again.mjs"
import { keepPlace } from "./place.mjs"
import { Records } from "./records.mjs"
import { View } from "./view.mjs"
import { prepare, Settings } from "./settings.mjs"
import { adopt, WORDS } from "./words.mjs"

const NODE = "AnchorTrainLoRA"
const LINE = "$$node-text-preview" // ComfyUI's own, for pages without this script
const records = new Records(app, api)
const settings = new Settings(api)
const defaults = {}

function follow(node) {
  prepare(node, defaults)
  const view = new View({
    heard: () => {
      const line = node.widgets.find(({ name }) => name === LINE)
      if (line) line.hidden = true
    },
    give: async (order) => {
      if (!view.run.how) return records.order(view.run.id, order, WORDS.unreachable)
      return (await trainOn(app, node, view.run, order.steps)) ? null : WORDS.no_options
    },
    pictureOf: (id, step) => records.picture(id, step),
    grown: () => {
      node.setSize?.([Math.max(node.size[0], 320), Math.max(node.size[1], node.computeSize()[1])])
      node.setDirtyCanvas?.(true, true)
    },
  })
  const widget = node.addDOMWidget("run", "anchor_run", view.root, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => view.height,
  })
  widget.serialize = false
  keepPlace(node, view.root)
  records.add(node, view)
  settings.add(node, view)
  const { onExecuted, onRemoved } = node
  node.onExecuted = function (output) {
    onExecuted?.apply(this, arguments)
    const [id] = output?.anchor_run ?? []
    if (id) records.attach(node, id)
  }
  node.onRemoved = function () {
    records.remove(node)
    settings.remove(node)
    onRemoved?.apply(this, arguments)
  }
}

async function translate() {
  const language = app.extensionManager?.setting?.get("Comfy.Locale") ?? "en"
  if (language === "en") return
  const answer = await api.fetchApi("/i18n")
  const trees = answer.ok ? await answer.json() : {}
  adopt(WORDS, (trees[language] ?? trees[language.split("-")[0]])?.anchor)
}

app.registerExtension({
  name: "semantic_anchor.run",
  async setup() {
    api.addEventListener("semantic_anchor.run", ({ detail }) => records.heard(detail))
    api.addEventListener("reconnected", () => records.restore())
    await translate()
  },
  beforeRegisterNodeDef(_, { name, input }) {
    if (name !== NODE) return
    const all = Object.entries({ ...input.required, ...input.optional })
    for (const [input, [, options]] of all) defaults[input] = options?.default
  },
  nodeCreated(node) {
    if (node.comfyClass === NODE) follow(node)
  },
  afterConfigureGraph() {
    records.restore()
  },
})
