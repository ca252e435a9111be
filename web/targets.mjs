// Where a value of a sweep goes: the nodes of its graph that train or apply the same. No page is needed for it.

import { DECIDED, MANUAL } from "./presets.mjs"
import { source } from "./looks.mjs"

const TRAINING = "AnchorTrainLoRA"
const STRENGTHS = ["strength", "strength_model"]

const widgetOf = (node, name) => node?.widgets?.find((widget) => widget.name === name)
const fileOf = (node) => widgetOf(node, "file")?.value ?? widgetOf(node, "lora_name")?.value

/** [node, widget] of each place for a value of `what`, which a sweep node varies, among the nodes of its graph. */
export function targets(nodes, sweep, what) {
  const others = nodes.filter((node) => node !== sweep)
  if (what === "strength") {
    const lora = source(sweep, "lora")
    const places = others.flatMap((node) => STRENGTHS.map((name) => [node, widgetOf(node, name)])).filter(([, each]) => each)
    const same = places.filter(([node]) => lora && (source(node, "lora") === lora || (fileOf(lora) && fileOf(node) === fileOf(lora))))
    return same.length || places.length !== 1 ? same : places
  }
  const places = others.filter(({ type }) => type === TRAINING).map((node) => [node, widgetOf(node, what)]).filter(([, each]) => each)
  const same = places.filter(([node]) => source(node, "concept") === source(sweep, "concept"))
  return same.length || places.length !== 1 ? same : places
}

/** Write a value into a place; a preset that decides it becomes manual, with what it decided. */
export function take([node, widget], value) {
  const preset = widgetOf(node, "preset")
  if (DECIDED.includes(widget.name) && preset && preset.value !== MANUAL) {
    for (const name of DECIDED) {
      const decided = widgetOf(node, name)
      if (decided) delete decided.anchorShown // what is shown stays
    }
    preset.value = MANUAL
    widget.disabled = false
  }
  widget.value = value
  widget.callback?.(value)
}
