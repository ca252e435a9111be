// One picture of the list: its thumbnail with the cut and the mask, its buttons, its caption.

import { called } from "./pictures.mjs"
import { THUMB } from "./picker_style.mjs"
import { WORDS } from "./words.mjs"

const ICONS = { mask: "pi-pencil", invert: "pi-clone", unmask: "pi-eraser", remove: "pi-times" }
const BAD = ["missing", "unreadable", "long", "mask_missing", "mask_size", "mask_empty"]

export function element(tag, parent, properties = {}) {
  const made = Object.assign(document.createElement(tag), properties)
  parent?.append(made)
  return made
}

/** A sentence with its {} filled in. */
export function said(text, value) {
  return text.replace("{}", value)
}

function source(image, address) {
  if (address && image.getAttribute("src") !== address) image.src = address
  image.hidden = !address
}

export class Card {
  /** `act(name, card, value)`: a button or key of it was used; `index` is its place. */
  constructor(act) {
    this.act = act
    this.index = 0
    this.root = element("div", null, { className: "sa-pic", tabIndex: -1, role: "listitem" })
    this.thumb = element("div", this.root, { className: "sa-thumb", draggable: true })
    this.whole = element("div", this.thumb, { className: "sa-whole" })
    this.image = element("img", this.whole, { draggable: false, alt: "" })
    this.counts = element("img", this.whole, { className: "sa-counts", draggable: false, alt: "" })
    this.cut = element("div", this.whole, { className: "sa-cut" })
    this.gone = element("div", this.thumb, { className: "sa-gone" })
    this.number = element("span", this.thumb, { className: "sa-number" })
    this.fault = element("div", this.thumb, { className: "sa-fault" })
    const tools = element("div", this.thumb, { className: "sa-tools" })
    this.buttons = Object.fromEntries(Object.keys(ICONS).map((name) => [name, this.button(name, tools)]))
    this.caption = element("input", this.root, { className: "sa-caption", placeholder: WORDS.pictures.caption })
    this.caption.spellcheck = false
    this.caption.addEventListener("input", () => act("caption", this, this.caption.value))
    this.caption.addEventListener("change", () => act("captioned", this))
    this.caption.addEventListener("keydown", (event) => {
      event.stopPropagation() // the graph and the list have keys of their own
      if (event.key === "Enter" || event.key === "Escape") this.root.focus()
    })
  }

  button(name, parent) {
    const [label, title] = WORDS.pictures[name]
    const made = element("button", parent, { type: "button", title, tabIndex: -1 })
    made.dataset.act = name
    made.ariaLabel = label
    element("i", made, { className: `pi ${ICONS[name]}` })
    made.addEventListener("click", () => this.act(name, this))
    return made
  }

  /** `answer`: what the server says of the file; `cut`: of `crop`; `faults`: of `faults`; `views`: two addresses. */
  show(index, entry, answer, cut, faults, views) {
    this.index = index
    this.number.textContent = index + 1
    const there = Boolean(answer?.width)
    const has = { mask: there, invert: Boolean(entry.mask), unmask: Boolean(entry.mask), remove: true }
    for (const [name, button] of Object.entries(this.buttons)) button.hidden = !has[name]
    this.buttons.invert.ariaPressed = this.buttons.mask.ariaPressed = "false"
    if (entry.mask) this.buttons.mask.ariaPressed = "true"
    if (entry.mask && entry.invert_mask) this.buttons.invert.ariaPressed = "true"
    this.whole.hidden = !there
    this.gone.hidden = there
    this.gone.textContent = called(entry)
    source(this.image, there && views.picture)
    source(this.counts, there && views.mask)
    this.counts.toggleAttribute("data-inverted", Boolean(entry.invert_mask))
    if (there) this.frame(answer, cut)
    const told = faults.map(([kind, about]) => said(WORDS.pictures.faults[kind], about))
    this.root.toggleAttribute("data-bad", BAD.includes(faults[0]?.[0]))
    this.fault.hidden = !told.length
    this.fault.textContent = told[0] ?? ""
    const size = there ? [`${answer.width} × ${answer.height}${cut ? ` → ${cut.size[1]} × ${cut.size[0]}` : ""}`] : []
    const about = [answer?.name ?? entry.name ?? called(entry), ...size, ...told]
    this.thumb.title = about.join("\n")
    this.root.ariaLabel = [index + 1, ...about, entry.caption].filter(Boolean).join(", ")
    if (this.caption.value !== (entry.caption ?? "")) this.caption.value = entry.caption ?? ""
    this.caption.title = entry.caption || WORDS.pictures.caption_long
    this.caption.ariaLabel = `${index + 1}: ${WORDS.pictures.caption}`
  }

  /** Fit the picture into its place, and draw on it what the training sees. */
  frame({ width, height }, cut) {
    this.whole.style.aspectRatio = `${width} / ${height}`
    this.whole.style.width = `min(100%, ${(THUMB * width) / height}px)`
    this.cut.hidden = !cut
    if (!cut) return
    const [left, top, right, bottom] = cut.box
    const share = (part, of) => `${(100 * part) / of}%`
    Object.assign(this.cut.style, {
      left: share(left, width), top: share(top, height),
      width: share(right - left, width), height: share(bottom - top, height),
    })
  }
}
