// A sweep in its node: a column for each value, the scores under each picture, and a button that takes the value.

import { WORDS } from "./words.mjs"

const STYLE = `
.sa-sweep { display: flex; flex-direction: column; gap: 4px; width: 100%; height: 100%; box-sizing: border-box;
  color: var(--input-text); font: 11px sans-serif; overflow: hidden; }
.sa-sweep .sa-taken { color: var(--descrip-text); min-height: 14px; white-space: nowrap; overflow: hidden;
  text-overflow: ellipsis; }
.sa-columns { display: flex; gap: 6px; overflow: auto; justify-content: safe center; flex: 1 1 auto; min-height: 0; }
.sa-columns:empty { display: none; }
.sa-column { flex: 0 1 132px; min-width: 96px; box-sizing: border-box; display: flex; flex-direction: column; gap: 3px; border-radius: 5px;
  padding: 4px; background: var(--comfy-input-bg); border: 1px solid transparent; }
.sa-column[data-best] { border-color: #5fb36a; }
.sa-column[data-taken] { outline: 2px solid var(--input-text); outline-offset: -2px; }
.sa-column b { text-align: center; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.sa-column figure { margin: 0; }
.sa-column img { width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: 3px; cursor: zoom-in; display: block; }
.sa-column img:focus-visible { outline: 2px solid var(--input-text); }
.sa-column figcaption { color: var(--descrip-text); font-size: 10px; line-height: 13px; text-align: center; }
.sa-column button { background: var(--secondary-background, var(--comfy-menu-bg)); color: var(--input-text);
  border: 1px solid var(--border-color); border-radius: 4px; padding: 2px 4px; font: inherit; cursor: pointer; }
.sa-sweep dialog { background: var(--comfy-menu-bg); color: var(--input-text); border: 1px solid var(--border-color);
  border-radius: 6px; padding: 10px; text-align: center; font: 13px sans-serif; }
.sa-sweep dialog::backdrop { background: rgb(0 0 0 / 60%); }
.sa-frame { position: relative; margin-bottom: 6px; }
.sa-frame img { display: block; max-width: 85vw; max-height: 80vh; min-width: 320px; }
.sa-frame img:first-child { position: absolute; inset: 0; width: 100%; height: 100%; }
.sa-frame img:last-child { position: relative; }
`
const SHORT = { clip_i: "CLIP-I", clip_t: "CLIP-T", dino: "DINO" }
export const EMPTY = 24

function element(tag, parent, properties = {}) {
  const made = Object.assign(document.createElement(tag), properties)
  parent?.append(made)
  return made
}

/** "CLIP-I 0.812" of each score. */
export const told = (scores) => Object.entries(scores).map(([name, value]) => `${SHORT[name] ?? name} ${value.toFixed(3)}`)

/** Small pictures, as those of the sandbox, keep their pixels. */
const crisp = (image) => (image.style.imageRendering = image.naturalWidth < 160 ? "pixelated" : "auto")

export class SweepView {
  /** use(value): puts it where it belongs; gives a sentence. addressOf(file): of a picture. grown(): see View. */
  constructor({ use, addressOf, grown }) {
    Object.assign(this, { use, addressOf, grown })
    this.root = element("div", null, { className: "sa-sweep" })
    this.root.style.minHeight = `${EMPTY}px`
    element("style", this.root, { textContent: STYLE })
    this.line = element("div", this.root, { className: "sa-taken", textContent: WORDS.sweep.none })
    this.columns = element("div", this.root, { className: "sa-columns" })
    this.dialog = element("dialog", this.root)
    this.frame = element("div", this.dialog, { className: "sa-frame" })
    this.first = element("img", this.frame)
    this.large = element("img", this.frame)
    for (const image of [this.first, this.large]) image.addEventListener("load", () => crisp(image))
    this.frame.addEventListener("pointermove", (event) => this.compare(event))
    this.frame.addEventListener("pointerleave", () => this.compare(null))
    this.caption = element("div", this.dialog)
    this.dialog.addEventListener("click", () => this.dialog.close())
    this.dialog.addEventListener("keydown", (event) => this.key(event))
    this.dialog.addEventListener("pointerdown", (event) => event.stopPropagation())
  }

  get height() {
    if (!this.sweep) return EMPTY
    const { scores } = this.sweep.values[0]
    const rows = this.shots.length / this.sweep.values.length
    return Math.min(700, 84 + rows * (132 + 13 * Object.keys(scores[0] ?? {}).length))
  }

  /** A sweep as the node told it: {what, best, values: [{value, scores, means}]}, and its pictures' files by value. */
  show(sweep, files) {
    this.sweep = sweep
    const each = files.length / sweep.values.length
    this.shots = sweep.values.flatMap(({ value, scores }, j) =>
      files.slice(j * each, (j + 1) * each).map((file, i) => ({ value, file, scores: scores[i] ?? {} })),
    )
    this.columns.replaceChildren(...sweep.values.map((entry, j) => this.column(entry, j, each)))
    const first = sweep.best === null ? null : sweep.values[sweep.best].value
    this.line.textContent = first === null ? WORDS.sweep.look : `${WORDS.sweep.best}: ${sweep.what} ${first}`
    this.root.style.minHeight = `${this.height}px`
    this.grown()
  }

  column({ value }, j, each) {
    const made = element("div", null, { className: "sa-column" })
    made.dataset.value = value
    made.toggleAttribute("data-best", j === this.sweep.best)
    element("b", made, { textContent: `${this.sweep.what} ${value}${j === this.sweep.best ? " ★" : ""}` })
    for (let i = j * each; i < (j + 1) * each; i++) {
      const figure = element("figure", made)
      const image = element("img", figure, { src: this.addressOf(this.shots[i].file), draggable: false, tabIndex: 0 })
      image.alt = `${this.sweep.what} ${value}`
      image.addEventListener("click", () => this.open(i))
      image.addEventListener("load", () => crisp(image))
      image.addEventListener("error", () => (image.style.visibility = "hidden")) // ComfyUI has emptied its temp folder
      image.addEventListener("keydown", (event) => event.key === "Enter" && this.open(i))
      element("figcaption", figure, { innerText: told(this.shots[i].scores).join("\n") })
    }
    const button = element("button", made, { type: "button", textContent: WORDS.sweep.use, title: WORDS.sweep.use_title })
    button.addEventListener("click", () => {
      this.line.textContent = this.use(Number(value))
      for (const other of this.columns.children) other.toggleAttribute("data-taken", other === made)
    })
    return made
  }

  open(index) {
    this.at = Math.min(Math.max(index, 0), this.shots.length - 1)
    const { value, file, scores } = this.shots[this.at]
    this.large.src = this.addressOf(file)
    this.first.src = this.addressOf(this.shots[this.at % (this.shots.length / this.sweep.values.length)].file)
    this.compare(null)
    this.caption.textContent = [`${this.sweep.what} ${value}`, ...told(scores)].join(" · ")
    if (!this.dialog.open) this.dialog.showModal()
  }

  /** Left of the pointer the picture of the first value from the same noise, right of it the one that is shown. */
  compare(event) {
    const box = this.frame.getBoundingClientRect()
    const at = event ? ((event.clientX - box.left) / box.width) * 100 : 0
    this.large.style.clipPath = `inset(0 0 0 ${Math.min(Math.max(at, 0), 100)}%)`
  }

  /** Left and right to the next value of the same noise, up and down through its noises. */
  key(event) {
    event.stopPropagation() // the graph has keys of its own
    const each = this.shots.length / this.sweep.values.length
    const moves = { ArrowLeft: -each, ArrowRight: each, ArrowUp: -1, ArrowDown: 1 }
    if (!(event.key in moves)) return
    event.preventDefault()
    const to = this.at + moves[event.key]
    if (to >= 0 && to < this.shots.length) this.open(to)
  }
}
