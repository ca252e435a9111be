// The sweep node shows its grid, and gives a value on to the node that takes it.

import { api } from "../../scripts/api.js"
import { app } from "../../scripts/app.js"
import { fold } from "./fold.mjs"
import { asOneStep } from "./graphs.mjs"
import { addView, grow } from "./place.mjs"
import { SweepView } from "./sweep_view.mjs"
import { take, targets } from "./targets.mjs"
import { WORDS } from "./words.mjs"

function addressOf({ filename, subfolder = "", type = "temp" }) {
  return api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`)
}

export function follow(node) {
  const view = new SweepView({
    addressOf,
    use: (value) => {
      const { what } = view.sweep
      const places = targets(node.graph?.nodes ?? [], node, what)
      asOneStep(app.canvas, () => places.forEach((place) => take(place, value)))
      app.canvas?.setDirty?.(true, true)
      const names = [...new Set(places.map(([{ title }]) => title))].join(", ")
      return places.length ? `${what} ${value} → ${names}` : WORDS.sweep[what === "strength" ? "no_strength" : "no_training"]
    },
    grown: () => grow(node, 460),
  })
  addView(node, "grid", "anchor_sweep", view)
  const show = () => {
    const kept = node.properties?.anchor_sweep
    if (kept?.sweep?.values?.length && Array.isArray(kept.files)) view.show(kept.sweep, kept.files)
  }
  const { onExecuted, onConfigure, onDrawForeground } = node
  node.onDrawForeground = function () {
    onDrawForeground?.apply(this, arguments)
    fold(this, WORDS) // for a change of the way that nodes are drawn
  }
  node.onExecuted = function (output) {
    onExecuted?.apply(this, arguments)
    const [sweep] = output?.anchor_sweep ?? []
    if (!sweep) return
    node.properties.anchor_sweep = { sweep, files: output.anchor_pictures } // a reload after the end restores nothing else
    show()
  }
  node.onConfigure = function () {
    onConfigure?.apply(this, arguments)
    show()
  }
  show()
}
