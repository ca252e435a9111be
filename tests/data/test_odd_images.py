"""What stands in the place of ComfyUI's images, where a workflow was written by hand."""

from __future__ import annotations

import pytest
import torch

from anchor_core.data.pictures import from_images


@pytest.mark.parametrize("images", [None, [None], "text", [torch.zeros(1, 8, 8, 3), "text"], {"a": 1}])
def test_what_holds_no_pictures_is_said(images):
    with pytest.raises(ValueError, match="^pictures of one holds a .* in the place of pictures"):
        from_images(images, name="pictures of one")
