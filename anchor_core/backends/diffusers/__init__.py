"""The denoiser of diffusers pipelines."""
