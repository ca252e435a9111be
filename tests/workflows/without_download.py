"""The workflows that run on the embedded model."""

from __future__ import annotations

from tests.workflows.graph import Graph, Out
from tests.workflows.parts import NEW_PLACE, SAMPLING, drawn, pictures, prompt, sandbox, show, star, train

QUICKSTART_LORA = "quickstart_00001_.safetensors"
STAR = "star_00001_"
SWEPT = {"count": 2, "size": 64, "seed": 1, "sampling_steps": 30, "guidance": 4.0, "judge": "sandbox"}


def quickstart(g: Graph) -> None:
    g.note(
        "# Quickstart\n\nPress **Run**. Nothing is downloaded: a small model that draws shapes is part of the pack.\n\n"
        "It learns one star from five pictures, and then draws it where it never was, three ways from the same noise:\n"
        "the model as it was, the trained LoRA sampled plainly, and the LoRA under **personalization guidance**, which "
        "measured best.\n\n**Change next**: `references` (twelve subjects), `w` (0 is plain DreamBooth, 1 keeps more "
        "of the model), the prompt.\n\n**For your own subject** open *Train a subject*.",
        330,
    )
    model, clip, vae = sandbox(g)
    loaded, concept = pictures(g), star(g)
    g.column(380)
    trained = train(g, model, clip, vae, loaded[0], concept[0], preset="auto")
    g.column()
    text = g.add("PrimitiveStringMultiline", "The prompt, with the subject's word", value=NEW_PLACE)
    g.add("CLIPTextEncode", "The prompt", clip=clip, text=text[0])
    positive = Out(g.last, 0)
    negative = prompt(g, clip, "", "Nothing")
    latents = g.add("EmptyLatentImage", "How many pictures", width=64, height=64, batch_size=4)[0]
    guided = g.add("AnchorGuidance", model=model, lora=trained[1], rule="personalization")[0]
    rows = [("Before", model, positive), ("The LoRA, sampled plainly", trained[0], positive)]
    results = drawn(g, [*rows, ("With guidance", guided, positive)], negative, latents, vae, "quickstart")
    g.column(420)
    links = {"model": model, "clip": clip, "vae": vae, "images": loaded[0], "concept": concept[0]}
    report = g.add("AnchorDriftReport", lora=trained[1], history=trained[3], timesteps=6, noises=1, **links)
    g.add("PreviewImage", "What the training changed", images=report[0])
    shown = [(loaded, "references"), (concept, "class_word"), (text, "value"), (trained, "w"), (trained, "preset")]
    g.app(*shown, (trained, "run"), outputs=[node for _, node in results])


def check_a_lora(g: Graph) -> None:
    g.note(
        "# Check a LoRA\n\nWhat does a LoRA do to the model, with its word and without, and how much of it is good?\n\n"
        "1. Run *Quickstart* once, or choose any LoRA as `file` in both nodes, with its own model in place of *Sandbox "
        "Model* and its subject's pictures and words.\n2. Press **Run**.\n\n**Drift** is the distance from what the "
        "model itself predicts for the class: 0 is untouched. **Reconstruction** is the error on the pictures: lower "
        "is nearer to the subject. A LoRA that moved far without a lower error does harm: try a lower `strength`.\n\n"
        "**Strengths side by side** draws one prompt at each; *Use this* writes yours into *Apply Adapter*.\n\n"
        "*LoRA Check-up* needs no pictures, and no words for a LoRA that says its prompts: it writes a page with a "
        "verdict under output/checkups. For your own model set its `resolution`.\n\n"
        "*Save Adapter* writes the two prompts into a LoRA that has none.",
        330,
    )
    model, clip, vae = sandbox(g)
    loaded, concept = pictures(g), star(g)
    g.column()
    lora = g.add("AnchorLoadAdapter", "The LoRA", file=QUICKSTART_LORA)
    g.add("PreviewAny", "What its file says", source=lora[3])
    links = {"model": model, "clip": clip, "vae": vae, "images": loaded[0], "concept": concept[0]}
    report = g.add("AnchorDriftReport", lora=lora[0], **links)
    saved = g.add("AnchorSaveAdapter", "Keep it with its prompts", lora=lora[0], concept=concept[0], name="checked")
    g.column()
    words = {"model": model, "clip": clip, "vae": vae, "subject_prompt": concept[1], "class_prompt": concept[2]}
    checked = g.add("AnchorCheckup", lora=lora[0], resolution=64, **words)
    g.add("PreviewAny", "The verdict", source=checked[1])
    g.column(620)
    g.add("PreviewImage", "The check-up's page", images=checked[0])
    page = g.last
    g.column()
    g.add("PreviewImage", "Drift and error by noise level", images=report[0])
    drift = g.last
    g.add("PreviewAny", "The numbers", source=report[1])
    g.add("PreviewAny", "Where it was kept", source=saved[0])
    g.column()
    positive = prompt(g, clip, NEW_PLACE, "The prompt")
    negative = prompt(g, clip, "", "Nothing")
    latents = g.add("EmptyLatentImage", "How many pictures", width=64, height=64, batch_size=4)[0]
    applied = g.add("AnchorApplyAdapter", "At the chosen strength", model=model, clip=clip, file=QUICKSTART_LORA)
    rows = [("Without the LoRA", model, positive), ("At the chosen strength", applied[0], positive)]
    results = drawn(g, rows, negative, latents, vae, "check")
    g.column(560)
    how = SWEPT | {"values": "0, 0.5, 0.75, 1", "prompt": NEW_PLACE}
    swept = g.add("AnchorSweep", "Strengths side by side", lora=lora[0], **links, **how)
    g.add("PreviewImage", "All strengths", images=swept[0])
    outputs = [page, drift, *(node for _, node in results), g.last]
    shown = [(lora, "file"), (swept, "values"), (swept, "prompt"), (loaded, "references"), (concept, "class_word")]
    g.app(*shown, (applied, "strength"), (swept, "grid"), outputs=outputs)


def guidance_compared(g: Graph) -> None:
    g.note(
        "# Guidance compared\n\nOne LoRA, four ways of sampling from the same noise, ranked by likeness to the "
        "pictures (CLIP-I, DINO) and to the prompt (CLIP-T). Nothing is downloaded: the sandbox's own judge "
        "measures.\n\n**Change next**: `rule` and its options, `cfg` of all samplers alike, `w` of the training. "
        "Rules with *class* in their table read `class_conditioning`.\n\n*Anchor Guider* is the same for "
        "*SamplerCustomAdvanced*.",
        280,
    )
    model, clip, vae = sandbox(g)
    loaded, concept = pictures(g), star(g)
    g.column(380)
    trained = train(g, model, clip, vae, loaded[0], concept[0], name="guidance")
    g.column()
    text = g.add("PrimitiveStringMultiline", "The prompt", value="a photo of a sks star on grass")
    positive = prompt(g, clip, text[0], "The subject's prompt")
    class_text = g.add("StringReplace", "The class's prompt", string=text[0], find="sks ", replace="")
    of_class = prompt(g, clip, class_text[0], "The class's prompt, encoded")
    negative = prompt(g, clip, "", "Nothing")
    latents = g.add("EmptyLatentImage", "How many pictures", width=64, height=64, batch_size=4)[0]
    g.column()
    rules = {name: {"lora": trained[1], "model": model} for name in ("personalization", "score_blend")}
    rules["score_blend"]["class_conditioning"] = of_class
    rows = [("cfg", trained[0], positive)]
    nodes = {name: g.add("AnchorGuidance", name, rule=name, **links) for name, links in rules.items()}
    rows += [(name, out[0], positive) for name, out in nodes.items()]
    name = "unconditional_priors"
    cfg = SAMPLING["cfg"]
    links = {"positive": positive, "negative": negative, "lora": trained[1], "model": model}
    guider = g.add("AnchorGuider", name, cfg=cfg, rule=name, **links)[0]
    results = drawn(g, rows, negative, latents, vae, "guidance")
    g.column(300)
    noise = g.add("RandomNoise", noise_seed=SAMPLING["seed"])[0]
    sampler = g.add("KSamplerSelect", sampler_name=SAMPLING["sampler_name"])[0]
    sigmas = g.add("BasicScheduler", model=model, scheduler=SAMPLING["scheduler"], steps=SAMPLING["steps"])[0]
    links = {"noise": noise, "sampler": sampler, "sigmas": sigmas, "latent_image": latents}
    made = g.add("SamplerCustomAdvanced", name, guider=guider, **links)[0]
    results.append(show(g, made, vae, name, f"guidance/{name}"))
    ranked(g, loaded, results, [*(title for title, *_ in rows), name], class_text[0])
    shown = [(text, "value"), (nodes["personalization"], "rule"), (trained, "w"), (trained, "steps")]
    g.app(*shown, outputs=[node for _, node in results])


def ranked(g: Graph, loaded: list[Out], results: list, names: list[str], prompts) -> None:
    """The table and the sheet of a comparison, by the sandbox's judge."""
    g.column(420)
    pictures = {f"pictures__system{number}": made for number, (made, _) in enumerate(results)}
    how = {"names": "\n".join(names), "prompts": prompts, "clip": "sandbox", "dino": "sandbox"}
    table, sheet, _ = g.add("AnchorCompare", references=loaded[1], **pictures, **how)
    g.column(620)
    g.add("PreviewAny", "The table", source=table)
    g.add("PreviewImage", "References and pictures", images=sheet)


def w_sweep(g: Graph) -> None:
    g.note(
        "# w sweep\n\nThree trainings that differ in `w` alone, drawn from the same noise, with their scores. It takes "
        "three times as long as the quickstart.\n\n**w = 0** is plain DreamBooth: nearest to the pictures, and their "
        "surroundings come along. **w = 1** keeps more of the model. Take the smallest at which the prompt is "
        "met: **Use this** writes it into *Train Anchored LoRA*.\n\n**Change next**: `sweep` to *steps*, with `values` "
        "50, 100, 150.\n\nFor your own subject replace *Sandbox Model* by your loader, as in *Train a subject*.",
        330,
    )
    model, clip, vae = sandbox(g)
    loaded, concept = pictures(g), star(g)
    g.column(620)
    links = {"model": model, "clip": clip, "vae": vae, "references": loaded[1], "concept": concept[0]}
    how = SWEPT | {"sweep": "w", "values": "0, 0.5, 1", "prompt": NEW_PLACE, "preset": "auto", "name": "w"}
    swept = g.add("AnchorSweep", "w side by side", **links, **how)
    g.column(620)
    g.add("PreviewImage", "All of them", images=swept[0])
    grid = g.last
    g.add("PreviewAny", "Their scores", source=swept[2])
    g.column(380)
    train(g, model, clip, vae, loaded[0], concept[0], "Takes the value", preset="auto", name="chosen")
    shown = [(loaded, "references"), (concept, "class_word"), (swept, "sweep"), (swept, "values"), (swept, "prompt")]
    g.app(*shown, (swept, "grid"), outputs=[grid])


def textual_inversion(g: Graph) -> None:
    g.note(
        "# Textual inversion\n\nTrains no layer of the model: only what one new word means. The file is tiny, and any "
        "prompt can use it as `embedding:name`, which *Train Anchored LoRA* gives as its last output.\n\n**Change "
        "next**: `vectors` in *More settings* (more are nearer to the subject, and heed the prompt less), `w`, "
        "`initial`, the word that it starts from.\n\n*References from Images* takes the pictures of any nodes: put "
        "some that change them before it.\n\nThen open *Embedding adjusted*.",
        330,
    )
    model, clip, vae = sandbox(g)
    loaded, concept = pictures(g), star(g)
    g.column(380)
    seen = g.add("AnchorImageReferences", images=loaded[0], size=64)
    # Last of its column: Nodes 2.0 makes its many rows higher.
    more = g.add("AnchorTrainOptions", "More settings", kind="none", vectors=1, initial="star")
    g.column(380)
    settings = {"learning_rate": 1e-2, "name": "star", "options": more[0], "references": seen[0]}
    trained = train(g, model, clip, vae, None, concept[0], **settings)
    g.column()
    new_word = {"find": "sks", "replace": trained[6]}
    text = g.add("StringReplace", "sks becomes the new word", string=NEW_PLACE, **new_word)
    positive = prompt(g, trained[5], text[0], "With the new word")
    of_class = prompt(g, clip, "a photo of a star in the snow", "The class alone")
    negative = prompt(g, clip, "", "Nothing")
    latents = g.add("EmptyLatentImage", "How many pictures", width=64, height=64, batch_size=4)[0]
    rows = [("The class", model, of_class), ("The subject", trained[0], positive)]
    results = drawn(g, rows, negative, latents, vae, "textual inversion")
    shown = [(loaded, "references"), (concept, "class_word"), (trained, "steps"), (trained, "w")]
    g.app(*shown, outputs=[node for _, node in results])


def embedding_adjusted(g: Graph) -> None:
    word, place = f"embedding:{STAR}", "star on grass"
    g.note(
        "# Embedding adjusted\n\nA trained word often takes over its prompt. Turning it towards its class leaves room "
        "for the rest, without training (TEA).\n\n1. Run *Textual inversion* once, press **R**, and choose its file "
        "in *Adjust Embedding*.\n2. Press **Run**: the word as trained, the word adjusted in a **new file**, and the "
        "whole prompt adjusted on its way to the sampler.\n\n**Change next**: `alpha`: 0 changes nothing, 1 is the "
        "class.",
        290,
    )
    model, clip, vae = sandbox(g)
    adjusted = g.add("AnchorAdjustEmbedding", clip=clip, file=f"{STAR}.safetensors", class_word="star", name="adjusted")
    g.column()
    plain = prompt(g, clip, f"a photo of a {word} {place}", "The word as trained")
    of_class = prompt(g, clip, f"a photo of a {place}", "The class alone")
    first = g.add("StringConcatenate", "A photo of the new word", string_a="a photo of a ", string_b=adjusted[0])
    text = g.add("StringConcatenate", "With the place", string_a=first[0], string_b=place, delimiter=" ")
    by_file = prompt(g, clip, text[0], "The adjusted word")
    g.column()
    links = {"subject_conditioning": plain, "class_conditioning": of_class}
    by_prompt = g.add("AnchorAdjustConditioning", **links)
    negative = prompt(g, clip, "", "Nothing")
    latents = g.add("EmptyLatentImage", "How many pictures", width=64, height=64, batch_size=4)[0]
    rows = [("As trained", model, plain), ("Adjusted file", model, by_file), ("Adjusted prompt", model, by_prompt[0])]
    results = drawn(g, rows, negative, latents, vae, "adjusted")
    shown = [(adjusted, "file"), (adjusted, "class_word"), (adjusted, "alpha"), (by_prompt, "alpha")]
    g.app(*shown, outputs=[node for _, node in results])


def self_test(g: Graph) -> None:
    g.note(
        "# Training self test\n\nDoes training work on this computer? Press **Run**: a few steps on noise, nothing is "
        "kept, and the last line says passed or not, with the time and memory of a step.\n\n**For your own model** "
        "replace *Sandbox Model* by your loader, and set `resolution` to what you train at.",
        220,
    )
    model, *_ = sandbox(g)
    g.column()
    tried = g.add("AnchorSelfTest", model=model, resolution=64)
    g.column(620)
    g.add("PreviewAny", "What was found", source=tried[0])
    g.app((tried, "resolution"), (tried, "batch_size"), (tried, "steps"), outputs=[g.last])


WORKFLOWS = {
    "Quickstart (no download)": quickstart,
    "Check a LoRA (no download)": check_a_lora,
    "Guidance compared (no download)": guidance_compared,
    "w sweep (no download)": w_sweep,
    "Textual inversion (no download)": textual_inversion,
    "Embedding adjusted (no download)": embedding_adjusted,
    "Training self test (no download)": self_test,
}
