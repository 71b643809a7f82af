"""Scene: T times x N views of images, checked when it is made, decoded when it is read."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from vggt_mv.errors import SceneError

SceneKind = Literal["grid", "folder", "folders", "video", "videos", "tensor"]
Layout = Literal["auto", "views", "times"]
FrameCallback = Callable[[int, int], None]
"""Called with (images done, images in all)."""

# Bicubic resizing by others leaves values this far outside of [0, 1]; more is another scale (0..255, or mean and
# deviation removed).
_RANGE_SLACK = 1e-3


@dataclass(frozen=True)
class Scene:
    """T times x N views of images.

    Made by ``open_scene`` from files or by ``Scene.from_tensor``; everything that can be wrong with it was looked at
    then. Images are decoded each time they are read, so that a long recording never lies in memory at full size.

    Attributes:
        kind: "grid" (time_*/view*), "folder" (images of one folder or list), "folders", "video", "videos" or "tensor".
        layout: "views" (one time, many views), "times" (many times) or, for several cameras over time, "times x views".
        single_sequence: one folder, one video or [S,3,H,W]: one sequence of frames whose split into times and views is
            only a layout.
        names: ``names[t][n]``, the name of an image, relative to the source.
        view_names: ``view_names[n]``.
        image_sizes: ``image_sizes[n]``, (height, width) of the upright original images of a view.
        times: seconds of each time step from the first, for videos; None where the source has no clock.
        source: what was opened, as the user wrote it.
        notes: one line for each thing decided along the way (layout, frames left out, files ignored).
    """

    kind: SceneKind
    layout: str
    single_sequence: bool
    names: list[list[str]]
    view_names: list[str]
    image_sizes: list[tuple[int, int]]
    times: list[float] | None = None
    source: str = ""
    notes: list[str] = field(default_factory=list)
    # Images from a time on, t-major.
    _decode: Callable[[int], Iterator[Image.Image]] = field(repr=False, kw_only=True)

    @property
    def num_times(self) -> int:
        return len(self.names)

    @property
    def num_views(self) -> int:
        return len(self.view_names)

    @property
    def num_images(self) -> int:
        return self.num_times * self.num_views

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the originals of the first view; see ``image_sizes`` where views differ."""
        return self.image_sizes[0]

    def images(self, start: int = 0) -> Iterator[Image.Image]:
        """T N upright 8-bit RGB images, all views of the first time, then of the second, one in memory at a time.

        Args:
            start: the time to begin with. Files of images before it are not opened; videos are decoded from their
                beginning.

        Raises:
            SceneError: an image that no longer decodes, or no longer has the size that it had when the scene was
                opened.
        """
        count = before = start * self.num_views
        for count, image in enumerate(self._decode(start), start=before + 1):
            time, view = divmod(count - 1, self.num_views)
            size = (image.height, image.width)
            if size != self.image_sizes[view]:
                raise SceneError(
                    f"image {self.names[time][view]!r} of {self.source!r} decodes to {_shown_size(size)}, but its "
                    f"header or first frame said {_shown_size(self.image_sizes[view])}; write it anew at one size"
                )
            yield image
        assert count == self.num_images, (count, self.num_images)

    def frames(self, start: int = 0) -> Iterator[list[Image.Image]]:
        """One list of N upright 8-bit RGB images per time, in order. See ``images`` for what it takes and raises."""
        views: list[Image.Image] = []
        for image in self.images(start):
            views.append(image)
            if len(views) == self.num_views:
                yield views
                views = []

    def part(self, start: int, stop: int) -> Scene:
        """The times from ``start`` up to and without ``stop`` as a scene of their own.

        Example:
            >>> scene = Scene.from_tensor(torch.rand(5, 2, 3, 28, 42))
            >>> [names[0] for names in scene.part(1, 3).names]
            ['time 1, view0', 'time 2, view0']
        """
        count = (stop - start) * self.num_views
        return replace(
            self,
            names=self.names[start:stop],
            times=None if self.times is None else self.times[start:stop],
            _decode=lambda begin: itertools.islice(self._decode(start + begin), count - begin * self.num_views),
        )

    def describe(self) -> str:
        """One line for a person: ``grid: 6 times x 2 views, 640x480``."""
        sizes = sorted({_shown_size(size) for size in self.image_sizes})
        times = f"{self.num_times} time{'s' * (self.num_times != 1)}"
        views = f"{self.num_views} view{'s' * (self.num_views != 1)}"
        return f"{self.kind}: {times} x {views}, {', '.join(sizes)}"

    @classmethod
    def from_tensor(
        cls,
        images: torch.Tensor | np.ndarray[Any, Any],
        *,
        layout: Layout = "auto",
        view_names: Sequence[str] | None = None,
        allow_single: bool = False,
    ) -> Scene:
        """A scene from images in memory.

        Args:
            images: ``[T,N,3,H,W]``, or ``[S,3,H,W]`` for one sequence; RGB, floating point in [0, 1] or uint8. Kept as
                8 bits a channel, like a file. Nothing is shared with the argument.
            layout: what S counts: "views" (also "auto") or "times". Only for ``[S,3,H,W]``.
            view_names: N names, "view0", "view1", ... by default.
            allow_single: let one image pass; nothing can be compared with anything then.

        Raises:
            SceneError: another type, rank, dtype or number of channels, NaN or infinite values, values out of range,
                one image only.

        Example:
            >>> import torch
            >>> Scene.from_tensor(torch.rand(2, 3, 3, 28, 42)).describe()
            'tensor: 2 times x 3 views, 42x28'
        """
        check_layout(layout)
        pixels = _checked_pixels(images)
        single_sequence = pixels.ndim == 4
        if single_sequence:
            grid = pixels[:, None] if layout == "times" else pixels[None]
            shown_layout = "times" if layout == "times" else "views"
        else:
            refuse_layout(layout, f"images [T,N,3,H,W] = {list(pixels.shape)}")
            grid, shown_layout = pixels, "times x views"
        num_times, num_views, _, height, width = grid.shape
        check_count(num_times * num_views, "images", allow_single)
        names_of_views = (
            [f"view{n}" for n in range(num_views)] if view_names is None else [str(name) for name in view_names]
        )
        if len(names_of_views) != num_views:
            raise SceneError(f"view_names must name {num_views} views, got {len(names_of_views)} names")

        def decode(start: int) -> Iterator[Image.Image]:
            for views in grid[start:]:
                for image in views:
                    yield Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))

        return cls(
            kind="tensor",
            layout=shown_layout,
            single_sequence=single_sequence,
            names=[[f"time {t}, {name}" for name in names_of_views] for t in range(num_times)],
            view_names=names_of_views,
            image_sizes=[(height, width)] * num_views,
            source="images",
            _decode=decode,
        )


def check_layout(layout: str) -> None:
    """Refuse a layout that is not one."""
    if layout not in ("auto", "views", "times"):
        raise SceneError(f"layout must be 'auto', 'views' or 'times', got {layout!r}")


def refuse_layout(layout: str, what: str) -> None:
    """A layout means nothing where times and views are already told apart."""
    if layout != "auto":
        raise SceneError(
            f"layout={layout!r} (--as) is only for one folder of images or one video, and {what} is not; leave it out"
        )


def check_count(images: int, what: str, allow_single: bool) -> None:
    """Refuse a scene of one image, unless it is allowed."""
    if images == 1 and not allow_single:
        raise SceneError(
            f"{what}: one image only, and geometry comes from comparing images; add more, or pass allow_single=True "
            "(--allow-single)"
        )


def _shown_size(size: tuple[int, int]) -> str:
    """The width x height that people and image viewers speak of."""
    return f"{size[1]}x{size[0]}"


def _checked_pixels(images: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """uint8 [S,3,H,W] or [T,N,3,H,W], a copy, or a SceneError."""
    if not isinstance(images, (torch.Tensor, np.ndarray)):
        raise SceneError(
            f"images must be a torch tensor or a numpy array [T,N,3,H,W] or [S,3,H,W], got {type(images).__name__}"
        )
    if isinstance(images, np.ndarray):
        if images.dtype.kind not in "fiub":
            raise SceneError(f"images must be floating point in [0, 1] or uint8, got {images.dtype}")
        # Torch knows neither negative strides, foreign byte orders nor long doubles.
        plain = np.float64 if images.dtype.kind == "f" and images.itemsize > 4 else images.dtype.newbyteorder("=")
        tensor = torch.from_numpy(np.ascontiguousarray(images, dtype=plain))
    else:
        tensor = images.detach()
    shape = list(tensor.shape)
    if tensor.ndim not in (4, 5):
        remedy = "; take the batch apart first: images[0]" if tensor.ndim == 6 else ""
        raise SceneError(
            f"images must have shape [T,N,3,H,W] or [S,3,H,W], got {tensor.ndim} dimensions {shape}{remedy}"
        )
    if 0 in shape:
        raise SceneError(f"images must not be empty, got shape {shape}")
    if shape[-3] != 3:
        remedy = "; move the channels: images.movedim(-1, -3)" if shape[-1] == 3 else ""
        raise SceneError(f"images must have 3 channels (RGB) in dimension -3, got {shape[-3]} in shape {shape}{remedy}")
    if tensor.dtype == torch.uint8:
        return np.array(tensor.cpu().numpy())
    if not tensor.is_floating_point():
        raise SceneError(f"images must be floating point in [0, 1] or uint8, got {tensor.dtype}")
    tensor = tensor.to("cpu", torch.float32)
    bad = ~torch.isfinite(tensor)
    if bad.any():
        where = bad.nonzero()[0].tolist()
        raise SceneError(
            f"images must be finite, got {tensor[tuple(where)].item()} at index {where} "
            f"({int(bad.sum())} such value{'s' * (int(bad.sum()) != 1)}); replace them first"
        )
    low, high = tensor.min().item(), tensor.max().item()
    if low < -_RANGE_SLACK or high > 1 + _RANGE_SLACK:
        remedy = "divide by 255" if low >= 0 and high <= 255 + _RANGE_SLACK else "undo their normalisation"
        raise SceneError(f"images must be in [0, 1], got values from {low:g} to {high:g}; {remedy}")
    return tensor.clamp(0, 1).mul(255).round().to(torch.uint8).numpy()
