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
