"""The aggregator: tokens of all frames, mixed by two attentions in turn.

Tokens lie as the grid ``[B, T, N, P, C]`` (times, views, tokens of a frame) and never move: an attention names the axis
that it joins. A single sequence of S frames is the grid T = 1, N = S, where time attention is attention inside each
frame and view attention is attention over all frames, so one loop serves VGGT, PAGE-4D and VGGT_MV.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vggt_mv.errors import VggtMvError
from vggt_mv.layers.block import Block
from vggt_mv.layers.grid import GridContext
from vggt_mv.layers.init import init_normal
from vggt_mv.layers.rope import RotaryPositionEmbedding2D
from vggt_mv.layers.vision_transformer import DinoVisionTransformer
from vggt_mv.models.aliases import BLOCK_ALIASES, canonicalize_block_names
from vggt_mv.models.inputs import check_images, check_memory_state, patch_means
from vggt_mv.models.options import StageCallback
from vggt_mv.models.patch_embedding import build_patch_embed
from vggt_mv.models.sparse_global import SparseGlobal, check_sparse_options
from vggt_mv.models.spatial_mask import SpatialMaskHead
from vggt_mv.models.streams import DynamicMask, Rounds, Step, Stream, mask_weight

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
        enable_spatial_mask: adds the head that predicts what moves (PAGE-4D). Without dual stream it acts on sequences
            only.
        mask_layer: the frame block after which it predicts; global blocks with a larger index see the mask. None:
            never.
        mask_strength: the logit bias of a key is ``-mask_strength * mask``.
        special_token_position: where RoPE puts camera and register tokens of ``[B,T,N,3,H,W]`` images: ``"origin"`` (0,
            0) or ``"first_patch"`` (1, 1). A sequence always takes the origin.
        gradient_checkpointing: in training mode keep only the input of each block for the backward pass.
        enable_dual_stream: two streams of tokens with blocks of their own (`pose_frame_blocks`, `pose_global_blocks`,
            `geo_frame_blocks`, `geo_global_blocks`) in place of `frame_blocks` and `global_blocks`, which keep their
            weights, frozen, and do not run. The mask m mutes what moves in the pose stream, with the logit bias
            ``-lambda_pose * m`` of its keys, and amplifies it in the geometry stream, with ``+lambda_geo * m``, for all
            queries of every attention that joins several frames; ``lambda = clamp(softplus(lambda_logit), 0, 4)``. It
            is predicted from the geometry stream's tokens, also on times x views.
        enable_sparse_global: after the rounds in `sparse_global_layers` the tokens of all frames exchange information,
            ``x + ls1(proj(attention))`` with the weights of that round's global block. The result is what the output of
            that round records in the half of the attention that ran last.
        sparse_global_layers: indices of rounds; by default the last two.
        sparse_strategy: ``"memory_bank"``: a few memory tokens read all tokens, then all tokens read those.
            ``"landmark"``: all tokens look at the special tokens and the `landmark_k` patches of largest norm of every
            frame. ``"block_dilated"``: the tokens of a frame look at those of the frames around it, up to 4 times and
            views away (see `dilated_neighbours`).
        landmark_k: see there; at most all patches are taken.
        num_memory_tokens: size of the memory bank; its tokens `memory_tokens` exist for that strategy only.

    `view_blocks` and `time_blocks` are other names of `global_blocks` and `frame_blocks`: as attributes, and as keys
    that `load_state_dict` understands. Saving writes the latter.

    New weights: PyTorch's defaults for the Linears of the blocks, LayerScale at `init_values`, camera and register
    tokens normal with 1e-6, memory tokens normal with 0.02, both lambda logits log 0.1; the ViT as its own module says.

    Raises:
        VggtMvError: an option out of its range, or unknown.

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
        sparse_global_layers: Collection[int] | None = None,
        sparse_strategy: str = "memory_bank",
        landmark_k: int = 64,
        num_memory_tokens: int = 32,
    ) -> None:
        super().__init__()
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
        self.enable_dual_stream = enable_dual_stream
        self.enable_sparse_global = enable_sparse_global
        self.sparse_strategy = sparse_strategy
        self.landmark_k = landmark_k
        layers = check_sparse_options(sparse_strategy, sparse_global_layers, depth, landmark_k, num_memory_tokens)
        self.sparse_global_layers = layers if enable_sparse_global else ()

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
        if enable_dual_stream:
            for name in ("pose_frame_blocks", "pose_global_blocks", "geo_frame_blocks", "geo_global_blocks"):
                setattr(self, name, make_blocks())
            self.lambda_pose_logit = nn.Parameter(torch.tensor(math.log(0.1)))
            self.lambda_geo_logit = nn.Parameter(torch.tensor(math.log(0.1)))
            # They do not run; a parameter without a gradient would upset distributed training.
            self.frame_blocks.requires_grad_(False)
            self.global_blocks.requires_grad_(False)
        if enable_sparse_global and sparse_strategy == "memory_bank":
            self.memory_tokens = nn.Parameter(torch.empty(1, num_memory_tokens, embed_dim))
            # Large enough for norm1 to tell them apart: its eps drowns what camera tokens start with.
            init_normal(self.memory_tokens, std=0.02)
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
        keep_pose_outputs: Collection[int] | None = None,
        on_stage: StageCallback | None = None,
        dynamic_mask: Tensor | None = None,
        memory_state: Tensor | None = None,
        landmark_confidence: Tensor | None = None,
    ) -> tuple[list[Tensor | None], int] | tuple[list[Tensor | None], int, dict[str, Any] | None]:
        """Runs patch embedding and all rounds.

        Args:
            images: ``[S,3,H,W]``, ``[B,S,3,H,W]`` (a sequence) or ``[B,T,N,3,H,W]`` (times x views), RGB in [0, 1], H
                and W multiples of the patch size.
            keep_outputs: indices of the outputs that are wanted, by default all. The others are None in the list.
            keep_pose_outputs: the same for the pose stream of a dual one, by default `keep_outputs`.
            on_stage: told of the progress, with stages "patch_embed" and "attention".
            dynamic_mask: the images' shape without channels, in [0, 1], 1 where the scene moves. Its patch means m act
                in every attention that joins several frames. Without dual stream they bias the logits by
                ``-mask_strength * m`` for the queries of camera and register tokens. Where the spatial mask head has
                predicted as well, the larger of the two acts.
            memory_state: ``[streams, layers, B, M, C]``, what the memory bank starts from instead of `memory_tokens`:
                the ``"memory_state"`` of the part of the recording before this one.
            landmark_confidence: the images' shape without channels. Its patch means choose landmarks in place of the
                tokens' norms.

        Returns:
            The list of outputs, ``[B,S,P,2C]`` for a sequence and ``[B,T,N,P,2C]`` for times x views, with dual stream
            those of the geometry stream; the index of the first patch token; and with `enable_spatial_mask`,
            `enable_dual_stream` or `enable_sparse_global` a dict with those that exist, or None where none does:
            ``"dynamic_mask"``, the predicted mask ``[B,S,H/p,W/p]`` or ``[B,T,N,H/p,W/p]``; ``"pose"`` and ``"geo"``,
            the lists of outputs of both streams; ``"memory_state"``, detached.

        Raises:
            VggtMvError: an argument of a wrong shape, one without the option that it belongs to, or an index in
                `keep_outputs` that does not exist.
        """
        check_images("Aggregator", images, self.patch_size)
        keep = self._checked_outputs("keep_outputs", keep_outputs)
        keep_pose = keep if keep_pose_outputs is None else self._checked_outputs("keep_pose_outputs", keep_pose_outputs)
        given = self._patch_means("dynamic_mask", dynamic_mask, images)
        confidence = self._patch_means("landmark_confidence", landmark_confidence, images)
        is_sequence = images.ndim < 6
        images = _as_grid(images, frame_dims=3)
        sparse = self._sparse_global(images.shape[0], memory_state, confidence)
        predicts = self.spatial_mask_head is not None and (is_sequence or self.enable_dual_stream)
        mask = DynamicMask(given, self.mask_layer if predicts else None, everywhere=self.enable_dual_stream)
        streams = self._streams(self._embed(images, on_stage), keep_pose, keep)
        rounds = Rounds(
            grid=GridContext(
                axis="frame",
                grid_hw=(images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size),
                num_special=self.patch_start_idx,
                special_position=1 if self.special_token_position == "first_patch" and not is_sequence else 0,
            ),
            mask=mask,
            mask_strength=self.mask_strength,
            mask_head=self.spatial_mask_head,
            sparse=sparse,
            checkpoint=self.gradient_checkpointing and self.training and torch.is_grad_enabled(),
        )
        rounds.run(streams, self._schedule(self.sequence_order if is_sequence else self.grid_order), on_stage)
        if is_sequence:
            for stream in streams:
                stream.outputs = [None if output is None else output.flatten(1, 2) for output in stream.outputs]
        outputs = streams[-1].outputs
        if not (self.enable_spatial_mask or self.enable_dual_stream or self.enable_sparse_global):
            return outputs, self.patch_start_idx
        extras: dict[str, Any] = {}
        if mask.predicted is not None:
            extras["dynamic_mask"] = mask.predicted.flatten(1, 2) if is_sequence else mask.predicted
        if self.enable_dual_stream:
            extras |= {"pose": streams[0].outputs, "geo": outputs}
        if streams[0].memory:
            extras["memory_state"] = torch.stack([torch.stack(stream.memory) for stream in streams]).detach()
        return outputs, self.patch_start_idx, extras or None

    def _checked_outputs(self, name: str, wanted: Collection[int] | None) -> set[int]:
        keep = set(range(self.depth)) if wanted is None else set(wanted)
        if not keep <= set(range(self.depth)):
            raise VggtMvError(f"Aggregator: {name} must be indices in 0..{self.depth - 1}, got {sorted(wanted or ())}")
        return keep

    def _patch_means(self, name: str, values: Tensor | None, images: Tensor) -> Tensor | None:
        if values is None:
            return None
        if name == "landmark_confidence" and not (self.sparse_global_layers and self.sparse_strategy == "landmark"):
            raise VggtMvError(
                "Aggregator: landmark_confidence must be None without enable_sparse_global=True and "
                "sparse_strategy='landmark'"
            )
        return _as_grid(patch_means("Aggregator", values, images, self.patch_size, name), frame_dims=2)

    def _sparse_global(self, batch: int, memory_state: Tensor | None, confidence: Tensor | None) -> SparseGlobal | None:
        memory_tokens = getattr(self, "memory_tokens", None)
        if memory_state is not None:
            if memory_tokens is None:
                raise VggtMvError(
                    "Aggregator: memory_state must be None without enable_sparse_global=True and "
                    "sparse_strategy='memory_bank'"
                )
            streams = 2 if self.enable_dual_stream else 1
            expected = (streams, len(self.sparse_global_layers), batch, *memory_tokens.shape[1:])
            check_memory_state("Aggregator", memory_state, expected)
        if not self.enable_sparse_global:
            return None
        return SparseGlobal(
            self.sparse_strategy, self.sparse_global_layers, self.landmark_k, memory_tokens, memory_state, confidence
        )

    def _streams(self, x: Tensor, keep_pose: set[int], keep: set[int]) -> list[Stream]:
        """The one stream, or the pose stream and the geometry stream, all of which start from the same tokens."""

        def stream(prefix: str, keep: set[int], weight: Tensor | None) -> Stream:
            blocks = {"time": getattr(self, f"{prefix}frame_blocks"), "view": getattr(self, f"{prefix}global_blocks")}
            return Stream(blocks, x, keep, weight, mutes=prefix == "pose_", outputs=[None] * self.depth)

        if not self.enable_dual_stream:
            return [stream("", keep, None)]
        pose, geo = mask_weight(self.lambda_pose_logit), mask_weight(self.lambda_geo_logit)
        return [stream("pose_", keep_pose, pose), stream("geo_", keep, geo)]

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

    def _schedule(self, order: tuple[str, str]) -> list[Step]:
        """All steps in the order in which they run."""
        steps: list[Step] = []
        for start in range(0, self.depth, self.aa_block_size):
            for kind in order:
                for index in range(start, start + self.aa_block_size):
                    steps.append((kind, index))
                    if kind == order[-1] and index in self.sparse_global_layers:
                        steps.append(("sparse", index))
        return steps


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
