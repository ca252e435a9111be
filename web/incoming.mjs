// What is dropped, pasted or chosen: files and folders of the computer, and pictures that ComfyUI has already.

const ASSET = "application/x-comfy-asset-info" // ComfyUI's assets panel
const FOLDER = "semantic_anchor" // under input/, where files are copied to

/** Whether a drag or a paste can hold pictures. */
export function mayHold(transfer) {
  const types = [...(transfer?.types ?? [])]
  return types.includes("Files") || types.includes(ASSET) || types.includes("text/uri-list")
}

/** The files of a drop or a paste, with those in folders. What it holds is gone once the event is over. */
export function filesOf(transfer) {
  const items = [...transfer.items].filter(({ kind }) => kind === "file")
  const entries = items.map((item) => item.webkitGetAsEntry?.() ?? item.getAsFile())
  return Promise.all(entries.map(filesIn)).then((found) => found.flat())
}

async function filesIn(entry) {
  if (!entry || entry instanceof File) return entry ? [entry] : []
  if (entry.isFile) return [await new Promise((done, failed) => entry.file(done, failed))]
  const reader = entry.createReader()
  const found = []
  for (;;) {
    const some = await new Promise((done, failed) => reader.readEntries(done, failed)) // a hundred at a time
    if (!some.length) return (await Promise.all(found.map(filesIn))).flat()
    found.push(...some)
  }
}

/** The file of ComfyUI's that was dragged, from its assets panel or from a node: {filename, subfolder, type}, or null. */
export function assetOf(transfer, here) {
  try {
    const asset = JSON.parse(transfer.getData(ASSET) || "null")
    if (asset?.filename) return asset
  } catch {
    // as if there were none
  }
  const uri = transfer.getData("text/uri-list").split("\n")[0]
  if (!URL.canParse(uri)) return null
  const { origin, pathname, searchParams } = new URL(uri)
  if (origin !== here || !pathname.endsWith("/view") || !searchParams.get("filename")) return null
  const [filename, subfolder, type] = ["filename", "subfolder", "type"].map((name) => searchParams.get(name) ?? "")
  return { filename, subfolder, type: type || "output" }
}

/** The address of a file of ComfyUI's. */
export function viewOf(api, { filename, subfolder = "", type = "input" }) {
  return api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`)
}

/** Where a named file of the input folder is, as ComfyUI's routes take it. */
export function placeOf(name) {
  const parts = name.replace(/ \[input\]$/, "").split("/")
  return { filename: parts.pop(), subfolder: parts.join("/"), type: "input" }
}

/** Copy a file into ComfyUI's input folder by its own route; its name there. Throws where it does not take it. */
export async function upload(api, file, name = file.name, folder = FOLDER) {
  const body = new FormData()
  body.append("image", file, name)
  body.append("type", "input")
  body.append("subfolder", folder)
  const answer = await api.fetchApi("/upload/image", { method: "POST", body })
  if (!answer.ok) throw new Error(`${answer.status} ${answer.statusText}`)
  const made = await answer.json()
  return [made.subfolder, made.name].filter(Boolean).join("/")
}

/** The name in the input folder of a file of ComfyUI's; what lies elsewhere is copied there. */
export async function inputOf(api, asset) {
  if (asset.type === "input") return [asset.subfolder, asset.filename].filter(Boolean).join("/")
  const answer = await fetch(viewOf(api, asset))
  if (!answer.ok) throw new Error(`${answer.status} ${answer.statusText}`)
  return upload(api, await answer.blob(), asset.filename)
}
