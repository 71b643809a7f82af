"""The aggregator: tokens of all frames, mixed by two attentions in turn.

Tokens lie as the grid ``[B, T, N, P, C]`` (times, views, tokens of a frame) and never move: an attention names the axis
that it joins. A single sequence of S frames is the grid T = 1, N = S, where time attention is attention inside each
frame and view attention is attention over all frames, so one loop serves VGGT, PAGE-4D and VGGT_MV.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vggt_mv.errors import VggtMvError
from vggt_mv.layers.block import Block, norm1, run_block
from vggt_mv.layers.grid import GridContext
from vggt_mv.layers.init import init_normal
from vggt_mv.layers.rope import RotaryPositionEmbedding2D
from vggt_mv.layers.vision_transformer import DinoVisionTransformer
from vggt_mv.models.aliases import BLOCK_ALIASES, canonicalize_block_names
from vggt_mv.models.inputs import check_images, patch_means
from vggt_mv.models.options import StageCallback
from vggt_mv.models.patch_embedding import build_patch_embed
from vggt_mv.models.spatial_mask import SpatialMaskHead

__all__ = ["Aggregator"]

_RESNET_MEAN = (0.485, 0.456, 0.406)
_RESNET_STD = (0.229, 0.224, 0.225)

# Both vocabularies, in terms of the two lists of blocks: "time" is frame_blocks, "view" is global_blocks.
_KINDS = {"frame": "time", "global": "view", "time": "time", "view": "view"}

# Compared by identity: the default means another order on a grid of times and views than the same list given by a
# caller.
_DEFAULT_AA_ORDER: Sequence[str] = ["frame", "global"]


class Aggregator(nn.Module):
    """Images to tokens that know of each other.

    A frame's tokens are one camera token, R register tokens and its patches (``P = 1 + R + (H/p)(W/p)``). Rounds of two
    attentions follow; output i is the concatenation of what block i of either kind gave, ``concat(time_i, view_i)``.

    Args:
        img_size: side in pixels of the square that the patch embedding's position embedding covers.
        patch_size: side p of a patch.
        embed_dim: features C of a token.
        depth: blocks of each kind.
        num_heads, mlp_ratio, qkv_bias, proj_bias, ffn_bias, qk_norm, init_values: of the blocks, see `Block`.
        num_register_tokens: R.
        block_fn: makes a block; must understand the token grid as `Block` does.
        patch_embed: ``"dinov2_vitl14_reg"``, ``"dinov2_vitb14_reg"``, ``"dinov2_vits14_reg"``, ``"dinov2_vitg2_reg"``,
            any name that contains ``conv`` for the bare convolution, or a module
            ``[F, 3, H, W] -> [F, (H/p)(W/p), C]``.
        aa_order: the order of the attentions in a round, as ``["frame", "global"]`` or ``["view", "time"]``. On images
            ``[B,T,N,3,H,W]`` frame means time and global means view, and where nothing is given view comes first. On a
            sequence the order is frame, global unless it is given in those names.
        aa_block_size: blocks of one kind that run before the kind changes.
        rope_freq: base of RoPE; None or <= 0: no RoPE.
        patch_embed_options: overrides arguments of the named patch embedding (``{"depth": 2, "num_heads": 4}``).
        enable_spatial_mask: adds the head that predicts what moves (PAGE-4D). It acts on sequences only.
        mask_layer: the frame block after which it predicts; global blocks with a larger index see the mask. None:
            never.
        mask_strength: the logit bias of a key is ``-mask_strength * mask``.
        special_token_position: where RoPE puts camera and register tokens of ``[B,T,N,3,H,W]`` images: ``"origin"`` (0,
            0) or ``"first_patch"`` (1, 1). A sequence always takes the origin.
        gradient_checkpointing: in training mode keep only the input of each block for the backward pass.
        enable_dual_stream, enable_sparse_global: not implemented.

    `view_blocks` and `time_blocks` are other names of `global_blocks` and `frame_blocks`: as attributes, and as keys
    that `load_state_dict` understands. Saving writes the latter.

    New weights: PyTorch's defaults for the Linears of the blocks, LayerScale at `init_values`, camera and register
    tokens normal with 1e-6; the ViT as its own module says.

    Raises:
        VggtMvError: an option out of its range, or unknown.
        NotImplementedError: for an option that does not exist yet.

    Example:
        >>> aggregator = Aggregator(img_size=28, embed_dim=32, depth=2, num_heads=2, patch_embed="conv")
        >>> outputs, patch_start_idx = aggregator(torch.rand(1, 3, 3, 28, 42))
        >>> len(outputs), outputs[0].shape, patch_start_idx
        (2, torch.Size([1, 3, 11, 64]), 5)
    """

    _resnet_mean: Tensor
    _resnet_std: Tensor

    def __init__(
        self,
        img_size: int = 518,
        patch_size: int = 14,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_register_tokens: int = 4,
        block_fn: Callable[..., nn.Module] = Block,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        ffn_bias: bool = True,
        patch_embed: str | nn.Module = "dinov2_vitl14_reg",
        aa_order: Sequence[str] = _DEFAULT_AA_ORDER,
        aa_block_size: int = 1,
        qk_norm: bool = True,
        rope_freq: float | None = 100,
        init_values: float | None = 0.01,
        *,
        patch_embed_options: Mapping[str, Any] | None = None,
        enable_spatial_mask: bool = False,
        mask_layer: int | None = 7,
        mask_strength: float = 0.5,
        special_token_position: str = "origin",
        gradient_checkpointing: bool = True,
        enable_dual_stream: bool = False,
        enable_sparse_global: bool = False,
    ) -> None:
        super().__init__()
        for name, wanted in (
            ("enable_dual_stream", enable_dual_stream),
            ("enable_sparse_global", enable_sparse_global),
        ):
            if wanted:
                raise NotImplementedError(f"Aggregator: {name}=True is not implemented yet")
        _check_blocks(depth, aa_block_size, embed_dim, num_heads, rope_freq)
        _check_mask_and_positions(enable_spatial_mask, mask_layer, depth, special_token_position)
        self.sequence_order, self.grid_order = _resolve_order(aa_order)
        self.img_size = img_size
        self.patch_size = patch_size
        self.embed_dim = embed_dim
        self.depth = depth
        self.aa_order = list(aa_order)
        self.aa_block_size = aa_block_size
        self.num_register_tokens = num_register_tokens
        self.patch_start_idx = 1 + num_register_tokens
        self.enable_spatial_mask = enable_spatial_mask
        self.mask_layer = mask_layer
        self.mask_strength = mask_strength
        self.special_token_position = special_token_position
        self.gradient_checkpointing = gradient_checkpointing

        self.patch_embed = build_patch_embed(
            patch_embed, img_size, patch_size, embed_dim, num_register_tokens, patch_embed_options
        )
        if isinstance(self.patch_embed, DinoVisionTransformer):
            self.patch_embed.gradient_checkpointing = gradient_checkpointing
            # Patches are never hidden here; a parameter without a gradient would upset distributed training.
            self.patch_embed.mask_token.requires_grad_(False)
        self.rope = RotaryPositionEmbedding2D(frequency=rope_freq) if rope_freq is not None and rope_freq > 0 else None

        def make_blocks() -> nn.ModuleList:
            return nn.ModuleList(
                block_fn(
                    dim=embed_dim,
                    num_heads=num_heads,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    proj_bias=proj_bias,
                    ffn_bias=ffn_bias,
                    init_values=init_values,
                    qk_norm=qk_norm,
                    rope=self.rope,
                )
                for _ in range(depth)
            )

        self.frame_blocks = make_blocks()
        self.global_blocks = make_blocks()
        # Variant 0 for the first frame of the grid, variant 1 for all others.
        self.camera_token = nn.Parameter(torch.empty(1, 2, 1, embed_dim))
        self.register_token = nn.Parameter(torch.empty(1, 2, num_register_tokens, embed_dim))
        init_normal(self.camera_token, std=1e-6)
        init_normal(self.register_token, std=1e-6)
        self.spatial_mask_head = SpatialMaskHead(embed_dim) if enable_spatial_mask else None
        self.reset_buffers()

    def reset_buffers(self, device: torch.device | str | None = None) -> None:
        """Makes the buffers that no state dict holds anew, after a model was built on the meta device."""
        for name, values in (("_resnet_mean", _RESNET_MEAN), ("_resnet_std", _RESNET_STD)):
            self.register_buffer(name, torch.tensor(values, device=device).view(3, 1, 1), persistent=False)

    @property
    def view_blocks(self) -> nn.ModuleList:
        """Another name of `global_blocks`."""
        return self.global_blocks

    @property
    def time_blocks(self) -> nn.ModuleList:
        """Another name of `frame_blocks`."""
        return self.frame_blocks

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module would register a module set under an alias as a second child that the property then hides.
        super().__setattr__(BLOCK_ALIASES.get(name, name), value)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        error_msgs += canonicalize_block_names(state_dict, prefix)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def forward(
        self,
        images: Tensor,
        *,
        keep_outputs: Collection[int] | None = None,
        on_stage: StageCallback | None = None,
        dynamic_mask: Tensor | None = None,
    ) -> tuple[list[Tensor | None], int] | tuple[list[Tensor | None], int, dict[str, Any] | None]:
        """Runs patch embedding and all rounds.

        Args:
            images: ``[S,3,H,W]``, ``[B,S,3,H,W]`` (a sequence) or ``[B,T,N,3,H,W]`` (times x views), RGB in [0, 1], H
                and W multiples of the patch size.
            keep_outputs: indices of the outputs that are wanted, by default all. The others are None in the list.
            on_stage: told of the progress, with stages "patch_embed" and "attention".
            dynamic_mask: the images' shape without channels, in [0, 1], 1 where the scene moves. Its patch means m bias
                the logits by ``-mask_strength * m`` for the queries of camera and register tokens, in every attention
                that joins several frames. Where the spatial mask head has predicted as well, the larger of the two
                acts.

        Returns:
            The list of outputs, ``[B,S,P,2C]`` for a sequence and ``[B,T,N,P,2C]`` for times x views; the index of the
            first patch token; and with `enable_spatial_mask` a dict with ``"dynamic_mask"``, the predicted mask
            ``[B,S,H/p,W/p]``, or None where none was predicted.

        Raises:
            VggtMvError: images or mask of a wrong shape, or an index in `keep_outputs` that does not exist.
        """
        check_images("Aggregator", images, self.patch_size)
        keep = set(range(self.depth)) if keep_outputs is None else set(keep_outputs)
        if not keep <= set(range(self.depth)):
            raise VggtMvError(
                f"Aggregator: keep_outputs must be indices in 0..{self.depth - 1}, got {sorted(keep_outputs or ())}"
            )
        given = None if dynamic_mask is None else patch_means("Aggregator", dynamic_mask, images, self.patch_size)
        is_sequence = images.ndim < 6
        images = _as_grid(images, frame_dims=3)
        mask = _Mask(
            None if given is None else _as_grid(given, frame_dims=2),
            predict_after=self.mask_layer if self.spatial_mask_head is not None and is_sequence else None,
        )
        outputs = self._alternate(self._embed(images, on_stage), images, is_sequence, mask, keep, on_stage)
        if is_sequence:
            outputs = [None if output is None else output.flatten(1, 2) for output in outputs]
        if not self.enable_spatial_mask:
            return outputs, self.patch_start_idx
        extras = None if mask.predicted is None else {"dynamic_mask": mask.predicted.flatten(1, 2)}
        return outputs, self.patch_start_idx, extras

    def _embed(self, images: Tensor, on_stage: StageCallback | None) -> Tensor:
        """Images ``[B,T,N,3,H,W]`` -> all tokens of all frames, ``[B,T,N,P,C]``."""
        grid = images.shape[:3]
        frames = (images.flatten(0, 2) - self._resnet_mean) / self._resnet_std
        frames = frames.to(self.camera_token.dtype)
        if on_stage is not None:
            on_stage("patch_embed", 0, getattr(self.patch_embed, "depth", 1))
        if isinstance(self.patch_embed, DinoVisionTransformer):
            report = None if on_stage is None else lambda done, total: on_stage("patch_embed", done, total)
            patches = self.patch_embed(frames, on_block=report)
        else:
            patches = self.patch_embed(frames)
            if on_stage is not None:
                on_stage("patch_embed", 1, 1)
        if isinstance(patches, dict):
            patches = patches["x_norm_patchtokens"]
        expected = (frames.shape[0], (images.shape[-2] // self.patch_size) * (images.shape[-1] // self.patch_size))
        if patches.shape != (*expected, self.embed_dim):
            raise VggtMvError(
                f"Aggregator: patch_embed must return {[*expected, self.embed_dim]} for these images, "
                f"got {list(patches.shape)}"
            )
        camera = _first_and_others(self.camera_token, grid)
        register = _first_and_others(self.register_token, grid)
        return torch.cat([camera, register, patches.unflatten(0, grid)], dim=-2)

    def _alternate(
        self,
        x: Tensor,
        images: Tensor,
        is_sequence: bool,
        mask: _Mask,
        keep: set[int],
        on_stage: StageCallback | None,
    ) -> list[Tensor | None]:
        """All blocks in their order, from tokens ``[B,T,N,P,C]`` to the outputs ``[B,T,N,P,2C]`` in `keep`."""
        _, times, views, num_tokens, _ = x.shape
        joined = {"time": times, "view": views}
        grid_hw = (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
        special_position = 1 if self.special_token_position == "first_patch" and not is_sequence else 0
        # Only camera and register tokens look away from what moves.
        wide = torch.promote_types(x.dtype, torch.float32)
        special_rows = (torch.arange(num_tokens, device=x.device) < self.patch_start_idx).to(wide)
        steps = self._schedule(self.sequence_order if is_sequence else self.grid_order)
        blocks = [(self.time_blocks if kind == "time" else self.view_blocks)[index] for kind, index in steps]
        next_norms: list[nn.Module | None] = [*(norm1(block) for block in blocks[1:]), None]
        checkpoint = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        outputs: list[Tensor | None] = [None] * self.depth
        halves: dict[tuple[str, int], Tensor] = {}
        normed: Tensor | None = None
        for done, ((kind, index), block) in enumerate(zip(steps, blocks, strict=True)):
            if on_stage is not None:
                on_stage("attention", done, len(steps))
            moving = mask.acting(kind, index, joins_several=joined[kind] > 1)
            context = GridContext(
                # One time or one view joins no frames: the same sequences as "frame", which lie contiguously.
                axis=kind if joined[kind] > 1 else "frame",
                grid_hw=grid_hw,
                num_special=self.patch_start_idx,
                special_position=special_position,
                key_bias=None if moving is None else self._key_bias(moving).to(wide),
                row_gate=None if moving is None else special_rows,
            )
            x, normed = run_block(block, x, context, normed=normed, next_norm=next_norms[done], checkpoint=checkpoint)
            if kind == "time" and index == mask.predict_after:
                assert self.spatial_mask_head is not None
                mask.predicted = self.spatial_mask_head(x, grid_hw, self.patch_start_idx)
            if index in keep:
                halves[kind, index] = x
                if ("time", index) in halves and ("view", index) in halves:
                    outputs[index] = torch.cat([halves.pop(("time", index)), halves.pop(("view", index))], dim=-1)
        if on_stage is not None:
            on_stage("attention", len(steps), len(steps))
        return outputs

    def _schedule(self, order: tuple[str, str]) -> list[tuple[str, int]]:
        """(kind, index) of all blocks in the order in which they run."""
        return [
            (kind, index)
            for start in range(0, self.depth, self.aa_block_size)
            for kind in order
            for index in range(start, start + self.aa_block_size)
        ]

    def _key_bias(self, moving: Tensor) -> Tensor:
        """Mask ``[B,T,N,h,w]`` -> logit bias of every key ``[B,T,N,P]``, 0 for camera and register tokens."""
        return F.pad(-self.mask_strength * moving.flatten(-2), (self.patch_start_idx, 0))


@dataclass
class _Mask:
    """What is known of the moving parts of the scene, as masks ``[B,T,N,h,w]``, in [0, 1].

    Attributes:
        given: by the caller.
        predict_after: the time (frame) block after which the head predicts, None: it does not.
        predicted: by the head, once it has.
    """

    given: Tensor | None
    predict_after: int | None
    predicted: Tensor | None = None

    def acting(self, kind: str, index: int, joins_several: bool) -> Tensor | None:
        """The mask that acts in view (global) or time (frame) block `index`.

        A given mask acts in every attention that joins several frames, the predicted one as in PAGE-4D: in the global
        blocks after `predict_after`.
        """
        given = self.given if joins_several else None
        predicted = None
        if self.predict_after is not None and kind == "view" and index > self.predict_after:
            predicted = self.predicted
        if given is None or predicted is None:
            return given if predicted is None else predicted
        return torch.maximum(given, predicted)


def _check_blocks(depth: int, aa_block_size: int, embed_dim: int, num_heads: int, rope_freq: float | None) -> None:
    if depth < 1 or aa_block_size < 1 or depth % aa_block_size:
        raise VggtMvError(
            f"Aggregator: depth must be a positive multiple of aa_block_size, got depth = {depth} and "
            f"aa_block_size = {aa_block_size}"
        )
    has_rope = rope_freq is not None and rope_freq > 0
    if embed_dim % num_heads or (has_rope and embed_dim // num_heads % 4):
        condition = " that is a multiple of 4 (rope_freq > 0)" if has_rope else ""
        raise VggtMvError(
            f"Aggregator: embed_dim must be num_heads = {num_heads} times a head width{condition}, got {embed_dim}"
        )


def _check_mask_and_positions(
    enable_spatial_mask: bool, mask_layer: int | None, depth: int, special_token_position: str
) -> None:
    if enable_spatial_mask and mask_layer is not None and not 0 <= mask_layer < depth:
        raise VggtMvError(
            f"Aggregator: mask_layer must lie in 0..depth-1 = 0..{depth - 1} or be None, got {mask_layer}"
        )
    if special_token_position not in ("origin", "first_patch"):
        raise VggtMvError(
            f"Aggregator: special_token_position must be 'origin' or 'first_patch', got {special_token_position!r}"
        )


def _as_grid(x: Tensor, frame_dims: int) -> Tensor:
    """``[S, *frame]`` or ``[B, S, *frame]`` -> ``[B, 1, S, *frame]``."""
    leading = x.ndim - frame_dims
    if leading == 1:
        return x[None, None]
    return x.unsqueeze(1) if leading == 2 else x


def _first_and_others(tokens: Tensor, grid: Sequence[int]) -> Tensor:
    """``[1, 2, K, C]`` -> ``[B, T, N, K, C]``: variant 0 at (t=0, n=0), variant 1 elsewhere."""
    batch, times, views = grid
    _, _, count, dim = tokens.shape
    others = tokens[:, 1:].expand(1, times * views - 1, count, dim)
    sequence = torch.cat([tokens[:, :1], others], dim=1)
    return sequence.view(1, times, views, count, dim).expand(batch, -1, -1, -1, -1)


def _resolve_order(aa_order: Sequence[str]) -> tuple[tuple[str, str], tuple[str, str]]:
    """The order of the two kinds of blocks on a sequence, and on times x views."""
    if aa_order is _DEFAULT_AA_ORDER:
        return ("time", "view"), ("view", "time")
    names = list(aa_order)
    if sorted(names) not in (["frame", "global"], ["time", "view"]):
        raise VggtMvError(
            "Aggregator: aa_order must hold 'frame' and 'global', or 'view' and 'time', each once and in either order, "
            f"got {names}"
        )
    order = (_KINDS[names[0]], _KINDS[names[1]])
    return (order if "frame" in names else ("time", "view")), order
