"""The kinds of adapter that train the weights themselves: all of them (`full`), or their singular values (`svdiff`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class WeightLayer(nn.Module):
    """A frozen module of the network with a trained form of its weights beside it; as switchable as peft's layers."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base_layer = base
        self._on = True

    # Networks ask their layers for the dtype of these.
    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    def enable_adapters(self, enabled: bool) -> None:
        self._on = enabled

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        return self._adapted(*inputs, **options) if self._on else self.base_layer(*inputs, **options)

    def _adapted(self, *inputs: Any, **options: Any) -> Tensor:
        raise NotImplementedError


class FullLayer(WeightLayer):
    """DreamBooth's fine-tuning of one module: `trained` holds every parameter of its own, in float32.

    The pretrained ones stay beside them, for the anchor and for the file, at the cost of a copy of the module.
    """

    def __init__(self, base: nn.Module):
        super().__init__(base)
        own = base.named_parameters(recurse=False)
        self.trained = nn.ParameterDict({name: nn.Parameter(part.detach().float().clone()) for name, part in own})

    def _adapted(self, *inputs, **options):
        base, trained = self.base_layer, dict(self.trained)
        if not torch.is_grad_enabled():
            # torch may choose another product for a weight that requires grad, and so other last bits.
            trained = {name: part.detach() for name, part in trained.items()}
        if isinstance(base, (nn.Linear, nn.Conv2d)):
            # Not by the module's own forward, which in ComfyUI may ask for the pretrained weight again.
            weight, bias = (_cast(trained.get(name), inputs[0].dtype) for name in ("weight", "bias"))
            run = functional.linear if isinstance(base, nn.Linear) else base._conv_forward
            return run(inputs[0], weight, bias)
        own = {name: part.to(getattr(base, name).dtype) for name, part in trained.items()}
        return torch.func.functional_call(base, own, inputs, options)


class SpectralLayer(WeightLayer):
    """SVDiff (arXiv 2303.11305): W = U diag(S) V^T becomes U diag(relu(S + shift)) V^T, of which `shift` (r,) trains.

    A convolution's weight is taken as (out, in h w). U (out, r), S (r,) and V (r, in, ...) are kept in float32: twice
    the size of a square weight, 1.26 times the layers of SD1.5. The change, U diag(relu(S + shift) - S) V^T, is applied
    to the input beside the weight itself, so that a shift of 0 changes no bit.
    """

    def __init__(self, base: nn.Module):
        super().__init__(base)
        weight = base.weight.detach().float()
        matrix = weight[None] if weight.ndim == 1 else weight
        self.left, self.singular, right = _svd(matrix.flatten(1))
        self.right = right.reshape(-1, *matrix.shape[1:])
        self._norm = weight.clone() if weight.ndim == 1 else None
        self.shift = nn.Parameter(torch.zeros_like(self.singular))

    @property
    def gain(self) -> Tensor:
        """relu(S + shift) - S, (r,): what each singular value has changed by."""
        return functional.relu(self.singular + self.shift) - self.singular

    def change(self) -> Tensor:
        """W_adapted - W in float32, in the shape of the weight."""
        made = torch.einsum("or,r,r...->o...", self.left, self.gain, self.right)
        return made if self._norm is None else made[0]

    def _adapted(self, x, *inputs, **options):
        if self._norm is not None:
            own = {"weight": (self._norm + self.change()).to(self.base_layer.weight.dtype)}
            return torch.func.functional_call(self.base_layer, own, (x, *inputs), options)
        left, right, gain = (part.to(x.dtype) for part in (self.left, self.right, self.gain))
        if isinstance(self.base_layer, nn.Linear):
            change = functional.linear(functional.linear(x, right) * gain, left)
        else:
            inner = self.base_layer._conv_forward(x, right, None) * gain.view(-1, 1, 1)
            change = functional.conv2d(inner, left[:, :, None, None])
        return self.base_layer(x, *inputs, **options) + change


def _cast(weight: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if weight is None else weight.to(dtype)


def _svd(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, r), S (r,) and V^T (r, in) of a matrix, by QR of its longer side first: five times as fast on a CPU."""
    if weight.shape[0] > weight.shape[1]:
        right, singular, left = _svd(weight.T)
        return left.T, singular, right.T
    basis, triangle = torch.linalg.qr(weight.T)
    left, singular, right = torch.linalg.svd(triangle.T, full_matrices=False)
    return left, singular, right @ basis.T
