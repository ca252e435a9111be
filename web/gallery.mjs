// The strip of sample pictures, and one of them large, with the arrow keys through the steps.

import { nearest } from "./curves.mjs"
import { WORDS } from "./words.mjs"

export class Gallery {
  constructor(root, strip, pictureOf) {
    this.strip = strip
    this.pictureOf = pictureOf
    this.steps = []
    this.dialog = document.createElement("dialog")
    this.large = document.createElement("img")
    this.caption = document.createElement("div")
    this.dialog.append(this.large, this.caption)
    root.append(this.dialog)
    this.dialog.addEventListener("click", () => this.dialog.close())
    this.dialog.addEventListener("keydown", (event) => this.key(event))
    this.dialog.addEventListener("pointerdown", (event) => event.stopPropagation())
  }

  show(record) {
    const steps = record.pictures.map(({ step }) => step)
    if (this.id === record.id && this.steps.join() === steps.join()) return
    const known = this.id === record.id ? new Map(this.steps.map((step, i) => [step, this.strip.children[i]])) : new Map()
    this.id = record.id
    this.steps = steps
    this.prompts = record.pictures.map(({ prompt }) => prompt)
    const images = steps.map((step) => known.get(step) ?? this.image(step))
    const followed = this.strip.scrollLeft + this.strip.clientWidth >= this.strip.scrollWidth - 8
    this.strip.replaceChildren(...images)
    if (followed) this.strip.scrollLeft = this.strip.scrollWidth
  }

  image(step) {
    const image = document.createElement("img")
    image.src = this.pictureOf(this.id, step)
    image.alt = image.title = `${WORDS.step} ${step}`
    image.dataset.step = step
    image.tabIndex = 0
    image.draggable = false
    image.addEventListener("click", () => this.open(this.steps.indexOf(step)))
    image.addEventListener("keydown", (event) => {
      if (event.key === "Enter") this.open(this.steps.indexOf(step))
    })
    return image
  }

  open(index) {
    this.at = Math.min(Math.max(index, 0), this.steps.length - 1)
    const step = this.steps[this.at]
    this.large.src = this.pictureOf(this.id, step)
    this.caption.textContent = `${WORDS.picture} ${step}: ${this.prompts[this.at]}`
    if (!this.dialog.open) this.dialog.showModal()
  }

  key(event) {
    event.stopPropagation() // the graph has keys of its own
    const moves = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1, Home: -Infinity, End: Infinity }
    if (!(event.key in moves)) return
    event.preventDefault()
    this.open(this.at + moves[event.key])
  }

  /** Mark the sample nearest before a step of the chart; null for none. */
  point(step) {
    const marked = step === null ? -1 : nearest(this.steps, step)
    ;[...this.strip.children].forEach((image, i) => image.toggleAttribute("data-pointed", i === marked))
  }
}
