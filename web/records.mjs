// The records of trainings from ComfyUI's server, for the views in this page.

import { newestOf, nodeAt, replaces } from "./graphs.mjs"

const ROOT = "/semantic_anchor/runs"
const PAUSE = 400 // ms between two requests for one record

export class Records {
  constructor(app, api) {
    this.app = app
    this.api = api
    this.views = new Map() // node -> { view, shown: run or undefined, asking, again }
  }

  get graph() {
    return this.app.rootGraph ?? this.app.graph
  }

  add(node, view) {
    this.views.set(node, { view })
  }

  remove(node) {
    this.views.delete(node)
  }

  /** A run told where it is: show it in its node, or where it is shown already. */
  heard(run) {
    const own = run.workflow === this.graph?.id ? nodeAt(this.graph, run.node ?? "") : undefined
    for (const [node, held] of this.views) {
      if (node === own ? replaces(run, held.shown) : held.shown?.id === run.id) this.show(node, run)
    }
  }

  /** Ask for the newest runs of all nodes: after a load, and after the server was away. */
  async restore() {
    const listed = this.views.size ? await this.get(`?workflow=${encodeURIComponent(this.graph.id)}`) : null
    for (const [node, held] of this.views) {
      const known = node.properties?.anchor_run
      let run = newestOf(listed?.runs ?? [], this.graph, node)
      if (!run && known && typeof known === "string") {
        const kept = await this.get(`/${encodeURIComponent(known)}`)
        if (kept && nodeAt(this.graph, kept.node ?? "") === node) run = kept
      }
      if (run && replaces(run, held.shown)) this.show(node, run)
    }
  }

  /** Show a run whose id alone is known, as after a cached node. */
  async attach(node, id) {
    const run = await this.get(`/${encodeURIComponent(id)}`)
    if (run && this.views.has(node)) this.show(node, run)
  }

  show(node, run) {
    const held = this.views.get(node)
    held.shown = run
    if (node.properties && node.properties.anchor_run !== run.id) node.properties.anchor_run = run.id
    if (run.losses) held.view.show(run)
    else {
      held.view.head(run)
      this.ask(node)
    }
  }

  /** The whole record, asked for once at a time, and once more if something was heard meanwhile. */
  async ask(node) {
    const held = this.views.get(node)
    if (held.asking) {
      held.again = true
      return
    }
    held.asking = true
    do {
      held.again = false
      const { id } = held.shown
      const record = await this.get(`/${id}`)
      if (record && held.shown.id === id && this.views.get(node) === held) held.view.show(record)
      await new Promise((done) => setTimeout(done, PAUSE))
    } while (held.again)
    held.asking = false
  }

  /** The answer as an object; null if there is none. */
  async get(path) {
    try {
      const answer = await this.api.fetchApi(ROOT + path, { cache: "no-store" })
      return answer.ok ? await answer.json() : null
    } catch {
      return null // the server is away; `restore` asks again when it is back
    }
  }

  /** Give an order; the sentence of a refusal, or null. */
  async order(id, order, unreachable) {
    try {
      const body = JSON.stringify(order)
      const headers = { "Content-Type": "application/json" }
      const answer = await this.api.fetchApi(`${ROOT}/${id}/orders`, { method: "POST", headers, body })
      return answer.ok ? null : ((await answer.json()).error ?? unreachable)
    } catch {
      return unreachable
    }
  }

  picture(id, step) {
    return this.api.apiURL(`${ROOT}/${id}/pictures/${step}`)
  }
}
