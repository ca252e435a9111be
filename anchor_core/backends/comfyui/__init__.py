"""The denoiser of the models that ComfyUI has loaded. The only core package that imports comfy."""
