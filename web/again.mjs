// Training on after the end: the same graph once more, from the run's checkpoints.

const widgetOf = (node, name) => node?.widgets?.find((widget) => widget.name === name)

/** Queue the graph with `more` steps after those of an ended run, and leave its widgets as they were; false if the
 * node that says where to go on from is not connected. */
export async function trainOn(app, node, run, more) {
  const options = node.getInputNode(node.inputs.findIndex(({ name }) => name === "options"))
  const widgets = [widgetOf(node, "steps"), widgetOf(node, "seed"), widgetOf(options, "resume")]
  if (widgets.some((widget) => !widget)) return false
  const before = widgets.map(({ value }) => value)
  const wanted = [run.step + more, run.seed, run.checkpoints]
  try {
    widgets.forEach((widget, i) => (widget.value = wanted[i]))
    await app.queuePrompt(0, 1)
  } finally {
    widgets.forEach((widget, i) => (widget.value = before[i]))
  }
  return true
}
