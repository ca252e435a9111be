// Semantic Anchor in ComfyUI's page: the node that loads references holds pictures of its own.

import { api } from "../../scripts/api.js"
import { app, ComfyApp } from "../../scripts/app.js"
import { asOneStep } from "./graphs.mjs"
import { editMask } from "./mask_editor.mjs"
import { Picker } from "./picker.mjs"
import { keepPlace } from "./place.mjs"

const WIDGET = "ANCHOR_PICTURES"
const PICKED = "[pictures on the node]"
const ROOM = 380 // a row of three

const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name)

function linked(node, name) {
  const slot = node.inputs?.findIndex((input) => input.name === name) ?? -1
  return slot >= 0 && Boolean(node.isInputConnected?.(slot))
}

/** The widget of an input of that type, which holds the list as a text. */
function pictures(node, name, inputData) {
  const valueOf = (other) => (linked(node, other) ? undefined : widgetOf(node, other)?.value)
  const picker = new Picker(api, {
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
      if (!node.widgets?.length) return
      const [width, height] = node.computeSize()
      node.setSize?.([Math.max(node.size[0], picker.entries.length ? ROOM : width), Math.max(node.size[1], height)])
      node.setDirtyCanvas?.(true, true)
    },
  })
  picker.set(inputData[1]?.default ?? "")
  const widget = node.addDOMWidget(name, WIDGET, picker.root, {
    hideOnZoom: false,
    getMinHeight: () => picker.height,
    getValue: () => picker.text,
    setValue: (text) => picker.set(text),
  })
  node.anchorPicker = picker
  return { widget }
}

/** What ComfyUI gives to a node: drops, and changes of its other widgets. */
function follow(node) {
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

app.registerExtension({
  name: "semantic_anchor.references",
  setup() {
    window.addEventListener("paste", paste, { capture: true }) // before ComfyUI makes a node of it
  },
  getCustomWidgets: () => ({ [WIDGET]: pictures }),
  nodeCreated(node) {
    if (node.anchorPicker) follow(node)
  },
})
