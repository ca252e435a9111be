// What the chart computes before it draws: smoothing, ranges, ticks, scales. No page is needed for it.

/** The mean of each value's past, weighted by exp(-age / span), without a bias at the start; null stays null. */
export function smooth(values, span = Math.max(1, values.length / 25)) {
  const decay = Math.exp(-1 / span)
  let sum = 0
  let weight = 0
  return values.map((value) => {
    if (value === null) return null
    sum = decay * sum + value
    weight = decay * weight + 1
    return sum / weight
  })
}

/** [low, high] that holds all but the highest hundredth of the values, and 0 if it is near; [0, 1] for none. */
export function range(...lists) {
  const sorted = lists.flat().filter((value) => value !== null).sort((a, b) => a - b)
  if (!sorted.length) return [0, 1]
  const high = sorted[Math.min(sorted.length - 1, Math.floor(0.99 * sorted.length))]
  const low = sorted[0] > 0.5 * high ? sorted[0] : Math.min(0, sorted[0])
  return low === high ? [Math.min(0, low), high === 0 ? 1 : Math.max(0, high)] : [low, high]
}

/** About `count` round numbers within [low, high]. */
export function ticks(low, high, count = 4) {
  if (!(high > low)) return [low]
  const rough = (high - low) / count
  const power = 10 ** Math.floor(Math.log10(rough))
  const size = [1, 2, 5, 10].find((each) => each * power >= rough * 0.999) * power
  const first = Math.ceil(low / size - 1e-9)
  const last = Math.floor(high / size + 1e-9)
  return Array.from({ length: last - first + 1 }, (_, i) => Number(((first + i) * size).toPrecision(12)))
}

/** The linear function that takes `from` to `to`. */
export function scale([low, high], [start, end]) {
  const slope = high === low ? 0 : (end - start) / (high - low)
  return (value) => start + slope * (value - low)
}

/** The index of the number nearest to `wanted` in a rising list; -1 for an empty one. */
export function nearest(rising, wanted) {
  let [low, high] = [0, rising.length - 1]
  while (low < high) {
    const middle = (low + high) >> 1
    if (rising[middle] < wanted) low = middle + 1
    else high = middle
  }
  return low > 0 && wanted - rising[low - 1] <= rising[low] - wanted ? low - 1 : high
}

/** "1 h 5 min", "3 min 20 s", "8 s". */
export function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds))
  if (whole >= 3600) return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`
  return whole >= 60 ? `${Math.floor(whole / 60)} min ${whole % 60} s` : `${whole} s`
}

/** Three digits that count, without an exponent where that is short. */
export function number(value) {
  if (value === null || value === undefined) return "–"
  return Math.abs(value) >= 1e-3 || value === 0 ? String(Number(value.toPrecision(3))) : value.toExponential(1)
}

/** The bytes that are used of all, in GB. */
export function memory({ used, total }) {
  return `${(used / 1e9).toFixed(1)} of ${(total / 1e9).toFixed(1)} GB`
}

/** A record without its curves in a few short parts. `words` are those of words.mjs. */
export function status(run, words) {
  if (run.how) {
    const kept = run.kept && run.kept !== run.step ? `${words.kept} ${run.kept}` : null
    return [words.endings[run.how] ?? run.how, `${words.step} ${run.step} / ${run.steps}`, kept].filter(Boolean)
  }
  if (!["training", "paused"].includes(run.phase)) return [words.phases[run.phase] ?? run.phase]
  const parts = run.phase === "paused" ? [words.phases.paused] : []
  parts.push(`${words.step} ${run.step} / ${run.steps}`)
  if (run.seconds_per_step) {
    parts.push(`${number(run.seconds_per_step)} s`)
    parts.push(`${duration(run.seconds_per_step * (run.steps - run.step))} ${words.left}`)
  }
  if (run.memory) parts.push(memory(run.memory))
  return parts
}
