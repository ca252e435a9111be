// The list of picked pictures, as a node's widget holds it in JSON; anchor_core/data/picked.py reads the same.

const SUFFIXES = "png jpg jpeg jpe jfif webp bmp tif tiff gif avif".split(" ")
const MASK_ENDING = "-masklabel" // as in a folder: the mask of dog.jpg is dog-masklabel.png

const isText = (value) => typeof value === "string" && value !== ""
const isTextOrNone = (value) => value === undefined || value === null || typeof value === "string"

/** The pictures of a text, and whether it is `bad`: no list of objects. */
export function parse(text) {
  if (!text?.trim()) return { entries: [], bad: false }
  try {
    const entries = JSON.parse(text)
    const file = (each) => each && [each.name, each.sha256].some(isText) && [each.name, each.sha256].every(isTextOrNone)
    const fit = Array.isArray(entries) && entries.every((each) => file(each) && (!each.mask || file(each.mask)))
    return fit ? { entries, bad: false } : { entries: [], bad: true }
  } catch {
    return { entries: [], bad: true }
  }
}

const kept = (object) => Object.fromEntries(Object.entries(object).filter(([, value]) => value))

/** The text of a list; empty for none. */
export function serialise(entries) {
  if (!entries.length) return ""
  const file = ({ name, sha256, bytes }) => ({ name, sha256, bytes })
  const whole = (each) => ({
    ...file(each),
    caption: each.caption,
    mask: each.mask && kept(file(each.mask)),
    invert_mask: each.mask && each.invert_mask,
  })
  return JSON.stringify(entries.map((each) => kept(whole(each))))
}

/** The list with a picture more, at `at` or the end; or as it was, with the place where the same bytes are `known`. */
export function add(entries, entry, at = entries.length) {
  const known = entry.sha256 ? entries.findIndex(({ sha256 }) => sha256 === entry.sha256) : -1
  if (known < 0) return { entries: entries.toSpliced(at, 0, entry), known: null }
  const more = ({ caption, mask }) => kept({ caption, mask }) // dropped again, with a text or a mask beside it
  return { entries: change(entries, known, more(entry)), known }
}

export function remove(entries, index) {
  return entries.toSpliced(index, 1)
}

/** The picture at `from` comes to stand at `to` of the new list. */
export function move(entries, from, to) {
  const place = Math.min(Math.max(to, 0), entries.length - 1)
  return entries.toSpliced(from, 1).toSpliced(place, 0, entries[from])
}

export function change(entries, index, part) {
  return entries.with(index, { ...entries[index], ...part })
}

/** What a file is remembered by. */
export function keyOf(file, as = "picture") {
  return [as, file.sha256 ?? "", file.name ?? ""].join("\n")
}

/** What the server is asked of all files of a list. */
export function asked(entries) {
  const file = ({ name, sha256, bytes }, as) => ({ ...kept({ name, sha256, bytes }), as })
  return entries.flatMap((each) => [file(each, "picture"), ...(each.mask ? [file(each.mask, "mask")] : [])])
}

/** The list with names, hashes and sizes as the server found them; `seen` has its answers by key. */
export function pinned(entries, seen) {
  const found = (file, as) => {
    const { name, sha256, bytes } = seen.get(keyOf(file, as)) ?? {}
    const own = sha256 ? { ...file, name, sha256, bytes } : file
    if (sha256) seen.set(keyOf(own, as), seen.get(keyOf(file, as)))
    return own
  }
  return entries.map((each) => ({ ...found(each, "picture"), mask: each.mask && found(each.mask, "mask") }))
}

/** The last part of a name, or the beginning of a hash. */
export function called({ name, sha256 }) {
  return name ? name.split(/[\\/]/).at(-1) : sha256.slice(0, 12)
}

/** The place of the first picture with the same bytes, for each that stands after it; else -1. */
export function doubles(entries) {
  return entries.map(({ sha256 }, i) => {
    const first = sha256 ? entries.findIndex((other) => other.sha256 === sha256) : i
    return first < i ? first : -1
  })
}

/**
 * What is wrong with a picture, by kind (`missing`, `unreadable`, `long`, `small`, `double`, `mask_missing`,
 * `mask_size`, `mask_empty`), worst first, with what the sentence is about.
 */
export function faults(entry, seen, cut, double) {
  const told = []
  const own = seen.get(keyOf(entry))
  const mask = entry.mask && seen.get(keyOf(entry.mask, "mask"))
  if (own?.why) told.push([own.missing ? "missing" : "unreadable", own.why])
  if (own?.width && cut === null) told.push(["long", `${own.width} × ${own.height}`])
  if (mask?.why) told.push(["mask_missing", mask.why])
  if (mask?.width && own?.width && (mask.width !== own.width || mask.height !== own.height)) {
    told.push(["mask_size", `${mask.width} × ${mask.height}`])
  }
  if (mask?.width && mask.share === (entry.invert_mask ? 1 : 0)) told.push(["mask_empty", called(entry)])
  if (double >= 0) told.push(["double", String(double + 1)])
  if (cut?.enlarged) told.push(["small", `${own.width} × ${own.height}`])
  return told
}

/** Names of the pictures and masks of a list that are nowhere. */
export function missing(entries, seen) {
  return entries.filter((each) => seen.get(keyOf(each))?.missing).map(called)
}

const stemOf = (name) => name.replace(/\.[^.]*$/, "").toLowerCase()

export function isPicture(name) {
  return SUFFIXES.includes(/\.([^.]+)$/.exec(name)?.[1].toLowerCase())
}

/**
 * Files that came together, as a folder has them: each picture with the text and the mask beside it; and the names of
 * those that are none of this.
 */
export function grouped(files) {
  const pictures = files.filter(({ name }) => isPicture(name) && !stemOf(name).endsWith(MASK_ENDING))
  const beside = (picture, ending, fits) => {
    return files.find((file) => stemOf(file.name) === stemOf(picture.name) + ending && fits(file.name)) ?? null
  }
  const groups = pictures.map((picture) => ({
    picture,
    text: beside(picture, "", (name) => name.toLowerCase().endsWith(".txt")),
    mask: beside(picture, MASK_ENDING, isPicture),
  }))
  const taken = new Set(groups.flatMap(({ picture, text, mask }) => [picture, text, mask]))
  return { groups, left: files.filter((file) => !taken.has(file)).map(({ name }) => name) }
}
