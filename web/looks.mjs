// What stands around a training node in its graph, for a look at it before the run. No page is needed for it.

const widgetOf = (node, name) => node?.widgets?.find((widget) => widget.name === name)
const slotOf = (node, name) => node?.inputs?.findIndex((input) => input.name === name) ?? -1
const FAR = 50 // nodes on the way from a model

/** The node that an input is connected to, through reroutes; null for none. */
export function source(node, name) {
  let slot = slotOf(node, name)
  let found = slot < 0 ? null : (node.getInputNode?.(slot) ?? null)
  for (let i = 0; found?.type === "Reroute" && i < FAR; i++) found = found.getInputNode(0) ?? null
  return found
}

/** Whether something is connected to an input, also from outside of a subgraph. */
export function isConnected(node, name) {
  const slot = slotOf(node, name)
  return slot >= 0 && Boolean(node.isInputConnected?.(slot))
}

/** Values by name of a node's widgets that count: those with a link in their place are known at the run alone. */
export function values(node) {
  const told = {}
  for (const { name, value, serialize } of node?.widgets ?? []) {
    const plain = ["number", "string", "boolean"].includes(typeof value)
    if (serialize !== false && plain && name !== "control_after_generate" && !isConnected(node, name)) told[name] = value
  }
  return told
}

const named = (node) => ({ type: node.type, ...values(node) })

/** What the server is asked about a training node; the values of decided widgets do not count. */
export function surroundings(node) {
  const training = values(node)
  const { file: _, ...options } = values(source(node, "options"))
  const said = { training, options, loras: [] }
  const concept = source(node, "concept")
  if (concept?.type === "AnchorConcept") said.concept = values(concept)
  const pictures = source(node, "references") ?? source(node, "images")
  if (pictures) said.pictures = named(pictures)
  let model = source(node, "model")
  for (let i = 0; model && slotOf(model, "model") >= 0 && i < FAR; i++) {
    const file = widgetOf(model, "file")?.value ?? widgetOf(model, "lora_name")?.value
    if (typeof file === "string") said.loras.push(file)
    model = source(model, "model")
  }
  if (model) said.model = named(model)
  return said
}

/** Sentences (keys of WORDS.looks) for what the connections alone say. */
export function unconnected(node) {
  const [images, references, masks] = ["images", "references", "masks"].map((name) => isConnected(node, name))
  const needed = ["model", "clip", "vae", "concept"]
  if (!images && !references && !needed.some((name) => isConnected(node, name))) return [] // of a node just made
  const found = []
  if (!images && !references) found.push("no_pictures")
  if (images && references) found.push("both")
  if (references && masks) found.push("masks")
  for (const name of needed) if (!isConnected(node, name)) found.push(`no_${name}`)
  return found
}

/** What is said on the node: each sentence once, with the node that it is about in front where it is another. */
export function sentences(node, mistakes, words) {
  const titles = { concept: source(node, "concept"), options: source(node, "options"), model: source(node, "model") }
  titles.pictures = source(node, "references") ?? source(node, "images")
  const told = unconnected(node).map((key) => words.looks[key])
  for (const { about, text } of mistakes) {
    const title = titles[about]?.title
    told.push(title ? `${title}: ${text}` : text)
  }
  return [...new Set(told)]
}
