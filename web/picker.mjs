// The list of picked pictures in its node: dropped, pasted, added, ordered, captioned, masked. It holds the widget's text.

import { Card, element, said } from "./card.mjs"
import { crop, sizesOf } from "./crop.mjs"
import { assetOf, filesOf, inputOf, mayHold, upload } from "./incoming.mjs"
import * as list from "./pictures.mjs"
import { NARROWEST, ROW, STYLE } from "./picker_style.mjs"
import { WORDS } from "./words.mjs"

const OURS = "application/x-semantic-anchor-picture"
const ROUTE = "/semantic_anchor/pictures"
const ROWS = 3 // that are shown without scrolling
const HEIGHT = { thin: 30, none: 84, bar: 28, note: 18 }

export class Picker {
  /**
   * `settings()`: {size, buckets, references, own}, of the node, `own` if the list is what it takes. `use()`: make it
   * so. `changed(work)`: do work that changes the text. `paint(picture, mask, saved)`: open the mask editor; false if
   * there is none. `grown()`: the height is another.
   */
  constructor(root, api, { settings, use, changed, paint, grown }) {
    Object.assign(this, { api, settings, use, changed, paint, grown })
    this.text = ""
    this.entries = []
    this.seen = new Map()
    this.cards = []
    this.root = Object.assign(root, { className: "sa-picker", tabIndex: -1 }) // clicked, it takes pastes
    element("style", this.root, { textContent: STYLE })
    const bar = element("div", this.root, { className: "sa-bar" })
    this.line = element("span", bar, { className: "sa-said" })
    const [useText, useTitle] = WORDS.pictures.use
    this.useButton = element("button", bar, { type: "button", textContent: useText, title: useTitle })
    this.useButton.addEventListener("click", () => this.use())
    const [addText, addTitle] = WORDS.pictures.add
    const add = element("button", bar, { type: "button", textContent: addText, title: addTitle, className: "sa-add" })
    this.chosen = element("input", this.root, { type: "file", multiple: true, hidden: true, accept: "image/*,.txt" })
    add.addEventListener("click", () => this.chosen.click())
    this.chosen.addEventListener("change", async () => {
      const files = [...this.chosen.files]
      this.chosen.value = ""
      await this.take(files)
    })
    this.note = element("div", this.root, { className: "sa-note", role: "status" })
    this.grid = element("div", this.root, { className: "sa-cards", role: "list" })
    this.grid.dataset.captureWheel = "true" // Nodes 2.0: it scrolls, the graph does not zoom
    this.listen()
    new ResizeObserver(() => this.resize()).observe(this.root)
  }

  listen() {
    const on = (name, work) => this.root.addEventListener(name, work)
    on("keydown", (event) => this.key(event))
    on("paste", (event) => {
      if (!event.clipboardData.files.length) return
      event.preventDefault()
      event.stopPropagation()
      this.take([...event.clipboardData.files])
    })
    on("dragstart", (event) => {
      const from = this.cards.findIndex(({ thumb }) => thumb === event.target)
      if (from < 0) return
      this.dragged = from
      event.dataTransfer.setData(OURS, JSON.stringify(this.entries[from]))
      event.dataTransfer.effectAllowed = "copyMove"
    })
    on("dragend", () => {
      this.dragged = null
      this.mark(null)
    })
    on("dragover", (event) => {
      if (!this.holds(event.dataTransfer)) return
      event.preventDefault()
      event.stopPropagation()
      this.mark(event)
    })
    on("dragleave", (event) => {
      if (!this.root.contains(event.relatedTarget)) this.mark(null)
    })
    on("drop", (event) => this.drop(event))
    on("pointerdown", (event) => {
      if (event.target.closest(".sa-pic, button")) event.stopPropagation() // it drags a picture, not the node
    })
  }

  holds(transfer) {
    return Boolean(transfer?.types.includes(OURS)) || mayHold(transfer)
  }

  /** Where among the pictures something over them would come to stand. */
  placeAt({ clientX, clientY }) {
    for (const { root, index } of this.cards) {
      const box = root.getBoundingClientRect()
      if (clientY > box.bottom || clientX > box.right || clientY < box.top || clientX < box.left) continue
      return index + (clientX > box.left + box.width / 2 ? 1 : 0)
    }
    return this.entries.length
  }

  mark(event) {
    this.root.toggleAttribute("data-over", Boolean(event))
    const at = event && this.placeAt(event)
    for (const { root, index } of this.cards) {
      const side = at === index ? "before" : at === this.entries.length && at === index + 1 ? "after" : null
      if (side) root.dataset.drop = side
      else delete root.dataset.drop
    }
  }

  /** Whatever was dropped on the node: pictures of this list or another, files, folders, files of ComfyUI. */
  async drop(event) {
    const transfer = event.dataTransfer
    if (!this.holds(transfer)) return false
    event.preventDefault()
    event.stopPropagation()
    const at = this.placeAt(event)
    const own = this.dragged
    this.dragged = null
    this.mark(null)
    const ours = transfer.getData(OURS)
    if (ours && Number.isInteger(own)) {
      const to = at > own ? at - 1 : at
      this.commit(list.move(this.entries, own, to))
      this.focus(to)
    } else if (ours) await this.put(list.parse(`[${ours}]`).entries, at)
    else if (transfer.files.length) await this.take(await filesOf(transfer), at)
    else {
      const asset = assetOf(transfer, location.origin)
      if (asset) await this.takeAll([[asset.filename, async () => ({ name: await inputOf(this.api, asset) })]], at)
    }
    return true
  }

  /** Copy files into the input folder and put them on the list; texts and masks beside them are theirs. */
  async take(files, at) {
    const { groups, left } = list.grouped(files)
    const works = groups.map(({ picture, text, mask }) => {
      const work = async () => {
        const entry = { name: await upload(this.api, picture) }
        if (text) entry.caption = (await text.text()).trim().replace(/\s+/g, " ")
        if (mask) entry.mask = { name: await upload(this.api, mask) }
        return entry
      }
      return [picture.name, work]
    })
    await this.takeAll(works, at, left.map((name) => said(WORDS.pictures.format, name)))
  }

  /** `works`: [name, work] of each, which makes its entry. One that fails does not lose the others. */
  async takeAll(works, at, told = []) {
    const entries = []
    for (const [name, work] of works) {
      this.tell([said(WORDS.pictures.copying, name)])
      try {
        entries.push(await work())
      } catch (error) {
        told.push(`${said(WORDS.pictures.failed, name)} (${error.message})`)
      }
    }
    await this.put(entries, at, told)
  }

  /** Put entries on the list that are not on it by what is in them. */
  async put(entries, at, told = []) {
    if (!entries.length) return this.tell(told, true)
    const gone = new Set(list.missing(this.entries, this.seen))
    await this.look(entries)
    let now = this.entries
    for (const entry of list.pinned(entries, this.seen)) {
      const { entries: next, known } = list.add(now, entry, at === undefined ? undefined : at++)
      if (known !== null) {
        const { pictures: words } = WORDS
        told.push(said(gone.has(list.called(now[known])) ? words.back : words.known, list.called(now[known])))
        if (at !== undefined) at--
      }
      now = next
    }
    if (told.length) await this.look(now)
    this.changed(() => {
      this.commit(now)
      this.use()
    })
    this.tell(told)
  }

  /** Ask the server what there is of some pictures, in one request. */
  async look(entries) {
    const files = list.asked(entries)
    if (!files.length) return
    try {
      const headers = { "Content-Type": "application/json" }
      const answer = await this.api.fetchApi(ROUTE, { method: "POST", headers, body: JSON.stringify({ files }) })
      const said = await answer.json()
      if (!answer.ok) throw new Error(said.error ?? WORDS.unreachable)
      files.forEach((file, i) => this.seen.set(list.keyOf(file, file.as), said.files[i]))
    } catch (error) {
      this.tell([`${WORDS.unreachable} (${error.message})`], true)
    }
  }

  /** The widget's text was set from outside: a workflow, an undo, a paste of the node. */
  set(text) {
    this.text = typeof text === "string" ? text : ""
    const { entries, bad } = list.parse(this.text)
    this.entries = entries
    this.tell(bad ? [WORDS.pictures.unread] : [], bad)
    this.draw()
    if (entries.some((each) => !this.seen.get(list.keyOf(each))?.width)) this.look(entries).then(() => this.draw())
  }

  commit(entries) {
    this.changed(() => {
      this.entries = list.pinned(entries, this.seen)
      this.text = list.serialise(this.entries)
    })
    this.draw()
  }

  act(name, card, value) {
    const { index } = card
    const entry = this.entries[index]
    const set = (part) => this.commit(list.change(this.entries, index, part))
    if (name === "caption") {
      this.entries = list.change(this.entries, index, { caption: value })
      this.text = list.serialise(this.entries) // what is sent if Run is pressed meanwhile
    } else if (name === "captioned") set({ caption: entry.caption?.trim() ?? "" })
    else if (name === "invert" && entry.mask) set({ invert_mask: !entry.invert_mask })
    else if (name === "unmask") set({ mask: null, invert_mask: false })
    else if (name === "mask") this.mask(entry)
    else if (name === "remove") {
      this.commit(list.remove(this.entries, index))
      this.focus(Math.min(index, this.entries.length - 1))
    }
  }

  async mask(entry) {
    const answer = this.seen.get(list.keyOf(entry))
    if (!answer?.width) return
    const mask = entry.mask && (this.seen.get(list.keyOf(entry.mask, "mask"))?.name ?? null)
    const key = list.keyOf(entry)
    const saved = async (name) => {
      await this.look([{ ...entry, mask: { name } }])
      const index = this.entries.findIndex((each) => list.keyOf(each) === key)
      if (index < 0) return
      const painted = this.seen.get(list.keyOf({ name }, "mask"))?.clear !== false
      this.commit(list.change(this.entries, index, { mask: painted ? { name } : null }))
      this.tell(painted ? [] : [WORDS.pictures.whole])
      this.focus(index)
    }
    if (!(await this.paint(answer, mask, saved))) this.tell([WORDS.pictures.no_editor], true)
  }

  key(event) {
    const card = this.cards.find(({ root }) => root === event.target)
    if (!card || event.ctrlKey || event.metaKey) return
    const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.columns, ArrowDown: this.columns }
    moves.Home = -card.index
    moves.End = this.entries.length - 1 - card.index
    const acts = { Delete: "remove", Backspace: "remove", m: "mask", i: "invert", u: "unmask" }
    if (event.key in moves) {
      const to = Math.min(Math.max(card.index + moves[event.key], 0), this.entries.length - 1)
      if (event.altKey) this.commit(list.move(this.entries, card.index, to))
      this.focus(to)
    } else if (event.key === "Enter") card.caption.focus()
    else if (event.key in acts) this.act(acts[event.key], card)
    else return
    event.preventDefault()
    event.stopPropagation() // the graph would remove the node
  }

  focus(index) {
    this.cards.forEach(({ root }, i) => (root.tabIndex = i === index ? 0 : -1))
    this.cards[index]?.root.focus()
  }

  tell(lines, bad = false) {
    this.told = lines.length ? { text: lines.join("\n"), bad } : null
    this.notes()
  }

  notes() {
    const gone = list.missing(this.entries, this.seen)
    const missing = gone.length ? said(WORDS.pictures.missing, gone.join(", ")) : ""
    this.note.textContent = this.told?.text ?? missing
    this.note.toggleAttribute("data-bad", this.told ? this.told.bad : Boolean(missing))
    this.note.title = this.note.textContent
    this.resize()
  }

  draw() {
    const { size, buckets, references, own } = this.settings()
    const words = WORDS.pictures
    const none = !this.entries.length
    const sizes = size ? sizesOf(size, buckets) : undefined
    this.root.toggleAttribute("data-none", none)
    this.root.toggleAttribute("data-unused", !own)
    this.useButton.hidden = own || none
    const shape = size ? ` · ${buckets ? words.shapes : ""} ${size} × ${size}` : ""
    const [yes, no] = none ? [words.empty, words.other] : [said(words.count, this.entries.length) + shape, words.unused]
    this.line.textContent = own ? yes : said(no, references)
    if (own && !none && sizes === null) this.line.textContent = words.multiple
    this.line.title = none ? this.line.textContent : `${this.line.textContent}\n${words.keys}`
    while (this.cards.length < this.entries.length) this.cards.push(new Card((...said) => this.act(...said)))
    this.cards.length = this.entries.length
    if (this.grid.childElementCount !== this.cards.length) this.grid.replaceChildren(...this.cards.map(({ root }) => root))
    const doubles = list.doubles(this.entries)
    this.cards.forEach((card, i) => {
      const entry = this.entries[i]
      const answer = this.seen.get(list.keyOf(entry))
      const cut = answer?.width && sizes ? crop(answer.width, answer.height, sizes) : undefined
      const mask = entry.mask && this.seen.get(list.keyOf(entry.mask, "mask"))
      const views = { picture: this.view(answer, "picture"), mask: this.view(mask, "mask") }
      card.show(i, entry, answer, cut, list.faults(entry, this.seen, cut, doubles[i]), views)
    })
    if (!this.cards.some(({ root }) => root.tabIndex === 0) && this.cards.length) this.cards[0].root.tabIndex = 0
    this.notes()
  }

  view(answer, as) {
    return answer?.width ? this.api.apiURL(`${ROUTE}/${answer.sha256}/${as}`) : null
  }

  get columns() {
    const wide = this.root.clientWidth || 340
    return Math.max(1, Math.floor((wide + 6) / (NARROWEST + 6)))
  }

  get height() {
    const note = this.note.textContent ? HEIGHT.note * Math.min(this.note.textContent.split("\n").length, 2) : 0
    if (!this.entries.length) return (this.root.hasAttribute("data-unused") ? HEIGHT.thin : HEIGHT.none) + note
    return HEIGHT.bar + note + ROW * Math.min(Math.ceil(this.entries.length / this.columns), ROWS)
  }

  resize() {
    if (this.shown === this.height) return
    this.shown = this.height
    this.root.style.minHeight = `${this.shown}px`
    this.grown()
  }
}
