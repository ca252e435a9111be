// All that the page says of a training; in other languages from locales/<language>/main.json.

export const WORDS = {
  none: "The training shows itself here once it runs.",
  step: "step",
  left: "left",
  kept: "kept step",
  best: "best",
  phases: {
    preparing: "Preparing the pictures",
    class_pictures: "Making class pictures",
    measuring: "Measuring the model before",
    training: "Training",
    paused: "Paused, the queue waits",
    saving: "Saving",
  },
  endings: {
    finished: "Finished",
    stopped: "Stopped",
    cancelled: "Cancelled",
    over_budget: "Ended by the drift",
    diverged: "Diverged",
    failed: "Failed",
  },
  terms: {
    reconstruction: "pictures",
    anchor: "anchor",
    prior: "class pictures",
    class: "class prompt",
    blended: "pictures and anchor",
    sude: "class likelihood",
    semantic: "text distance",
    drift: "drift",
  },
  orders: {
    stop: ["Stop and keep", "End after this step; the graph goes on with the LoRA so far."],
    pause: ["Pause", "Wait after this step with the model loaded; the queue waits too."],
    go_on: ["Go on", "End the pause."],
    picture_now: ["Picture now", "A sample of the subject prompt after this step."],
    save_now: ["Save now", "A file of the LoRA as it is after this step, beside the last one."],
    keep: ["Keep step …", "End, with the weights of a saved step as the result."],
    extend: ["Train on", "Make that many steps more."],
  },
  given: {
    stop: "Stopping after this step …",
    pause: "Pausing after this step …",
    go_on: "Going on …",
    picture_now: "A picture comes after this step …",
    save_now: "Saving after this step …",
    keep: "Stopping with that step …",
    extend: "More steps …",
  },
  no_options: "Connect Train Options to the node itself: it says where to go on from.",
  on_later: "Go on from the checkpoints for that many steps more, with this graph.",
  unreachable: "ComfyUI does not answer",
  steps_more: "How many steps more",
  picture: "Sample after step",
  pictures: {
    empty: "Drop, paste or add pictures of one subject.",
    other: "Or drop, paste or add pictures here.",
    unused: "Not used: references is {}",
    use: ["Use these", "Take these pictures as references."],
    add: ["Add …", "Choose picture files, and with them name.txt for captions and name-masklabel.png for masks."],
    count: "Pictures: {}",
    shapes: "shapes of about",
    keys: "Arrows choose a picture, with Alt they move it; Enter: caption, M: mask, I: invert, U: no mask, Delete: remove.",
    caption: "caption",
    caption_long: "What this picture shows, with the subject's words; empty for the concept's prompt.",
    mask: ["Mask", "Paint what is learnt in the mask editor; the rest does not come along."],
    invert: ["Invert the mask", "What is not painted is learnt."],
    unmask: ["No mask", "The whole picture is learnt."],
    remove: ["Remove", "Take it off the list; the file stays."],
    copying: "Copying {} …",
    known: "{} is on the list already",
    back: "{} is here again",
    format: "{} is of no format that is read",
    failed: "{} could not be copied",
    missing: "Not in this ComfyUI: {}. Drop them here, under any name.",
    whole: "Nothing was painted: the whole picture is learnt.",
    multiple: "With buckets, size is a multiple of 64.",
    unread: "This list cannot be read; a picture that is added begins a new one.",
    no_editor: "This ComfyUI has no mask editor; give a mask with the picture, as name-masklabel.png.",
    faults: {
      missing: "not in this ComfyUI",
      unreadable: "cannot be read",
      long: "{}: longer than 4 to 1, cut it",
      mask_missing: "its mask is not here",
      mask_size: "its mask is {}",
      mask_empty: "the mask leaves nothing",
      double: "the same as number {}",
      small: "small: {}, is enlarged",
    },
  },
}

/** Take those texts of a tree that stand where `words` has one of the same kind. */
export function adopt(words, tree) {
  for (const [name, own] of Object.entries(words)) {
    const other = tree?.[name]
    const list = Array.isArray(own)
    if (typeof own === "object" && !list) adopt(own, other)
    else if (list ? Array.isArray(other) && other.length === own.length : typeof other === "string") words[name] = other
  }
}
