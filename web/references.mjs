// The node that loads references holds pictures of its own.

import { api } from "../../scripts/api.js"
import { app, ComfyApp } from "../../scripts/app.js"
import { asOneStep } from "./graphs.mjs"
import { editMask } from "./mask_editor.mjs"
import { Picker } from "./picker.mjs"
import { grow, keepPlace } from "./place.mjs"

const PICKED = "[pictures on the node]"
const ROOM = 380 // a row of three

const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name)

function linked(node, name) {
  const slot = node.inputs?.findIndex((input) => input.name === name) ?? -1
  return slot >= 0 && Boolean(node.isInputConnected?.(slot))
}

/** The picker of a node, in an element of it. */
export function pickerOf(node, root) {
  const valueOf = (other) => (linked(node, other) ? undefined : widgetOf(node, other)?.value)
  const picker = new Picker(root, api, {
    settings: () => {
      const references = valueOf("references")
      return { size: valueOf("size"), buckets: valueOf("buckets"), references, own: references === PICKED }
    },
    use: () => {
      const widget = widgetOf(node, "references")
      if (!widget || widget.value === PICKED) return
      asOneStep(app.canvas, () => {
        widget.value = PICKED
        widget.callback?.(PICKED)
      })
      picker.draw()
    },
    changed: (work) => asOneStep(app.canvas, work),
    paint: (picture, mask, saved) => editMask(ComfyApp, api, node.graph, picture, mask, saved),
    grown: () => {
      if (node.widgets?.length) grow(node, picker.entries.length ? ROOM : node.computeSize()[0])
    },
  })
  node.anchorPicker = picker
  return picker
}

/** What ComfyUI gives to a node: drops, and changes of its other widgets. */
export function follow(node) {
  const picker = node.anchorPicker
  keepPlace(node, picker.root)
  node.onDragOver = (event) => picker.holds(event.dataTransfer)
  node.onDragDrop = (event) => picker.drop(event)
  for (const name of ["references", "size", "buckets"]) {
    const widget = widgetOf(node, name)
    const { callback } = widget ?? {}
    if (widget) {
      widget.callback = function () {
        const said = callback?.apply(this, arguments)
        picker.draw()
        return said
      }
    }
  }
  for (const name of ["onConfigure", "onConnectionsChange"]) {
    const before = node[name]
    node[name] = function () {
      const said = before?.apply(this, arguments)
      picker.draw()
      return said
    }
  }
}

/**
 * Pictures that are pasted while the node alone is selected. ComfyUI's own way would have the node be one of a single
 * image, and offer to open that in the mask editor.
 */
function paste(event) {
  const [node, ...others] = app.canvas?.selectedItems ?? []
  const picker = others.length ? null : node?.anchorPicker
  const elsewhere = event.target.closest?.("input, textarea, [contenteditable]") || picker?.root.contains(event.target)
  if (!picker || elsewhere || !event.clipboardData?.files.length) return
  event.preventDefault()
  event.stopPropagation()
  picker.take([...event.clipboardData.files])
}

window.addEventListener("paste", paste, { capture: true }) // before ComfyUI makes a node of it
