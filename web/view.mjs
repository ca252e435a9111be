// The training in its node: a line, the chart, the strip of samples, the buttons. Drawn from records alone.

import { colour, draw, prepare, stepAt, valuesAt } from "./chart.mjs"
import { number, status } from "./curves.mjs"
import { Gallery } from "./gallery.mjs"
import { chosenLine } from "./presets.mjs"
import { WORDS } from "./words.mjs"

const STYLE = `
.sa-run { display: flex; flex-direction: column; gap: 4px; width: 100%; height: 100%; box-sizing: border-box;
  color: var(--input-text); font: 11px sans-serif; overflow: hidden; }
.sa-run[data-empty] > :not(.sa-head, .sa-mistakes, style) { display: none; }
.sa-head { color: var(--descrip-text); min-height: 14px; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.sa-head[data-bad] { color: var(--error-text); }
.sa-mistakes { color: var(--error-text); font-size: 11px; line-height: 14px; max-height: 70px; overflow-y: auto; }
.sa-mistakes:empty, .sa-chosen:empty { display: none; }
.sa-mistakes div::before { content: "⚠ "; }
.sa-chosen { color: var(--descrip-text); font-size: 10px; min-height: 12px; white-space: nowrap; overflow: hidden;
  text-overflow: ellipsis; }
.sa-chart { flex: 1 1 120px; min-height: 90px; position: relative; background: var(--comfy-input-bg); border-radius: 4px; }
.sa-chart canvas { position: absolute; inset: 0; width: 100%; height: 100%; }
.sa-legend { display: flex; gap: 10px; min-height: 14px; white-space: nowrap; overflow: hidden; }
.sa-strip { display: flex; gap: 3px; overflow-x: auto; flex: 0 0 56px; }
.sa-strip img { height: 52px; border-radius: 3px; cursor: zoom-in; flex: none; }
.sa-strip img:focus-visible, .sa-strip img[data-pointed] { outline: 2px solid var(--input-text); outline-offset: -2px; }
.sa-strip:empty { display: none; }
.sa-buttons { display: flex; flex-wrap: wrap; gap: 4px; }
.sa-buttons > * { background: var(--comfy-input-bg); color: var(--input-text); border: 1px solid var(--border-color);
  border-radius: 4px; padding: 2px 6px; font: inherit; cursor: pointer; }
.sa-buttons > :disabled { opacity: 0.45; cursor: default; }
.sa-buttons input { width: 52px; cursor: text; }
.sa-buttons[hidden], .sa-run[data-ended] .sa-buttons > :not([data-order="extend"], input) { display: none; }
.sa-run dialog { background: var(--comfy-menu-bg); color: var(--input-text); border: 1px solid var(--border-color);
  border-radius: 6px; padding: 10px; text-align: center; font: 13px sans-serif; }
.sa-run dialog::backdrop { background: rgb(0 0 0 / 60%); }
.sa-run dialog img { display: block; max-width: 85vw; max-height: 80vh; min-width: 320px; margin-bottom: 6px; }
`

export const EMPTY = 24
export const FULL = 270

function element(tag, parent, properties = {}) {
  const made = Object.assign(document.createElement(tag), properties)
  parent?.append(made)
  return made
}

export class View {
  /**
   * give(order): gives an order to the run that is shown; resolves to the sentence of a refusal or null.
   * pictureOf(id, step): the address of a sample. grown(): the element needs more room than before. heard(): at each
   * new state.
   */
  constructor({ give, pictureOf, grown, heard }) {
    this.heard = heard
    this.give = give
    this.pictureOf = pictureOf
    this.grown = grown
    this.record = null
    this.pointed = null
    this.root = element("div", null, { className: "sa-run" })
    this.root.dataset.empty = ""
    this.root.style.minHeight = `${EMPTY}px`
    element("style", this.root, { textContent: STYLE })
    this.line = element("div", this.root, { className: "sa-head", textContent: WORDS.none })
    this.warned = element("div", this.root, { className: "sa-mistakes" })
    this.warnings = []
    this.chosen = element("div", this.root, { className: "sa-chosen" })
    this.chart = element("div", this.root, { className: "sa-chart" })
    this.canvas = element("canvas", this.chart)
    this.legend = element("div", this.root, { className: "sa-legend" })
    this.strip = element("div", this.root, { className: "sa-strip" })
    this.buttons = this.makeButtons()
    this.gallery = new Gallery(this.root, this.strip, (id, step) => this.pictureOf(id, step))
    this.canvas.addEventListener("pointermove", (event) => this.point(event))
    this.canvas.addEventListener("pointerleave", () => this.point(null))
    new ResizeObserver(() => this.draw()).observe(this.chart)
  }

  get height() {
    return (this.record || this.run ? FULL : EMPTY) + Math.min(70, 28 * this.warnings.length)
  }

  /** Say what is wrong before the run, a sentence each. */
  mistakes(sentences) {
    if (sentences.join("\n") === this.warnings.join("\n")) return
    this.warnings = sentences
    this.warned.replaceChildren(...sentences.map((text) => element("div", null, { textContent: text, title: text })))
    this.root.style.minHeight = `${this.height}px`
    this.grown()
  }

  makeButtons() {
    const row = element("div", this.root, { className: "sa-buttons" })
    row.hidden = true
    const button = (order, numbers = () => ({})) => {
      const [textContent, title] = WORDS.orders[order]
      const made = element("button", row, { type: "button", textContent, title })
      made.dataset.order = order
      made.addEventListener("click", () => this.say({ order: made.dataset.order, ...numbers() }))
      return made
    }
    button("stop")
    this.pause = button("pause")
    button("picture_now")
    button("save_now")
    this.keep = element("select", row, { title: WORDS.orders.keep[1] })
    this.keep.addEventListener("change", () => {
      const step = Number(this.keep.value)
      this.keep.selectedIndex = 0
      if (step) this.say({ order: "keep", step })
    })
    this.extend = button("extend", () => ({ steps: Number(this.more.value) }))
    this.more = element("input", row, { type: "number", min: 1, step: 1, value: 100, title: WORDS.steps_more })
    this.more.addEventListener("keydown", (event) => event.stopPropagation()) // the graph has keys of its own
    return row
  }

  /** Give an order, and say so until the training answers. */
  async say(order) {
    this.told = { text: WORDS.given[order.order], at: this.run.step }
    this.headline()
    const refused = await this.give(order)
    if (refused) this.told = { text: refused, at: this.run.step, bad: true }
    this.headline()
  }

  /** The run's own line and buttons, of a record with or without its curves. */
  head(run) {
    const before = this.run
    this.run = run
    const answered = before && (run.step > this.told?.at || run.phase !== before.phase || run.how !== before.how)
    if (before?.id !== run.id || answered) this.told = null
    if (before?.id !== run.id) this.record = null
    if (!before) {
      delete this.root.dataset.empty
      this.root.style.minHeight = `${this.height}px`
      this.grown()
    }
    this.heard()
    this.headline()
    this.chosen.textContent = this.chosen.title = chosenLine(run)
    const paused = run.phase === "paused"
    const order = paused ? "go_on" : "pause"
    if (this.pause.dataset.order !== order) {
      this.pause.dataset.order = order
      ;[this.pause.textContent, this.pause.title] = WORDS.orders[order]
    }
    // What has ended can only be trained on, from checkpoints.
    this.root.toggleAttribute("data-ended", Boolean(run.how))
    this.buttons.hidden = Boolean(run.how && !(run.checkpoints && run.step))
    this.extend.disabled = this.more.disabled = Boolean(run.fixed_length)
    this.extend.title = run.fixed_length || (run.how ? WORDS.on_later : WORDS.orders.extend[1])
  }

  headline() {
    const parts = this.told && !this.told.bad ? [this.told.text] : []
    parts.push(...status(this.run, WORDS))
    const failed = ["failed", "diverged"].includes(this.run.how)
    this.line.textContent = this.told?.bad ? this.told.text : parts.join(" · ")
    this.line.title = this.told?.bad ? this.told.text : this.run.reason || this.line.textContent
    this.canvas.ariaLabel = this.line.textContent
    this.line.toggleAttribute("data-bad", Boolean(failed || this.told?.bad))
    if (failed && this.run.reason) this.line.textContent += `: ${this.run.reason}`
  }

  /** A whole record. */
  show(record) {
    const known = this.record
    const answers = ({ saved, pictures }) => saved.length + pictures.length
    if (known?.id === record.id && answers(known) < answers(record)) this.told = null
    this.head(record)
    this.record = record
    this.prepared = prepare(record)
    if (!known || known.saved.length !== record.saved.length || known.best !== record.best || known.id !== record.id) {
      const option = ({ step }) => new Option(`${step}${step === record.best ? ` ⚑ ${WORDS.best}` : ""}`, step)
      this.keep.replaceChildren(new Option(WORDS.orders.keep[0], ""), ...record.saved.map(option))
    }
    this.keep.disabled = !record.saved.length
    this.gallery.show(record)
    this.values()
    this.draw()
  }

  point(event) {
    if (!this.record) return
    const box = this.canvas.getBoundingClientRect()
    const at = event && ((event.clientX - box.left) / box.width) * this.canvas.clientWidth
    this.pointed = event && Math.round(stepAt(at, this.canvas.clientWidth, this.record))
    this.gallery.point(this.pointed)
    this.values()
    this.draw()
  }

  /** The legend, with the values of the last step or of that under the pointer. */
  values() {
    const step = this.pointed ?? this.record.step
    const parts = valuesAt(step, this.prepared).map(({ name, value }) => {
      const part = element("span", null, { textContent: `● ${WORDS.terms[name] ?? name} ${number(value)}` })
      part.style.color = colour(name)
      part.dataset.term = name
      return part
    })
    this.legend.replaceChildren(element("span", null, { textContent: `${WORDS.step} ${step}` }), ...parts)
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.canvas
    if (!this.record || !width || !height) return
    const ratio = window.devicePixelRatio || 1
    const [wide, high] = [Math.round(width * ratio), Math.round(height * ratio)]
    if (this.canvas.width !== wide || this.canvas.height !== high) [this.canvas.width, this.canvas.height] = [wide, high]
    const context = this.canvas.getContext("2d")
    context.setTransform(ratio, 0, 0, ratio, 0, 0)
    const text = getComputedStyle(this.line).color
    draw(context, width, height, this.record, this.prepared, { text, pointed: this.pointed, words: WORDS })
  }
}
