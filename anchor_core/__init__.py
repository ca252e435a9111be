"""Semantic Anchor: anchored LoRA training, independent of ComfyUI and of diffusers."""

__version__ = "0.1.0"
