// The graph in this page: which node of it a run belongs to, and changes of it.

/** The node with an execution id: "4", or "5:3" for node 3 in the subgraph of node 5. */
export function nodeAt(graph, id) {
  const [first, ...rest] = String(id).split(":")
  const node = graph?.getNodeById(Number(first)) ?? graph?.getNodeById(first)
  return rest.length ? node?.subgraph && nodeAt(node.subgraph, rest.join(":")) : node
}

/** The newest of the runs that are of `node` in the graph; undefined if there is none. */
export function newestOf(runs, graph, node) {
  const own = runs.filter((run) => run.node !== null && nodeAt(graph, run.node) === node)
  return own.reduce((newest, run) => (newest && newest.begun >= run.begun ? newest : run), undefined)
}

/** Whether a run should replace the one that is shown. */
export function replaces(run, shown) {
  return !shown || run.id === shown.id || run.begun >= shown.begun
}

/** Do work that changes the graph, as one step of ComfyUI's undo; what it does within is part of it. */
export function asOneStep(canvas, work) {
  canvas?.emitBeforeChange?.()
  try {
    return work()
  } finally {
    canvas?.emitAfterChange?.()
  }
}
