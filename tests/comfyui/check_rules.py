"""Run under ComfyUI's interpreter: the guidance rules against predictions of ComfyUI's own LoRA loader and CFG.

Usage: check_rules.py COMFYUI PACK OUTPUT [--paged]. OUTPUT becomes a JSON object: check to family to what is wrong, or
"", under `alone` the checks on SD1's classes, and under `refused` what is said of input that does not fit. With
`--paged` the models lie in pages (`paged_vram.py`), and the checks are those that read or patch weights, without hooks:
for these ComfyUI loads a plain model.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

FAMILIES = ("sd1", "sd2_v", "sdxl", "sd3", "flux", "chroma", "lumina2", "wan", "qwen_image")
LIMITS = ("sd1", "sdxl", "sd3")
PAGED = ("sdxl", "flux")
KINDS = ("lora", "dora", "lokr", "loha", "difference")

if __name__ == "__main__":
    comfyui, pack, output, *options = sys.argv[1:]
    sys.argv = [sys.argv[0], "--cpu"]
    sys.path[:0] = [comfyui, pack, str(Path(__file__).parent)]  # in this order: ComfyUI has `nodes` and `tests` too

    import paged_vram

    if paged := "--paged" in options:
        paged_vram.install()

    import comfy.options

    comfy.options.enable_args_parsing()

    import comfy.hooks
    import comfy.model_management
    import comfy.patcher_extension
    import comfy.sample
    import comfy.samplers
    import comfy.sd
    import comfy_models as models
    import torch
    from contract import outcome
    from guidance_case import (
        CLASS,
        NULL,
        SCALE,
        STRENGTH,
        SUBJECT,
        Case,
        anatomy,
        assert_same,
        far,
        led,
        make_lora,
        make_sliced_lora,
        mixed,
    )
    from guidance_refusals import refusals
    from torch import Tensor, nn

    from anchor_core.branches import step_at

# --- every family: the strength of a row is the strength at the stock loader ---------------------------------------


def check_strengths(family: str) -> None:
    """Personalization and autoguidance at several strengths, from pretrained to full."""
    case = Case(family)
    subject = case.branch()
    for weak in (0.0, 0.3):
        away = case.branch(NULL, weak)
        assert_same(case.denoised(case.guided("personalization", weak=weak)), led(subject, away))
    assert_same(case.denoised(case.guided("autoguidance", weak=0.4)), led(subject, case.branch(SUBJECT, 0.4)))
    assert far(case.denoised(case.guided("autoguidance", weak=0.4)), subject)


def check_limits(family: str) -> None:
    """Limits of each rule that are ComfyUI's own CFG, or another rule."""
    case = Case(family)
    stock, subject = case.stock(), case.branch()
    cfg, class_cfg = case.denoised(stock), case.denoised(stock, CLASS)
    equal = {
        ("cfg",): cfg,
        ("personalization", "weak", 1.0): cfg,
        ("personalization", "weak", 0.0): case.denoised(case.guided("unconditional_priors")),
        ("autoguidance", "weak", 1.0): subject,
        ("switching", "switch", 0.0): cfg,
        ("switching", "switch", 1.0): class_cfg,
        ("score_blend", "subject_share", 1.0): cfg,
        ("mixed", "class_share", 0.25): mixed(cfg, class_cfg, 0.25),
        ("multi_stage", "class_share", 0.0, "switch", 0.5): case.denoised(case.guided("switching", switch=0.5)),
        ("rare_to_frequent", "level", 0): cfg,
    }
    for (rule, *option), expected in equal.items():
        assert_same(case.denoised(case.guided(rule, **dict(zip(option[::2], option[1::2])))), expected)
    assert far(cfg, case.denoised(case.guided("unconditional_priors")))
    for rule in ("personalization", "unconditional_priors", "autoguidance"):
        assert_same(case.denoised(case.guided(rule), cfg=1.0), subject)
        assert_same(case.denoised(case.guided(rule, start=1.0)), subject)


# --- SD1's classes -------------------------------------------------------------------------------------------------


def check_kinds() -> None:
    """Of every kind of adapter; and an early checkpoint in the adapter's place."""
    for kind in KINDS:
        case = Case("sd1", kind)
        subject = case.branch()
        assert far(subject, case.branch(strength=0.0)), kind
        away = case.branch(NULL, 0.3)
        assert_same(case.denoised(case.guided("personalization", weak=0.3)), led(subject, away))
        away = case.branch(early=True)
        assert_same(case.denoised(case.guided("autoguidance", early=True)), led(subject, away))


def check_slices() -> None:
    """LoRAs over parts of fused weights, as diffusers' names have them for SD3 and Flux."""
    for family in ("sd3", "flux"):
        case = Case(family)
        case.lora, case.early = make_sliced_lora(case.model), make_sliced_lora(case.model, seed=1)
        assert len(case.lora) > 8, family
        subject, away = case.branch(), case.branch(NULL, 0.3)
        assert far(subject, case.branch(strength=0.0))
        assert_same(case.denoised(case.guided("personalization", weak=0.3)), led(subject, away))
        assert_same(case.denoised(case.guided("autoguidance", early=True)), led(subject, case.branch(early=True)))


def check_other_loras() -> None:
    """Those before and after the guidance are part of the pretrained network, whatever the kinds."""
    for kind in ("lora", "dora"):
        case = Case("sd1", kind)
        before, after = (make_lora(case.model, other, seed) for other, seed in (("dora", 2), ("lora", 3)))

        def around(strength: float, guided=None, case=case, before=before, after=after):
            load = comfy.sd.load_lora_for_models
            model = load(case.model, None, dict(before), 0.5, 0.0)[0]
            middle = guided(model) if guided else load(model, None, dict(case.lora), strength, 0.0)[0]
            return load(middle, None, dict(after), 0.5, 0.0)[0]

        ours = case.denoised(around(0, lambda model, case=case: case.guided("personalization", model, weak=0.3)))
        towards = case.denoised(around(STRENGTH), cfg=1.0)
        away = case.denoised(around(0.3 * STRENGTH), NULL, cfg=1.0)
        assert_same(ours, led(towards, away))


def check_hook_loras() -> None:
    """Those of ComfyUI's hooks, which patch weights while a prompt runs, are part of the pretrained network too."""
    for kind in ("lora", "dora"):
        case = Case("sd1", kind)
        hook = comfy.hooks.create_hook_lora(make_lora(case.model, seed=2), 0.5, 0.0)
        for prompt, ((embeddings, options),) in case.conds.items():
            case.conds[prompt] = [[embeddings, {**options, "hooks": hook}]]
        ours = case.denoised(case.guided("personalization", weak=0.3))
        assert_same(ours, led(case.branch(), case.branch(NULL, 0.3)))


def check_low_memory() -> None:
    """Weights that ComfyUI patches anew at each use, and a step whose rows do not fit into one batch."""
    for kind in ("lora", "dora"):
        case = Case("sd1", kind)
        expected = led(case.branch(), case.branch(NULL, 0.3))
        guided = case.guided("personalization", weak=0.3)
        load, network, calls = guided.load, case.model.model, []
        guided.load = lambda device, *_, load=load, **__: load(device, lowvram_model_memory=1)
        network.memory_required = lambda shape, **_: float("inf")
        hook = network.diffusion_model.register_forward_pre_hook(
            lambda _, given, calls=calls: calls.append(len(given[0]))
        )
        ours = case.denoised(guided)
        hook.remove()
        del network.memory_required
        assert any(getattr(layer, "weight_function", []) for layer in network.modules()) and calls == [2] * 4
        assert_same(ours, expected)


def check_steps() -> None:
    """Rules that change with the step, step by step; outside of the interval the pass is saved."""
    case = Case("sd1", steps=10)
    cfg, class_cfg = case.denoised(case.stock()), case.denoised(case.stock(), CLASS)
    steps = range(case.steps)
    switching = [class_cfg[i] if i < 3 else cfg[i] for i in steps]
    assert_same(case.denoised(case.guided("switching", switch=0.3)), switching)
    alternating = [class_cfg[i] if i < 6 and i % 2 == 0 else cfg[i] for i in steps]
    assert_same(case.denoised(case.guided("rare_to_frequent", level=5)), alternating)
    rows: list[int] = []
    subject, guided = case.branch(), case.guided("cfg", start=0.2, stop=0.5)
    hook = case.model.model.diffusion_model.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    ours = case.denoised(guided)
    hook.remove()
    assert_same(ours, [cfg[i] if 2 <= i < 5 else subject[i] for i in steps])
    assert rows == [4 if 2 <= i < 5 else 2 for i in steps], rows
    sigmas = [8.0, 4.0, 2.0, 0.0]
    found = [step_at(sigma, sigmas) for sigma in (9.0, 8.0, 5.0, 4.0, 2.0, 1.0, 0.0)]
    assert found == [0, 0, 0, 1, 2, 2, 2], found


def check_one_batch() -> None:
    """Branches whose prompts are of one length run in one batch; others as ComfyUI splits them, with the same sums."""
    for family, batches in (("sd1", 1), ("sd3", 3)):
        case, calls = Case(family), []
        hook = case.model.model.diffusion_model.register_forward_pre_hook(
            lambda _, given, calls=calls: calls.append(len(given[0]))
        )
        ours = case.denoised(case.guided("mixed"))
        hook.remove()
        assert len(calls) == batches * case.steps and sum(calls) == 3 * 2 * case.steps, calls
        subject, other, away = case.branch(), case.branch(CLASS), case.branch(NULL)
        assert_same(ours, led(mixed(subject, other, 0.5), away))


def check_what_other_patches_see() -> None:
    """Rows that are conditional or not, and a name for every branch, as caches need it."""
    case, seen = Case("sd1", steps=1), []

    def look(executor, *arguments):
        seen.append((arguments[-1]["cond_or_uncond"], arguments[-1]["uuids"]))
        return executor(*arguments)

    for rule in ("autoguidance", "mixed"):
        guided = case.guided(rule)
        guided.add_wrapper(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, look)
        case.denoised(guided)
    (pair, names), (three, _) = seen
    assert sorted(pair) == [0, 1] and sorted(three) == [0, 0, 1] and len(set(names)) == 2


def attention_mask(case: Case, quantile: float, word: int) -> list[Tensor]:
    """At each step, from ComfyUI's own patches on a run of the class prompt alone."""
    model, maps = case.stock(), []
    size = case.noise.shape[-2:]

    def attend(q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
        heads = [each.unflatten(-1, (options["n_heads"], -1)).transpose(1, 2) for each in (q, k, v)]
        weights = (heads[0] @ heads[1].mT / options["dim_head"] ** 0.5).softmax(-1)
        looks = weights[..., word].mean(1).reshape(len(q), 1, *options["activations_shape"][-2:])
        maps.append(nn.functional.interpolate(looks, size, mode="bilinear"))
        return (weights @ heads[2]).transpose(1, 2).flatten(2)

    for place in [("middle", 0)] + [(side, i) for side in ("input", "output") for i in range(12)]:
        model.set_model_attn2_replace(attend, *place)
    case.denoised(model, CLASS, cfg=1.0)
    layers = len(maps) // case.steps
    means = [torch.stack(maps[i * layers : (i + 1) * layers]).mean(0) for i in range(case.steps)]
    return [mean > mean.flatten(1).quantile(quantile, 1).view(-1, 1, 1, 1) for mean in means]


def check_mask() -> None:
    """Inside the class word's mask the mix, outside the class prompt; before the switch the early mix."""
    for family in ("sd1", "sdxl"):
        case = Case(family, steps=4)
        case.noise = torch.cat([case.noise, case.noise.flip(0, 2)], dim=-1)  # wide
        subject, other, away = case.branch(), case.branch(CLASS), case.branch(NULL)
        inside, outside = led(mixed(subject, other, 0.25), away), led(other, away)
        masks = attention_mask(case, 0.75, word=5)
        assert all(mask.flatten(1).float().mean(1).tolist() == [0.25, 0.25] for mask in masks)
        assert not torch.equal(masks[0][0], masks[0][1])
        expected = [torch.where(mask, a, b) for mask, a, b in zip(masks, inside, outside, strict=True)]
        options = {"early_share": 0.5, "class_share": 0.25, "quantile": 0.75}
        early = led(mixed(subject, other, 0.5), away)
        ours = case.denoised(case.guided("masked", switch=0.5, **options))
        assert_same(ours, early[:2] + expected[2:])


def check_pictures() -> None:
    """MODEL under KSampler and GUIDER are one; a batch is its pictures; a second-order sampler runs."""
    case = Case("sd1")
    guided = case.guided("personalization")
    picture = case.picture(guided)
    positive, negative = case.conds[SUBJECT], case.conds[NULL]
    given = (case.steps, SCALE, "euler", "simple", positive, negative, torch.zeros_like(case.noise))
    options = {"disable_pbar": True, "seed": 0}
    assert torch.equal(comfy.sample.sample(guided, case.noise, *given, **options), picture)
    one = comfy.sample.sample(guided, case.noise[1:], *given[:-1], torch.zeros_like(case.noise[1:]), **options)
    assert_same(one, picture[1:])
    euler, first = comfy.samplers.sampler_object("euler"), torch.tensor([9.0])  # as SplitSigmas gives for no step
    none = (case.noise, SCALE, euler, first, positive, negative, torch.zeros_like(case.noise))
    assert torch.equal(*(comfy.sample.sample_custom(model, *none, **options) for model in (guided, case.stock())))
    heun = case.sample(guided, comfy.samplers.sampler_object("heun"))
    assert heun.isfinite().all() and far([heun], [picture])
    guided.set_model_sampler_post_cfg_function(lambda given: given["cond_denoised"])  # a patch of another pack
    assert_same(case.picture(guided), case.picture(case.stock(), cfg=1.0))


def check_untouched() -> None:
    """However a guided sampling ends, the model is the same, and the next picture without it as well."""
    for kind in ("lora", "dora"):
        case = Case("sd1", kind)
        first = case.picture(case.model)
        before = anatomy(case.model)
        for ending in (None, RuntimeError, comfy.model_management.InterruptProcessingException):
            calls = []

            def stop(denoise, x, sigmas, extra_args, callback, disable, calls=calls, ending=ending):
                for sigma in sigmas[:2]:
                    x = denoise(x, sigma * x.new_ones(len(x)), **extra_args)
                    calls.append(sigma)
                if ending is not None:
                    raise ending("in the middle of a sampling")
                return x

            try:
                case.sample(case.guided("masked", switch=0.0), comfy.samplers.KSAMPLER(stop))
                case.sample(case.guided("personalization"), comfy.samplers.KSAMPLER(stop))
            except BaseException as error:
                assert type(error) is ending, error
            assert len(calls) in (2, 4)
            assert torch.equal(case.picture(case.model), first), f"after {ending} the picture is another one"
            assert before == anatomy(case.model), f"after {ending} the model is another one"


def check_interrupt_inside_the_network() -> None:
    """An error from within a layer, while its rows are being corrected."""
    case = Case("sd1")
    first, before = case.picture(case.model), anatomy(case.model)

    def fail(*_) -> None:
        raise torch.OutOfMemoryError("in a layer")

    hook = case.model.model.diffusion_model.out[2].register_forward_hook(fail)
    for rule in ("personalization", "masked"):
        try:
            case.picture(case.guided(rule))
            raise AssertionError("no error came")
        except torch.OutOfMemoryError:
            pass
    hook.remove()
    assert before == anatomy(case.model) and torch.equal(case.picture(case.model), first)


def check_class_takes_what_it_lacks() -> None:
    """A timestep range of the positive prompt holds for the class prompt too, unless that has its own."""
    case = Case("sd1")
    case.conds[SUBJECT][0][1]["end_percent"] = 0.5
    inherited = case.denoised(case.guided("switching", switch=1.0))
    case.conds[CLASS][0][1]["end_percent"] = 0.5
    own = case.denoised(case.guided("switching", switch=1.0))
    assert_same(inherited, own)
    assert_same(own, case.denoised(case.stock(), CLASS))


ALONE = (
    "check_kinds check_slices check_other_loras check_hook_loras check_low_memory check_steps check_one_batch "
    "check_what_other_patches_see check_mask check_pictures check_untouched "
    "check_interrupt_inside_the_network check_class_takes_what_it_lacks"
).split()


ALONE_PAGED = "check_kinds check_slices check_other_loras check_untouched".split()


def main() -> None:
    if paged:
        paged_vram.start(scale=1024)
        models.build = paged_vram.paged(models.build)
    families, limits, alone = (PAGED, (), ALONE_PAGED) if paged else (FAMILIES, LIMITS, ALONE)
    with torch.inference_mode():  # as ComfyUI runs every prompt
        found = {
            "check_strengths": {family: outcome(check_strengths, family) for family in families},
            "check_limits": {family: outcome(check_limits, family) for family in limits},
        }
        found["alone"] = {check: outcome(globals()[check]) for check in alone}
        found |= {"pinned": paged_vram.pinned_pages()} if paged else {"refused": refusals()}
    Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
