"""What every denoiser must do, for any backend: `check(denoiser, shape)` raises AssertionError if it does not.

`denoiser` has no adapter when a check begins, and none when it ends; `shape` is (C, h, w) of its latents. `layers` is
an `AdapterConfig.layers`. Nothing but torch and anchor_core is imported, and what is here by relative imports, so that
the checks also run inside ComfyUI, whose scripts call this package `contract`.
"""

from .bank import check_bank_changes_no_bit
from .network import (
    check_adapter_off_is_untouched,
    check_blocks,
    check_detach_restores,
    check_file_keys,
    check_noise_process,
    check_pictures,
    check_rows_are_independent,
    check_sampling,
)
from .steps import CONCEPT, LEVELS, attached, draw, make_step, outcome, stir, times
from .text import check_prompts_ignore_the_adapter, check_text_encoder_adapter, check_token_vectors
from .training import (
    check_anchor_gradient_is_blended,
    check_memorises,
    check_objectives,
    check_zero_weight_is_reconstruction,
)

__all__ = [
    "CHECKS",
    "CONCEPT",
    "LEVELS",
    "attached",
    "check_text_encoder_adapter",
    "check_token_vectors",
    "draw",
    "make_step",
    "outcome",
    "stir",
    "times",
]

CHECKS = (
    check_adapter_off_is_untouched,
    check_zero_weight_is_reconstruction,
    check_anchor_gradient_is_blended,
    check_noise_process,
    check_rows_are_independent,
    check_prompts_ignore_the_adapter,
    check_objectives,
    check_memorises,
    check_bank_changes_no_bit,
    check_detach_restores,
    check_file_keys,
    check_blocks,
    check_pictures,
    check_sampling,
)
"""Every check that needs nothing but `(denoiser, shape)`; `check_text_encoder_adapter` needs text encoders."""
