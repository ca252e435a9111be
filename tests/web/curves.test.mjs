import assert from "node:assert/strict"
import { test } from "node:test"

import { duration, memory, nearest, number, range, scale, smooth, status, ticks } from "../../web/curves.mjs"
import { WORDS } from "../../web/words.mjs"

const close = (one, other, by = 1e-9) => assert.ok(Math.abs(one - other) <= by, `${one} is not ${other}`)

test("smoothing keeps a constant, from the first value on", () => {
  for (const value of smooth(Array(50).fill(0.7), 10)) close(value, 0.7)
})

test("smoothing is the weighted mean that it says it is", () => {
  const values = [3, 1, 4, 1, 5, 9, 2, 6]
  const decay = Math.exp(-1 / 3)
  const weights = values.map((_, i) => decay ** (values.length - 1 - i))
  const mean = values.reduce((sum, value, i) => sum + weights[i] * value, 0) / weights.reduce((a, b) => a + b)
  close(smooth(values, 3).at(-1), mean)
})

test("smoothing takes most of the noise and leaves gaps as gaps", () => {
  const noisy = Array.from({ length: 300 }, (_, i) => 1 + (i % 2 ? 0.5 : -0.5))
  const smoothed = smooth(noisy)
  assert.ok(Math.max(...smoothed.slice(50).map((value) => Math.abs(value - 1))) < 0.05)
  assert.deepEqual(smooth([1, null, 1]), [1, null, 1])
  assert.deepEqual(smooth([]), [])
})

test("a range holds the values, leaves one in a hundred out, and takes in a 0 that is near", () => {
  assert.deepEqual(range([0.2, 1, null], [0.4]), [0, 1])
  assert.deepEqual(range([0.8, 1]), [0.8, 1])
  assert.deepEqual(range([...Array(200).fill(1), 900, 0.1]), [0, 1])
  assert.deepEqual(range([-2, 1]), [-2, 1])
  assert.deepEqual(range([], [null]), [0, 1])
  assert.deepEqual(range([5, 5]), [0, 5])
  assert.deepEqual(range([0]), [0, 1])
  assert.deepEqual(range([-3]), [-3, 0])
})

test("ticks are round, inside, and about as many as asked", () => {
  assert.deepEqual(ticks(0, 1), [0, 0.5, 1])
  assert.deepEqual(ticks(0, 400, 4), [0, 100, 200, 300, 400])
  assert.deepEqual(ticks(0, 0.3, 3), [0, 0.1, 0.2, 0.3])
  assert.deepEqual(ticks(2, 2), [2])
  for (const [low, high] of [[0, 1e-7], [-3, 17], [0.81, 0.97], [0, 123456]]) {
    const made = ticks(low, high)
    assert.ok(made.length >= 2 && made.length <= 6, `${made}`)
    assert.ok(made.every((value) => value >= low - 1e-12 && value <= high + 1e-12))
  }
})

test("a scale takes ends to ends, and a point without a width to its start", () => {
  const y = scale([0, 10], [100, 0])
  assert.deepEqual([y(0), y(5), y(10)], [100, 50, 0])
  assert.equal(scale([3, 3], [7, 9])(3), 7)
})

test("nearest is what a search over all finds", () => {
  assert.equal(nearest([], 3), -1)
  const steps = [1, 2, 5, 9, 9.5, 30]
  for (let wanted = -2; wanted < 40; wanted += 0.25) {
    const distances = steps.map((step) => Math.abs(step - wanted))
    assert.equal(distances[nearest(steps, wanted)], Math.min(...distances), `at ${wanted}`)
  }
})

test("numbers, times and bytes are short", () => {
  assert.deepEqual([0, 0.12345, 1234, 1e-5, null, undefined].map(number), ["0", "0.123", "1230", "1.0e-5", "–", "–"])
  assert.deepEqual([0, 59.6, 225, 3900, -3].map(duration), ["0 s", "1 min 0 s", "3 min 45 s", "1 h 5 min", "0 s"])
  assert.equal(memory({ used: 9.06e9, total: 24e9 }), "9.1 of 24.0 GB")
})

test("the line says what there is to say in each phase", () => {
  const run = { phase: "training", how: null, step: 132, steps: 400, seconds_per_step: 0.84, memory: null, kept: null }
  assert.deepEqual(status(run, WORDS), ["step 132 / 400", "0.84 s", "3 min 45 s left"])
  assert.deepEqual(status({ ...run, phase: "paused" }, WORDS)[0], WORDS.phases.paused)
  assert.deepEqual(status({ ...run, phase: "class_pictures" }, WORDS), ["Making class pictures"])
  assert.deepEqual(status({ ...run, seconds_per_step: null }, WORDS), ["step 132 / 400"])
  assert.deepEqual(status({ ...run, how: "stopped", kept: 100 }, WORDS), ["Stopped", "step 132 / 400", "kept step 100"])
  assert.deepEqual(status({ ...run, how: "finished", kept: 132 }, WORDS), ["Finished", "step 132 / 400"])
})
