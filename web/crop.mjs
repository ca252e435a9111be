// What of a picture a training sees: the numbers of anchor_core/data/pictures.py, in every bit.

const LONGEST = 4
const MULTIPLE = 64

/** Python's round(a / b) of whole numbers: halves to the even one. */
function rounded(a, b) {
  const value = a / b
  const below = Math.floor(value)
  const rest = value - below
  return rest === 0.5 ? below + (below % 2) : Math.round(value)
}

/** The [height, width] sizes of `bucket_sizes`; null where it takes none of that resolution. */
export function bucketSizes(resolution) {
  if (!Number.isInteger(resolution) || resolution < 1 || resolution % MULTIPLE) return null
  const found = new Map()
  for (let edge = MULTIPLE; edge <= 2 * resolution; edge += MULTIPLE) {
    const other = Math.floor(Math.floor(resolution ** 2 / edge) / MULTIPLE) * MULTIPLE
    if (!other || Math.max(edge, other) > LONGEST * Math.min(edge, other)) continue
    for (const pair of [[edge, other], [other, edge]]) found.set(pair.join(), pair)
  }
  return [...found.values()].sort((a, b) => a[0] - b[0] || a[1] - b[1])
}

/** The [height, width] sizes that a node trains at, from its `size` and `buckets`; null where it takes none. */
export function sizesOf(size, buckets) {
  return buckets ? bucketSizes(size) : [[size, size]]
}

function nearest(sizes, width, height) {
  const far = ([h, w]) => Math.max(w * height, h * width) / Math.min(w * height, h * width)
  return sizes.reduce((best, size) => {
    const nearer = far(size) - far(best) || best[0] * best[1] - size[0] * size[1]
    return nearer < 0 ? size : best
  })
}

/**
 * Of a picture of width x height: `size`, the [height, width] it is resized to; `box`, the [left, top, right, bottom]
 * that is cut out before; and whether it is `enlarged`. null for what is longer than 4:1.
 */
export function crop(width, height, sizes) {
  if (Math.max(width, height) > LONGEST * Math.min(width, height)) return null
  const size = nearest(sizes, width, height)
  const innerWidth = Math.max(1, Math.min(width, rounded(height * size[1], size[0])))
  const innerHeight = Math.max(1, Math.min(height, rounded(width * size[0], size[1])))
  const left = Math.floor((width - innerWidth) / 2)
  const top = Math.floor((height - innerHeight) / 2)
  const enlarged = innerWidth < size[1] || innerHeight < size[0]
  return { size, box: [left, top, left + innerWidth, top + innerHeight], enlarged }
}
