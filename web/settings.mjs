// The training node's settings: folded, greyed and worded, and looked at while they are edited.

import { fold } from "./fold.mjs"
import { sentences, surroundings } from "./looks.mjs"
import { DECIDED, MANUAL, showDecided, wordOf } from "./presets.mjs"
import { WORDS } from "./words.mjs"

const LOOK = "/semantic_anchor/look"
const EVERY = 500 // ms between two glances at the graph
const CALM = 2 // glances without a change before the server is asked

const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name)
const classic = () => !window.LiteGraph?.vueNodesMode

export class Settings {
  constructor(api) {
    this.api = api
    this.nodes = new Map() // node -> { view, asked, calm, look }
    this.timer = null
  }

  add(node, view) {
    this.nodes.set(node, { view, asked: null, seen: null, calm: 0, look: null })
    this.timer ??= setInterval(() => this.glance(), EVERY)
  }

  remove(node) {
    this.nodes.delete(node)
    if (this.nodes.size) return
    clearInterval(this.timer)
    this.timer = null
  }

  glance() {
    if (document.hidden) return
    for (const [node, held] of this.nodes) if (node.graph) this.one(node, held)
  }

  one(node, held) {
    this.draw(node, held)
    const said = surroundings(node)
    if (said.training.preset && said.training.preset !== MANUAL) for (const name of DECIDED) delete said.training[name]
    const now = JSON.stringify(said)
    held.calm = now === held.seen ? held.calm + 1 : 0
    held.seen = now
    if (held.calm >= CALM && held.asked !== now) {
      held.asked = now
      this.ask(node, held, now)
    }
    held.view.mistakes(sentences(node, held.look?.mistakes ?? [], WORDS))
  }

  draw(node, held) {
    const w = widgetOf(node, "w")
    if (w) {
      held.label ??= w.label || "w"
      const label = `${held.label} · ${wordOf(w.value, WORDS)}`
      if (w.label !== label) {
        w.label = label
        node.setDirtyCanvas?.(true, true)
      }
    }
    fold(node, WORDS)
    if (showDecided(node, held.look?.chosen, WORDS, { classic: classic() })) node.setDirtyCanvas?.(true, true)
  }

  async ask(node, held, body) {
    try {
      const headers = { "Content-Type": "application/json" }
      const answer = await this.api.fetchApi(LOOK, { method: "POST", headers, body })
      if (answer.ok && held.asked === body) {
        held.look = await answer.json()
        if (node.graph) this.one(node, held)
      }
    } catch {
      held.asked = null // the server is away; the next glance asks again
    }
  }
}
