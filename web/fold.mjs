// Inputs that a first run does not need, folded on the classic canvas, which shows `advanced` ones as plain rows;
// Nodes 2.0 folds them itself.

const classic = () => !window.LiteGraph?.vueNodesMode
const isLinked = (node, name) => {
  const slot = node.inputs?.findIndex((input) => input.name === name) ?? -1
  return slot >= 0 && Boolean(node.isInputConnected?.(slot))
}

/** Give a node the button; to be called before it gets its last widget. */
export function addFold(node, words) {
  const button = node.addWidget("button", "more", null, () => {
    node.showAdvanced = !node.showAdvanced
    fold(node, words)
  }, { serialize: false })
  button.serialize = false
  fold(node, words)
}

/** Hide and show as the node says; gives whether something changed. */
export function fold(node, words) {
  const [here, open] = [classic(), Boolean(node.showAdvanced)]
  const folded = (widget) => here && !open && !isLinked(node, widget.name)
  const wanted = node.widgets?.some((each) => each.options?.advanced && Boolean(each.hidden) !== folded(each))
  const before = wanted ? (node.computeSize?.()[1] ?? 0) : 0
  let changed = false
  const hide = (widget, hidden) => {
    if (Boolean(widget.hidden) === hidden) return
    widget.hidden = hidden
    changed = true
  }
  for (const widget of node.widgets ?? []) {
    if (widget.options?.advanced) hide(widget, folded(widget))
    if (widget.name !== "more") continue
    hide(widget, !here)
    widget.options.hidden = !here
    const label = open ? words.less : words.more
    if (widget.label !== label) [widget.label, changed] = [label, true]
  }
  if (wanted) {
    const least = node.computeSize?.()[1] ?? 0
    node.setSize?.([node.size[0], Math.max(least, node.size[1] + least - before)])
  }
  if (changed) node.setDirtyCanvas?.(true, true)
  return changed
}
