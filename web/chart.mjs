// The chart of a record on a canvas: terms of the loss on the left axis, the drift on the right.

import { nearest, number, range, scale, smooth, ticks } from "./curves.mjs"

const COLOURS = {
  reconstruction: "#4a9eda",
  blended: "#4a9eda",
  anchor: "#e8a33d",
  prior: "#a07be0",
  class: "#a07be0",
  sude: "#a07be0",
  semantic: "#a07be0",
  drift: "#5fb36a",
}
const FEW = 60
const LEFT = 38
const RIGHT = 38
const TOP = 14
const BOTTOM = 18

export const colour = (name) => COLOURS[name] ?? "#999999"

/** What is drawn of a record: curves with their smoothed ones, and the two axes' ranges. */
export function prepare(record) {
  const curves = Object.entries(record.losses.values).map(([name, values]) => {
    return { name, steps: record.losses.step, values, smoothed: smooth(values), axis: "left" }
  })
  // Without measurements the steps' own predictions tell it, from whatever pictures and noise they had.
  const course = [record.probes, record.distances].find((each) => each?.values.drift)
  const drift = course?.values.drift
  if (drift) {
    // A few measurements are shown as they are; many get the strong line from what is smooth, which is cheaper too.
    const smoothed = drift.length > FEW ? smooth(drift) : drift
    curves.push({ name: "drift", steps: course.step, values: drift, smoothed, axis: "right" })
  }
  const of = (axis) => curves.filter((curve) => curve.axis === axis).flatMap(({ values, smoothed }) => [values, smoothed])
  return { curves, left: range(...of("left")), right: drift ? range(drift) : null }
}

/** The step at the right edge: the last one, or some room for those to come. */
const edge = ({ how, step, steps }) => (how ? Math.max(step, 1) : Math.max(Math.min(steps, Math.max(20, 1.25 * step)), step))

/** Draw onto a context that is `width` by `height` in CSS pixels. `pointed` is a step under the pointer, or null. */
export function draw(context, width, height, record, prepared, { text, pointed = null, words }) {
  context.clearRect(0, 0, width, height)
  context.font = "10px sans-serif"
  context.textBaseline = "middle"
  context.lineJoin = "bevel"
  const last = edge(record)
  const x = scale([0, last], [LEFT, width - RIGHT])
  const span = [height - BOTTOM, TOP]
  const y = { left: scale(prepared.left, span), right: prepared.right && scale(prepared.right, span) }
  axes(context, width, height, { last, x, y, prepared, text })
  context.save()
  context.beginPath()
  context.rect(LEFT, TOP - 2, width - LEFT - RIGHT, height - TOP - BOTTOM + 4)
  context.clip()
  for (const curve of prepared.curves) {
    line(context, curve.steps, curve.values, x, y[curve.axis], colour(curve.name), 0.3, 1)
    line(context, curve.steps, curve.smoothed, x, y[curve.axis], colour(curve.name), 1, 1.6)
    if (curve.axis === "right" || curve.steps.length === 1) dots(context, curve, x, y[curve.axis])
  }
  context.restore()
  marks(context, height, record, x, text, words)
  if (pointed !== null) {
    context.strokeStyle = text
    context.globalAlpha = 0.6
    vertical(context, x(pointed), TOP, height - BOTTOM)
    context.globalAlpha = 1
  }
}

function axes(context, width, height, { last, x, y, prepared, text }) {
  context.strokeStyle = context.fillStyle = text
  context.lineWidth = 1
  for (const value of ticks(...prepared.left)) {
    context.globalAlpha = 0.15
    context.beginPath()
    context.moveTo(LEFT, y.left(value))
    context.lineTo(width - RIGHT, y.left(value))
    context.stroke()
    context.globalAlpha = 1
    context.textAlign = "right"
    context.fillText(number(value), LEFT - 4, y.left(value))
  }
  context.textAlign = "left"
  context.fillStyle = colour("drift")
  for (const value of y.right ? ticks(...prepared.right) : []) {
    context.fillText(number(value), width - RIGHT + 4, y.right(value))
  }
  context.fillStyle = text
  context.textAlign = "center"
  for (const value of ticks(0, last, Math.max(2, Math.floor(width / 90)))) {
    context.fillText(String(value), x(value), height - BOTTOM / 2)
  }
}

function line(context, steps, values, x, y, style, alpha, width) {
  context.strokeStyle = style
  context.globalAlpha = alpha
  context.lineWidth = width
  context.beginPath()
  let drawn = false
  for (let i = 0; i < steps.length; i++) {
    if (values[i] === null) drawn = false
    else if (drawn) context.lineTo(x(steps[i]), y(values[i]))
    else context.moveTo(x(steps[i]), y(values[i]))
    drawn = values[i] !== null
  }
  context.stroke()
  context.globalAlpha = 1
}

function dots(context, curve, x, y) {
  if (curve.steps.length > FEW) return
  context.fillStyle = colour(curve.name)
  curve.steps.forEach((step, i) => {
    if (curve.values[i] === null) return
    context.beginPath()
    context.arc(x(step), y(curve.values[i]), 2, 0, 7)
    context.fill()
  })
}

/** The best step with a flag, saved steps with a tick at the bottom. */
function marks(context, height, record, x, text, words) {
  context.fillStyle = context.strokeStyle = text
  context.lineWidth = 1
  for (const { step } of record.saved) vertical(context, x(step), height - BOTTOM - 5, height - BOTTOM + 3)
  if (!record.best) return
  context.strokeStyle = context.fillStyle = colour("drift")
  context.setLineDash([3, 3])
  vertical(context, x(record.best), TOP - 4, height - BOTTOM)
  context.setLineDash([])
  context.textAlign = x(record.best) < 90 ? "left" : "right"
  context.fillText(`⚑ ${words.best} ${record.best}`, x(record.best), TOP - 8)
}

function vertical(context, at, from, to) {
  context.beginPath()
  context.moveTo(Math.round(at) + 0.5, from)
  context.lineTo(Math.round(at) + 0.5, to)
  context.stroke()
}

/** The step at `at` CSS pixels from the left edge. */
export function stepAt(at, width, record) {
  return scale([LEFT, width - RIGHT], [0, edge(record)])(Math.min(Math.max(at, LEFT), width - RIGHT))
}

/** [name, value, steps that it is the mean of] of each curve at its point nearest to a step. */
export function valuesAt(step, prepared) {
  return prepared.curves.map(({ name, steps, values }) => {
    const i = nearest(steps, step)
    return { name, value: i < 0 ? null : values[i], step: i < 0 ? null : steps[i] }
  })
}
