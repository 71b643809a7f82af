"""The dense prediction head: four of the aggregator's outputs become one map at image resolution.

    tokens -> LayerNorm -> 1x1 conv -> + position -> resize x4, x2, x1, x1/2 -> 3x3 conv        (each of the four
    outputs)
    coarse to fine: x = x + unit1(skip);  x = unit2(x);  1x1 conv;  bilinear to the next finer map (the finest: x2)
    3x3 conv -> bilinear to the image size / down_ratio -> + position -> 3x3 conv, ReLU, 1x1 conv -> activation

after Ranftl, Bochkovskiy, Koltun, "Vision Transformers for Dense Prediction", 2021. Maps are channels-last
throughout: the tokens are so already, and both oneDNN and cuDNN convolve fastest that way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vggt_mv.errors import VggtMvError
from vggt_mv.heads.head_act import activate_head, check_head_activations
from vggt_mv.heads.inputs import image_size, patch_grid, select_output
from vggt_mv.heads.utils import add_position_embedding, position_offsets
from vggt_mv.layers.conv import Conv3x3, StridedConv3x3

__all__ = ["DPTHead", "FeatureFusionBlock", "ResidualConvUnit"]


class ResidualConvUnit(nn.Module):
    """``r = relu(x);  r + conv2(relu(conv1(r)))`` with 3x3 convolutions.

    The skip carries ``relu(x)``: the pretrained weights come from a network whose first ReLU worked in place. The input
    itself is not changed.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv1 = Conv3x3(features, features)
        self.conv2 = Conv3x3(features, features)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, h, w]`` -> a new ``[N, C, h, w]``."""
        x = F.relu(x)
        return self.conv2(self.conv1(x, activation="relu"), residual=x, overwrite_residual=True)


class FeatureFusionBlock(nn.Module):
    """Joins a map with the next finer one: ``out_conv(resize(unit2(x + unit1(skip))))``.

    Args:
        features: channels of all maps.
        has_skip: False for the coarsest map, which joins nothing; then there is no unit1.
    """

    def __init__(self, features: int, has_skip: bool = True) -> None:
        super().__init__()
        self.out_conv = nn.Conv2d(features, features, kernel_size=1)
        if has_skip:
            self.resConfUnit1 = ResidualConvUnit(features)
        self.resConfUnit2 = ResidualConvUnit(features)
        self.has_skip = has_skip

    def forward(self, x: Tensor, skip: Tensor | None = None, size: tuple[int, int] | None = None) -> Tensor:
        """``[N, C, h, w]``, skip of the same shape -> ``[N, C, *size]``; default: twice the size."""
        return _resize(self.join(x, skip), size or _double(x))

    def join(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """The same before it is resized."""
        if self.has_skip:
            if skip is None:
                raise VggtMvError("FeatureFusionBlock: skip must be a map, got None; only has_skip=False takes none")
            x = self.resConfUnit1(skip).add_(x)
        # The 1x1 convolution and the interpolation commute (its weights sum to one), and before it there is a quarter
        # of the pixels to convolve.
        return self.out_conv(self.resConfUnit2(x))


# Memory that the maps of the frames at work may take, where one frame does not take more: one frame of 518 x 518, which
# fills any processor. More frames at once are slower on a CPU: larger maps are fresh memory and leave the caches.
_MAP_BYTES = 320 << 20


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(x.shape[-2:]) == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def _double(x: Tensor) -> tuple[int, int]:
    return 2 * x.shape[-2], 2 * x.shape[-1]


def _empty_frames(like: Tensor, frames: int) -> Tensor:
    """Room for `frames` items of the kind of ``like[0]``, in the same memory order."""
    if like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last):
        _, channels, height, width = like.shape
        return like.new_empty((frames, height, width, channels)).permute(0, 3, 1, 2)
    return like.new_empty((frames, *like.shape[1:]))


class _Scratch(nn.Module):
    """Holds what comes after the resizing; the name is part of the checkpoint's keys."""

    def __init__(self, out_channels: Sequence[int], features: int, head_features: int, output_dim: int | None) -> None:
        super().__init__()

        def entry(channels: int) -> Conv3x3:
            return Conv3x3(channels, features, bias=False)

        self.layer1_rn, self.layer2_rn, self.layer3_rn, self.layer4_rn = map(entry, out_channels)
        self.refinenet1 = FeatureFusionBlock(features)
        self.refinenet2 = FeatureFusionBlock(features)
        self.refinenet3 = FeatureFusionBlock(features)
        self.refinenet4 = FeatureFusionBlock(features, has_skip=False)
        self.output_conv1 = Conv3x3(features, head_features)
        if output_dim is not None:
            self.output_conv2 = nn.Sequential(
                Conv3x3(head_features, 32),
                nn.ReLU(inplace=True),
                nn.Conv2d(32, output_dim, kernel_size=1),
            )

    def fuse(self, maps: list[Tensor]) -> Tensor:
        """Four maps, fine to coarse -> one of twice the finest size, convolved. Empties the list as it goes."""
        sizes = [(x.shape[-2], x.shape[-1]) for x in maps]
        x = self.refinenet4(self.layer4_rn(maps.pop()), size=sizes[2])
        x = self.refinenet3(x, self.layer3_rn(maps.pop()), size=sizes[1])
        x = self.refinenet2(x, self.layer2_rn(maps.pop()), size=sizes[0])
        x = self.refinenet1.join(x, self.layer1_rn(maps.pop()))
        return self.output_conv1(x, size=_double(x))


class DPTHead(nn.Module):
    """Dense maps (depth, points, or features) from the aggregator's outputs.

    Args:
        dim_in: features of a token, 2C.
        patch_size: side of a patch in pixels.
        output_dim: channels of the prediction, the last of them the confidence.
        activation, conf_activation: see `activate_head`.
        features: channels of the fusion maps.
        out_channels: channels of the four maps before fusion, fine to coarse.
        intermediate_layer_idx: the four outputs that are read.
        pos_embed: add ``0.1 x`` the sine-cosine embedding of the image plane, to the four maps and before the last
            convolutions.
        feature_only: stop before those and return `features` channels.
        down_ratio: the result is at the image's size divided by this.

    Raises:
        VggtMvError: not four `out_channels` or layers, sizes below 1, `pos_embed` with channels that are no multiple
            of 4, or an unknown activation.

    Example:
        >>> import torch
        >>> head = DPTHead(8, output_dim=2, activation="exp", features=8, out_channels=[4, 4, 8, 8],
        ...                intermediate_layer_idx=[0, 1, 2, 3])
        >>> outputs = [torch.zeros(1, 2, 5 + 6, 8) for _ in range(4)]
        >>> depth, confidence = head(outputs, torch.zeros(1, 2, 3, 28, 42), patch_start_idx=5)
        >>> depth.shape, confidence.shape
        (torch.Size([1, 2, 28, 42, 1]), torch.Size([1, 2, 28, 42]))
    """

    def __init__(
        self,
        dim_in: int,
        patch_size: int = 14,
        output_dim: int = 4,
        activation: str = "inv_log",
        conf_activation: str = "expp1",
        features: int = 256,
        out_channels: Sequence[int] = (256, 512, 1024, 1024),
        intermediate_layer_idx: Sequence[int] = (4, 11, 17, 23),
        pos_embed: bool = True,
        feature_only: bool = False,
        down_ratio: int = 1,
    ) -> None:
        super().__init__()
        if len(out_channels) != 4 or len(intermediate_layer_idx) != 4:
            raise VggtMvError(
                "DPTHead: out_channels and intermediate_layer_idx must have four entries each, "
                f"got {list(out_channels)} and {list(intermediate_layer_idx)}"
            )
        if down_ratio < 1:
            raise VggtMvError(f"DPTHead: down_ratio must be at least 1, got {down_ratio}")
        if not feature_only and output_dim < 2:
            raise VggtMvError(f"DPTHead: output_dim must be at least 2 (values and confidence), got {output_dim}")
        head_features = features if feature_only else features // 2
        if pos_embed and any(channels % 4 for channels in (*out_channels, head_features)):
            raise VggtMvError(
                "DPTHead: pos_embed needs out_channels and the channels of the last map "
                f"({'features' if feature_only else 'features / 2'}) to be multiples of 4, "
                f"got {list(out_channels)} and {head_features}"
            )
        check_head_activations(activation, conf_activation)
        self.dim_in = dim_in
        self.patch_size = patch_size
        self.activation = activation
        self.conf_activation = conf_activation
        self.intermediate_layer_idx = list(intermediate_layer_idx)
        self.pos_embed = pos_embed
        self.feature_only = feature_only
        self.down_ratio = down_ratio

        self.norm = nn.LayerNorm(dim_in)
        self.projects = nn.ModuleList(nn.Conv2d(dim_in, channels, kernel_size=1) for channels in out_channels)
        c1, c2, _, c4 = out_channels
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(c1, c1, kernel_size=4, stride=4),
                nn.ConvTranspose2d(c2, c2, kernel_size=2, stride=2),
                nn.Identity(),
                StridedConv3x3(c4, c4),
            ]
        )
        self.scratch = _Scratch(out_channels, features, head_features, None if feature_only else output_dim)

    def forward(
        self,
        aggregated_tokens_list: Sequence[Tensor | None],
        images: Tensor,
        patch_start_idx: int,
        frames_chunk_size: int | None = 8,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predicts the maps of all frames.

        Args:
            aggregated_tokens_list: the aggregator's outputs ``[B, S, P, dim_in]``, any floating dtype; the entries that
                this head does not read may be None.
            images: ``[B, S, 3, H, W]``; only the size counts.
            patch_start_idx: index of the first patch token of a frame.
            frames_chunk_size: frames (of the B S) to work on at a time, at most: fewer where their maps would take more
                than 320 MiB, as those of two frames of 518 x 518 do. None: all at once. The result does not depend on
                it.

        Returns:
            (values ``[B, S, H', W', output_dim - 1]``, confidence ``[B, S, H', W']``), or with `feature_only` the
            features ``[B, S, features, H', W']``; ``H' = H // down_ratio``. Dtype of the parameters.

        Raises:
            VggtMvError: shapes that do not fit each other, outputs that are missing, or a chunk size below 1.
        """
        batch, frames, height, width = image_size("DPTHead", images)
        rows, columns = patch_grid("DPTHead", height, width, self.patch_size)
        if frames_chunk_size is not None and frames_chunk_size < 1:
            raise VggtMvError(f"DPTHead: frames_chunk_size must be at least 1 or None, got {frames_chunk_size}")
        if min(height, width) < self.down_ratio:
            raise VggtMvError(f"DPTHead: images must be at least down_ratio = {self.down_ratio} pixels wide and high")
        outputs = []
        for layer in self.intermediate_layer_idx:
            tokens = select_output("DPTHead", aggregated_tokens_list, layer, self.dim_in)
            if tuple(tokens.shape[:3]) != (batch, frames, patch_start_idx + rows * columns):
                raise VggtMvError(
                    f"DPTHead: aggregated_tokens_list[{layer}] must be [{batch}, {frames}, {patch_start_idx} + "
                    f"{rows} x {columns}, C] for images {list(images.shape)}, got {list(tokens.shape)}"
                )
            outputs.append(tokens.flatten(0, 1))

        total = batch * frames
        step = total
        if frames_chunk_size is not None:
            step = min(total, frames_chunk_size, max(1, _MAP_BYTES // self._map_bytes(height, width)))
        results: list[Tensor] = []  # one for each item of what is returned
        chunks: list[tuple[Tensor, ...]] = []
        for start in range(0, total, max(step, 1)):
            part = [tokens[start : start + step, patch_start_idx:] for tokens in outputs]
            chunk = self._predict(part, (rows, columns), (height, width))
            if torch.is_grad_enabled() or step == total:
                chunks.append(chunk)
                continue
            if not results:
                results = [_empty_frames(item, total) for item in chunk]
            for result, item in zip(results, chunk, strict=True):  # no second copy of all chunks, as cat makes
                result[start : start + step] = item
        if chunks:
            results = [items[0] if len(items) == 1 else torch.cat(items) for items in zip(*chunks, strict=True)]
        unflattened = [result.unflatten(0, (batch, frames)) for result in results]
        return unflattened[0] if self.feature_only else (unflattened[0], unflattened[1])

    def _map_bytes(self, height: int, width: int) -> int:
        """About what a frame's largest maps take: those on either side of the last two resizings."""
        fused = (8 * height // self.patch_size) * (8 * width // self.patch_size)  # twice the finest of the four maps
        result = (height // self.down_ratio) * (width // self.down_ratio)
        first, last = self.scratch.output_conv1.in_channels, self.scratch.output_conv1.out_channels
        return self.norm.weight.element_size() * (fused * (first + last) + result * last)

    def _predict(
        self, outputs: list[Tensor], grid: tuple[int, int], size: tuple[int, int]
    ) -> tuple[Tensor] | tuple[Tensor, Tensor]:
        """Patch tokens ``[n, rows * columns, dim_in]`` of four outputs -> maps of n frames."""
        aspect_ratio = size[1] / size[0]
        dtype = self.norm.weight.dtype
        maps = []
        for tokens, project, resize in zip(outputs, self.projects, self.resize_layers, strict=True):
            x = self.norm(tokens.to(dtype)).unflatten(1, grid).permute(0, 3, 1, 2)  # channels-last as it is
            x = project(x)
            if self.pos_embed:
                x = add_position_embedding(x, aspect_ratio)
            maps.append(resize(x))
        x = self.scratch.fuse(maps)
        size = size[0] // self.down_ratio, size[1] // self.down_ratio
        if self.feature_only:
            x = _resize(x, size)
            return (add_position_embedding(x, aspect_ratio) if self.pos_embed else x,)
        offsets = position_offsets(x, size, aspect_ratio) if self.pos_embed else None
        first, _, last = self.scratch.output_conv2  # the ReLU between them is done with the first
        x = first(x, activation="relu", size=size, offsets=offsets)  # the map of that size is the largest of all
        return activate_head(last(x), self.activation, self.conf_activation)
