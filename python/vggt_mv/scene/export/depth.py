"""depth/*.png and overview.png: depth for the eye. The numbers are in predictions.npz."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

if TYPE_CHECKING:
    from vggt_mv.scene.reconstruction import Reconstruction

RANDOM_LABEL = "RANDOM WEIGHTS - meaningless"
_GREY = (110, 110, 110)  # no depth here: padding, or not finite
_LABEL_BACKGROUND = (170, 20, 20)
_OVERVIEW_LINES, _OVERVIEW_FRAMES, _OVERVIEW_COLUMNS = 6, 16, 4
_OVERVIEW_CELL = 260  # pixels wide at most


@functools.cache
def color_map() -> NDArray[np.uint8]:
    """[256, 3] uint8: near black over violet, red and orange to bright yellow, its lightness rising evenly to the eye.

    Drawn in OKLab (Ottosson 2020): lightness and hue linear in the index, chroma highest in the middle. All of it lies
    inside of sRGB, so that nothing is clipped and lightness stays linear.
    """
    s = np.linspace(0.0, 1.0, 256)
    lightness = 0.18 + 0.75 * s
    hue = np.deg2rad(285.0 + 170.0 * s)
    chroma = 0.07 + 0.03 * s + 0.09 * np.sin(np.pi * s)
    a, b = chroma * np.cos(hue), chroma * np.sin(hue)
    cone = np.stack(
        [
            lightness + 0.3963377774 * a + 0.2158037573 * b,
            lightness - 0.1055613458 * a - 0.0638541728 * b,
            lightness - 0.0894841775 * a - 1.2914855480 * b,
        ]
    )
    to_linear_rgb = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = np.clip(to_linear_rgb @ cone**3, 0.0, 1.0)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.asarray(np.round(255 * srgb.T), dtype=np.uint8)


def depth_range(depth: NDArray[np.floating], valid: NDArray[np.bool_] | None = None) -> tuple[float, float]:
    """(near, far): the 2nd and 98th percentile of what is finite, above 0 and valid; (1, 1) if nothing is."""
    usable = np.isfinite(depth) & (depth > 0)
    if valid is not None:
        usable &= valid
    if not usable.any():
        return 1.0, 1.0
    near, far = np.percentile(depth[usable], [2, 98])
    return float(near), float(far)


def depth_to_rgb(
    depth: NDArray[np.floating], near: float, far: float, valid: NDArray[np.bool_] | None = None
) -> NDArray[np.uint8]:
    """Colour a depth map: near is bright, far is dark, linear in ``1 / depth``; grey where there is no depth.

    Args:
        depth: [H, W].
        near, far: depths of the brightest and the darkest colour, clamped beyond.
        valid: [H, W]; False is grey.

    Returns:
        [H, W, 3] uint8.
    """
    usable = np.isfinite(depth) & (depth > 0)
    if valid is not None:
        usable &= valid
    inverse = 1.0 / np.where(usable, depth, 1.0).astype(np.float64)
    span = 1.0 / near - 1.0 / far
    # A constant depth (or one beyond float precision) has no contrast to show: the middle of the map.
    level = (inverse - 1.0 / far) / span if span > 1e-12 / near else np.full(depth.shape, 0.5)
    rgb = color_map()[np.round(255 * np.clip(level, 0.0, 1.0)).astype(np.int64)]
    return np.where(usable[..., None], rgb, np.array(_GREY, dtype=np.uint8))


def preview_names(names: list[list[str]]) -> list[list[str]]:
    """File names for previews: an image's own name, made safe for any file system, each once.

    Example:
        >>> preview_names([["time_00/view0.png", "time_00/view1.png"]])
        [['time_00_view0.png', 'time_00_view1.png']]
    """
    used: set[str] = set()
    result = []
    for t, row in enumerate(names):
        safe_row = []
        for n, name in enumerate(row):
            stem = re.sub(r"\.(png|jpe?g|webp|bmp|tiff?)$", "", name, flags=re.IGNORECASE)
            safe = re.sub(r"[^\w.-]+", "_", stem).strip("._")[:100] or "frame"
            # Compared without case: some file systems know none.
            if safe.lower() in used:
                safe = f"{safe}_t{t}_v{n}"
            used.add(safe.lower())
            safe_row.append(f"{safe}.png")
        result.append(safe_row)
    return result


def write_depth_previews(
    reconstruction: Reconstruction, folder: Path, *, on_file: Callable[[], None] | None = None
) -> None:
    """Write one coloured depth map per frame, at network resolution, named after its image.

    All frames share one range of depth, so that they can be compared.
    """
    if reconstruction.depth is None:
        raise ValueError("write_depth_previews: the reconstruction has no depth")
    folder.mkdir()
    valid = reconstruction.valid_pixels()
    near, far = depth_range(reconstruction.depth, valid)
    names = preview_names(reconstruction.names)
    for t in range(reconstruction.num_times):
        for n in range(reconstruction.num_views):
            rgb = depth_to_rgb(reconstruction.depth[t, n], near, far, valid[t, n])
            save_picture(Image.fromarray(rgb), folder / names[t][n], reconstruction)
            if on_file is not None:
                on_file()


def write_overview(
    reconstruction: Reconstruction,
    path: Path,
    *,
    rows: list[list[tuple[int, int]]] | None = None,
    near_far: tuple[float, float] | None = None,
) -> None:
    """Write one sheet of images above their depth maps, an even choice of them where there are many.

    Rows are times and columns views, or the other way round where there are more times: sheets are wide, not tall. A
    single row wraps.

    Args:
        rows: (time, view) of the cells, by default those of ``overview_rows``.
        near_far: range of depth, by default that of the reconstruction.
    """
    rows = overview_rows(reconstruction.num_times, reconstruction.num_views) if rows is None else rows
    valid = reconstruction.valid_pixels()
    if near_far is None:
        near_far = (1.0, 1.0) if reconstruction.depth is None else depth_range(reconstruction.depth, valid)
    near, far = near_far
    height, width = reconstruction.network_size
    scale = min(1.0, _OVERVIEW_CELL / width)
    cell = (max(1, round(width * scale)), max(1, round(height * scale)))
    gap, caption = 6, 16
    pictures = 1 if reconstruction.depth is None else 2
    row_height = caption + pictures * (cell[1] + 2) + gap
    sheet = Image.new("RGB", (gap + len(rows[0]) * (cell[0] + gap), gap + len(rows) * row_height), (24, 24, 28))
    draw, font = ImageDraw.Draw(sheet), _font(11)
    for i, row in enumerate(rows):
        for j, (t, n) in enumerate(row):
            x, y = gap + j * (cell[0] + gap), gap + i * row_height
            draw.text((x, y), _fit(draw, reconstruction.names[t][n], font, cell[0]), fill=(225, 225, 225), font=font)
            picture = Image.fromarray(reconstruction.images[t, n])
            sheet.paste(picture.resize(cell, Image.Resampling.LANCZOS), (x, y + caption))
            if reconstruction.depth is not None:
                rgb = depth_to_rgb(reconstruction.depth[t, n], near, far, valid[t, n])
                below = y + caption + cell[1] + 2
                sheet.paste(Image.fromarray(rgb).resize(cell, Image.Resampling.LANCZOS), (x, below))
    save_picture(sheet, path, reconstruction)


def overview_rows(num_times: int, num_views: int) -> list[list[tuple[int, int]]]:
    """The (time, view) of the cells of the overview."""
    times, views = _even_choice(num_times, _OVERVIEW_LINES), _even_choice(num_views, _OVERVIEW_LINES)
    if min(num_times, num_views) == 1:
        count = num_times * num_views
        frames = [divmod(i, num_views) for i in _even_choice(count, _OVERVIEW_FRAMES)]
        columns = min(count, _OVERVIEW_COLUMNS)
        return [frames[i : i + columns] for i in range(0, len(frames), columns)]
    if num_times > num_views:
        return [[(t, n) for t in times] for n in views]
    return [[(t, n) for n in views] for t in times]


def _even_choice(count: int, at_most: int) -> list[int]:
    """At most ``at_most`` indices below ``count``, evenly spread, the first and the last among them."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, at_most)).tolist()})


def _fit(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    """The end of a text that fits a width: names differ at their end."""
    while len(text) > 1 and draw.textlength(text, font=font) > width:
        text = text[1:]
    return text


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    try:
        return ImageFont.load_default(size)
    except (TypeError, ImportError, OSError):  # Pillow before 10.1, or without FreeType: one fixed size
        return ImageFont.load_default()


def save_picture(picture: Image.Image, path: Path, reconstruction: Reconstruction) -> None:
    """Save as PNG; with random weights under a strip that says so, and with the same in its metadata."""
    from vggt_mv.scene.reconstruction import RANDOM_WEIGHTS_NOTE

    info = PngInfo()
    info.add_text("Weights", reconstruction.weights.description.encode("latin-1", "replace").decode("latin-1"))
    if reconstruction.random_weights:
        info.add_text("Comment", RANDOM_WEIGHTS_NOTE)
        picture = _labelled(picture, RANDOM_LABEL)
    picture.save(path, pnginfo=info)


def _labelled(picture: Image.Image, label: str) -> Image.Image:
    """The picture with a strip below it that carries a label, wrapped to the picture's width."""
    draw, font = ImageDraw.Draw(picture), _font(13)
    lines, line_height, margin = [""], 16, 3
    for word in label.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and draw.textlength(longer, font=font) > picture.width - 2 * margin:
            lines.append(word)
        else:
            lines[-1] = longer
    result = Image.new("RGB", (picture.width, picture.height + line_height * len(lines) + margin), _LABEL_BACKGROUND)
    result.paste(picture, (0, 0))
    draw = ImageDraw.Draw(result)
    for i, line in enumerate(lines):
        draw.text((margin, picture.height + 1 + i * line_height), line, fill=(255, 255, 255), font=font)
    return result
