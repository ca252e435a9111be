// What a preset decides on the training node, and how its widgets say so. No page is needed for it.

export const AUTO = "auto"
export const MANUAL = "manual"
/** Widgets of the node that every preset but manual decides. */
export const DECIDED = ["steps", "learning_rate", "batch_size", "rank", "layers"]

const W_MAX = 2 // of the slider

const widgetOf = (node, name) => node?.widgets?.find((widget) => widget.name === name)

/** A node that was made: what of it a preset decides. `defaults`: of its inputs, by name; `words`: of the presets. */
export function prepare(node, defaults, words) {
  for (const name of DECIDED) {
    const widget = widgetOf(node, name)
    if (widget?.options) widget.options.anchorDefault = defaults[name]
  }
  const preset = widgetOf(node, "preset")
  if (preset) {
    preset.value = AUTO // of a new node; a workflow that was saved without it means manual
    preset.options.getOptionLabel = (value) => words.presets[value] ?? value ?? "" // locales have no place for these
  }
  const { onConfigure } = node
  node.onConfigure = function (info) {
    onConfigure?.apply(this, arguments)
    if (preset && !isSaved(this, info)) preset.value = MANUAL
    const w = widgetOf(this, "w")
    if (w?.options) w.options.max = Math.max(W_MAX, w.value)
  }
  const w = widgetOf(node, "w")
  if (w?.options) w.options.max = W_MAX
}

/** Whether a saved node has a value for its widget `preset`: it is the last of those that are saved by position. */
export function isSaved(node, info) {
  if (info?.widgets_values_named) return "preset" in info.widgets_values_named
  const saved = info?.widgets_values
  if (!saved) return false
  if (!Array.isArray(saved)) return "preset" in saved
  const kept = node.widgets.filter((widget) => widget.serialize !== false)
  return saved.length > kept.findIndex(({ name }) => name === "preset")
}

/**
 * Show in the decided widgets what the preset takes, as far as it is known (`chosen`), and give them back to `manual`
 * with the values they had. `classic`: a widget that is off shows no value there, so that its label has it.
 * Gives whether something changed. The prompt has their defaults meanwhile, so that nothing is trained again because a value came to be known.
 */
export function showDecided(node, chosen, words, { classic }) {
  const off = (widgetOf(node, "preset")?.value ?? MANUAL) !== MANUAL
  let changed = false
  const put = (widget, name, value) => {
    if (widget[name] === value) return
    widget[name] = value
    changed = true
  }
  for (const name of DECIDED) {
    const widget = widgetOf(node, name)
    if (!widget) continue
    if (off && !widget.anchorOwn) {
      widget.anchorOwn = { value: widget.value, label: widget.label, serializeValue: widget.serializeValue }
      widget.serializeValue = () => widget.options?.anchorDefault ?? widget.anchorOwn?.value
    }
    if (off) {
      const known = chosen?.[name]
      if (known !== undefined) {
        put(widget, "value", known)
        widget.anchorShown = known
      }
      const own = widget.anchorOwn.label || name
      put(widget, "label", known === undefined || classic ? `${own} · ${known ?? words.by_preset}` : own)
      put(widget, "disabled", true)
    } else if (widget.anchorOwn) {
      const { value, label, serializeValue } = widget.anchorOwn
      delete widget.anchorOwn
      Object.assign(widget, { label, serializeValue })
      if (widget.value === widget.anchorShown) put(widget, "value", value)
      put(widget, "disabled", false)
    }
  }
  return changed
}

/** The word for a value of `w`: that of the nearest of 0, 0.5 and 1. */
export function wordOf(w, words) {
  return words.w[Math.min(2, Math.max(0, Math.round(2 * w)))]
}

/** What a preset and the memory chose of a run, in one line; "" for neither. */
export function chosenLine({ preset, chosen }) {
  const told = Object.entries(chosen ?? {}).filter(([name, value]) => {
    if (name.startsWith("timestep_") && name !== "timestep_sampling") return false
    return !(name === "accumulation" && value === 1) && !(name === "micro_batch" && value === 0) && value !== false
  })
  const parts = told.map(([name, value]) => (value === true ? name : `${name} ${value}`))
  if (!parts.length) return ""
  return [preset && preset !== MANUAL ? preset : null, ...parts].filter(Boolean).join(" · ")
}
