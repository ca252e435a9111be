import assert from "node:assert/strict"
import { test } from "node:test"

import * as list from "../../web/pictures.mjs"

const dog = { name: "semantic_anchor/dog.png", sha256: "a".repeat(64), bytes: 5 }
const cat = { name: "cat.png", sha256: "b".repeat(64), bytes: 6 }
const hen = { name: "hen.png", sha256: "c".repeat(64), bytes: 7 }
const mask = { name: "m.png", sha256: "d".repeat(64), bytes: 8 }
const whole = (each) => ({ ...each, width: 800, height: 600, turned: false, share: 0.5 })
const seenOf = (...pairs) => new Map(pairs.map(([file, answer, as]) => [list.keyOf(file, as), answer]))

test("a list comes back as it was written, without what says nothing", () => {
  const entries = [{ ...dog, caption: "a sks dog", mask, invert_mask: true }, { ...cat, caption: "", mask: null }]
  const text = list.serialise(entries)
  assert.equal(text, JSON.stringify([{ ...dog, caption: "a sks dog", mask, invert_mask: true }, cat]))
  assert.deepEqual(list.parse(text), { entries: JSON.parse(text), bad: false })
  assert.equal(list.serialise([]), "")
  assert.equal(list.serialise([{ ...dog, invert_mask: true }]), JSON.stringify([dog])) // of no mask
})

test("what is no list is bad, and nothing is none", () => {
  for (const text of ["", " ", null, undefined, "[]"]) assert.deepEqual(list.parse(text), { entries: [], bad: false })
  for (const text of ["dog.png", "{}", "[1]", "[null]", '["dog.png"]', '[{"caption": "x"}]', '[{"name": 1}]', '[{"name": "a", "mask": 1}]']) {
    assert.deepEqual(list.parse(text), { entries: [], bad: true }, text)
  }
})

test("the same bytes are there once, under whatever name", () => {
  const first = list.add([], dog)
  assert.deepEqual(first, { entries: [dog], known: null })
  const again = list.add([cat, dog], { ...dog, name: "other.png" })
  assert.deepEqual(again, { entries: [cat, dog], known: 1 })
  const told = list.add([cat, dog], { ...dog, name: "other.png", caption: "a sks dog", mask })
  assert.deepEqual(told.entries, [cat, { ...dog, caption: "a sks dog", mask }])
  assert.deepEqual(list.add([dog, cat], hen, 1).entries, [dog, hen, cat])
  assert.equal(list.add([{ name: "x.png" }], { name: "y.png" }).known, null) // no hash, no judgement
})

test("pictures are moved and taken off, and the list before stays as it was", () => {
  const entries = [dog, cat, hen]
  assert.deepEqual(list.move(entries, 0, 2), [cat, hen, dog])
  assert.deepEqual(list.move(entries, 2, 0), [hen, dog, cat])
  assert.deepEqual(list.move(entries, 1, 1), entries)
  assert.deepEqual(list.move(entries, 0, -1), entries)
  assert.deepEqual(list.move(entries, 0, 9), [cat, hen, dog])
  assert.deepEqual(list.remove(entries, 1), [dog, hen])
  assert.deepEqual(list.change(entries, 1, { caption: "x" })[1], { ...cat, caption: "x" })
  assert.deepEqual(entries, [dog, cat, hen])
})

test("the server is asked of pictures and masks, and told what is known of them", () => {
  const entries = [{ ...dog, caption: "x", mask }, { name: "cat.png" }]
  assert.deepEqual(list.asked(entries), [
    { ...dog, as: "picture" },
    { ...mask, as: "mask" },
    { name: "cat.png", as: "picture" },
  ])
})

test("what was found elsewhere is written so, and keeps what is known of it", () => {
  const moved = { ...dog, name: "renamed.png" }
  const seen = seenOf([dog, whole(moved)], [{ name: "cat.png" }, whole(cat)], [hen, { missing: true, why: "gone" }])
  const entries = list.pinned([{ ...dog, caption: "x" }, { name: "cat.png" }, hen], seen)
  assert.deepEqual(
    entries.map(({ name, sha256, bytes, caption }) => ({ name, sha256, bytes, caption })),
    [{ ...moved, caption: "x" }, { ...cat, caption: undefined }, { ...hen, caption: undefined }],
  )
  assert.equal(seen.get(list.keyOf(moved)).width, 800)
  assert.deepEqual(list.missing(entries, seen), ["hen.png"])
})

test("what is wrong with a picture is named, worst first", () => {
  const cut = { size: [1024, 1024], box: [0, 0, 600, 600], enlarged: true }
  const kinds = (...rest) => list.faults(...rest).map(([kind]) => kind)
  const seen = seenOf([dog, whole(dog)], [mask, { ...whole(mask), width: 60, share: 0 }, "mask"], [cat, { why: "bad" }])
  assert.deepEqual(kinds(dog, seen, { ...cut, enlarged: false }, -1), [])
  assert.deepEqual(list.faults(dog, seen, cut, 0), [["double", "1"], ["small", "800 × 600"]])
  assert.deepEqual(kinds(dog, seen, null, -1), ["long"])
  assert.deepEqual(kinds({ ...dog, mask }, seen, cut, -1), ["mask_size", "mask_empty", "small"])
  assert.deepEqual(kinds({ ...dog, mask, invert_mask: true }, seen, cut, -1), ["mask_size", "small"])
  assert.deepEqual(kinds(cat, seen, undefined, -1), ["unreadable"])
  assert.deepEqual(kinds(hen, seen, undefined, -1), []) // not asked yet
  assert.deepEqual(kinds(hen, seenOf([hen, { missing: true, why: "gone" }]), undefined, -1), ["missing"])
})

test("the second of the same bytes says of which it is the double", () => {
  assert.deepEqual(list.doubles([dog, cat, { ...dog, name: "x" }, { name: "y" }, { name: "y" }]), [-1, -1, 0, -1, -1])
})

test("files that come together are a picture with its text and its mask", () => {
  const files = ["Dog.jpg", "dog.txt", "dog-masklabel.PNG", "cat.webp", "notes.txt", "x.heic"].map((name) => ({ name }))
  const { groups, left } = list.grouped(files)
  assert.deepEqual(groups, [
    { picture: files[0], text: files[1], mask: files[2] },
    { picture: files[3], text: null, mask: null },
  ])
  assert.deepEqual(left, ["notes.txt", "x.heic"])
})

test("a picture is called by its name without folders, or by its hash", () => {
  assert.equal(list.called(dog), "dog.png")
  assert.equal(list.called({ sha256: dog.sha256 }), "a".repeat(12))
})
