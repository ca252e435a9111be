// ComfyUI's mask editor for one picture of several. It takes a node, so it gets something like one.

import { placeOf, upload, viewOf } from "./incoming.mjs"

const LAYERED = /(^|\/)clipspace-painted-masked-\d+\.png/ // what it saved, which it opens with all layers

function loaded(source) {
  return new Promise((done, failed) => {
    const image = new Image()
    image.onload = () => done(image)
    image.onerror = () => failed(new Error(source))
    image.src = source
  })
}

/** The picture's file as the editor reads it: without regard to EXIF, so that one which it turns is copied upright. */
async function upright(api, picture) {
  if (!picture.turned) return picture.name
  const image = await loaded(viewOf(api, placeOf(picture.name)))
  const canvas = Object.assign(document.createElement("canvas"), { width: picture.width, height: picture.height })
  canvas.getContext("2d").drawImage(image, 0, 0)
  const blob = await new Promise((done) => canvas.toBlob(done, "image/png"))
  return upload(api, blob, `${picture.sha256.slice(0, 16)}.png`, "semantic_anchor/upright")
}

/**
 * Open the editor on a picture, as the server described it, or on its mask, if the editor made that; `saved(name)` is
 * told the file of the painted mask. False if this ComfyUI has no such editor.
 */
export async function editMask(ComfyApp, api, graph, picture, mask, saved) {
  if (!ComfyApp.open_maskeditor) return false
  const name = mask && LAYERED.test(mask) ? mask.replace(/ \[input\]$/, "") : await upright(api, picture)
  let value = `${name} [input]`
  const told = (now) => {
    if (now === value) return
    value = now
    saved(now.replace(/ \[input\]$/, ""))
  }
  const slot = { name: "image", type: "combo", options: {}, callback: told }
  Object.defineProperty(slot, "value", { get: () => value, set: told, enumerable: true })
  const place = placeOf(name)
  ComfyApp.clipspace_return_node = {
    id: -1, graph, properties: {}, widgets: [slot], images: [place], previewMediaType: "image", setDirtyCanvas() {},
    imgs: [await loaded(viewOf(api, place))],
  }
  ComfyApp.open_maskeditor()
  ComfyApp.clipspace_return_node = null
  return true
}
