import assert from "node:assert/strict"
import { readFileSync } from "node:fs"
import { test } from "node:test"

import { adopt, WORDS } from "../../web/words.mjs"

const tree = (language) => {
  return JSON.parse(readFileSync(new URL(`../../locales/${language}/main.json`, import.meta.url))).anchor
}

test("the English texts are those of the scripts", () => assert.deepEqual(tree("en"), WORDS))

for (const language of ["zh", "ja", "ko"]) {
  test(`every text is there in ${language}`, () => {
    const words = structuredClone(WORDS)
    adopt(words, tree(language))
    assert.deepEqual(words, tree(language))
    const same = (one, other) => {
      return typeof one === "string" ? one === other : Object.keys(one).some((name) => same(one[name], other[name]))
    }
    assert.ok(!same(words, WORDS))
  })
}

test("what is missing or of another kind stays as it was", () => {
  const words = { a: "A", b: { c: "C" }, d: ["D", "E"] }
  adopt(words, { a: ["x"], b: "y", d: ["only one"], e: "new" })
  adopt(words, undefined)
  assert.deepEqual(words, { a: "A", b: { c: "C" }, d: ["D", "E"] })
})
