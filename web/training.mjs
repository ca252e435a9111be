// The training node shows its training.

import { api } from "../../scripts/api.js"
import { app } from "../../scripts/app.js"
import { trainOn } from "./again.mjs"
import { addView, grow } from "./place.mjs"
import { Records } from "./records.mjs"
import { Settings } from "./settings.mjs"
import { View } from "./view.mjs"
import { WORDS } from "./words.mjs"

const LINE = "$$node-text-preview" // ComfyUI's own, for pages without this script
const settings = new Settings(api)
export const records = new Records(app, api)
api.addEventListener("semantic_anchor.run", ({ detail }) => records.heard(detail))
api.addEventListener("reconnected", () => records.restore())

export function follow(node) {
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
    grown: () => grow(node, 320),
  })
  addView(node, "run", "anchor_run", view)
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
