"""Input that does not fit a guidance rule, and what is said of it."""

from __future__ import annotations

import comfy.samplers
import comfy_models as models
import torch
from guidance_case import CLASS, NULL, SUBJECT, Case

from anchor_core.backends.comfyui.guidance import guide_model, make_guider
from anchor_core.guidance import make_rule


def refusals() -> dict[str, str]:
    case, sd3, sdxl = Case("sd1"), Case("sd3"), Case("sdxl")
    embeddings, pooled = torch.zeros(1, 12, models.WIDTH), torch.zeros(1, models.POOLED)
    wide = [[torch.zeros(1, 12, models.WIDTH + 8), {"pooled_output": pooled}]]
    wide_pooled = [[embeddings, {"pooled_output": torch.zeros(1, models.POOLED + 8)}]]
    no_pooled, nan = [[embeddings, {}]], [[embeddings * torch.nan, {"pooled_output": pooled}]]
    norm = "diffusion_model.joint_blocks.0.x_block.attn.ln_q.w_norm"

    def guide(rule: str, on: Case = case, **inputs):
        lora = inputs.pop("lora", on.lora)
        return guide_model(inputs.pop("model", on.model), lora, make_rule(rule, **inputs.pop("options", {})), **inputs)

    def run(on: Case, model, **prompts) -> None:
        on.conds = on.conds | prompts
        on.denoised(model)

    class_conds = case.conds[CLASS]
    split = guide("personalization")
    split.set_model_unet_function_wrapper(
        lambda run, given: run(given["input"][:2], given["timestep"][:2], **given["c"])
    )
    replaced = guide("cfg")
    replaced.set_model_sampler_calc_cond_batch_function(lambda given: None)
    other_guider = comfy.samplers.CFGGuider(guide("cfg"))
    other_guider.set_conds(case.conds[SUBJECT], case.conds[NULL])
    other_guider.predict_noise = lambda x, sigma, options, seed: comfy.samplers.calc_cond_batch(  # as DualCFGGuider
        other_guider.inner_model, [*other_guider.conds.values()], x, sigma, options
    )[0]
    sigmas = torch.tensor([1.0, 0.0])
    euler = comfy.samplers.sampler_object("euler")
    hooked = [[class_conds[0][0], {**class_conds[0][1], "hooks": object()}]]
    unlike = [[class_conds[0][0] + 1, class_conds[0][1]]]
    attempts = {
        "no_class": lambda: guide("switching"),
        "no_early": lambda: guide("autoguidance", options={"early": True}),
        "nan_strength": lambda: guide("cfg", strength=float("nan")),
        "nan_cfg": lambda: make_guider(case.model, case.conds[SUBJECT], case.conds[NULL], float("nan")),
        "out_of_range": lambda: make_rule("personalization", weak=1.5),
        "twice": lambda: guide("cfg", model=guide("cfg")),
        "replaced": lambda: run(case, replaced),
        "split": lambda: run(case, split),
        "other_guider": lambda: other_guider.sample(
            case.noise, torch.zeros_like(case.noise), euler, sigmas, disable_pbar=True
        ),
        "masked_sd3": lambda: guide("masked", sd3, class_conditioning=sd3.conds[CLASS]),
        "other_lora": lambda: guide("cfg", lora=sd3.lora),
        "other_early": lambda: guide("autoguidance", options={"early": True}, early_lora=sd3.lora),
        "wide_class": lambda: run(case, guide("switching", class_conditioning=wide)),
        "wide_negative": lambda: run(Case("sd1"), guide("cfg"), **{NULL: wide}),
        "nan_positive": lambda: run(Case("sd1"), guide("cfg"), **{SUBJECT: nan}),
        "nan_class": lambda: run(case, guide("switching", class_conditioning=nan)),
        "sd3_width": lambda: run(Case("sd3"), guide("cfg", sd3), **{NULL: wide}),
        "sd3_pooled": lambda: run(Case("sd3"), guide("cfg", sd3), **{NULL: wide_pooled}),
        "sdxl_pooled": lambda: run(sdxl, guide("cfg", sdxl), **{SUBJECT: no_pooled}),
        "hooked_class": lambda: run(case, guide("switching", class_conditioning=hooked)),
        "same_prompt": lambda: run(case, guide("masked", class_conditioning=case.conds[SUBJECT])),
        "other_clip": lambda: run(case, guide("masked", class_conditioning=unlike)),
        "row_less": lambda: guide("unconditional_priors", sd3, lora={norm: torch.ones(64)}),
    }
    said = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            said[name] = "nothing"
        except ValueError as error:
            said[name] = str(error)
    return said
