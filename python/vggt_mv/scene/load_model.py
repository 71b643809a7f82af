"""A model that is ready to reconstruct: from a weights file, or random on request and labelled so."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from vggt_mv.errors import VggtMvError
from vggt_mv.models.base import VGGTBase
from vggt_mv.models.configs import CONFIGS, Config, build_model, load_config
from vggt_mv.scene.reconstruct import resolve_device
from vggt_mv.weights import WeightsProvenance, build_from_weights, open_weights, set_provenance
from vggt_mv.weights.files import WeightsFile
from vggt_mv.weights.rules import detect

DEFAULT_CONFIG = "vggt_mv_1b"
_CONFIG_OF_FAMILY = {"page4d": "page4d_1b", "vggt_mv": "vggt_mv_1b", "pi3": "vggt_mv_1b"}
# VGGT's weights lack the mask head: without it a VGGT_MV computes the same as a VGGT, and takes grids as well.
_VGGT_ON_GRIDS = {"class": "VGGT_MV", "enable_spatial_mask": False}
# What a single-stream file lacks for a dual-stream model, and what has initial values that mean something.
_NEW_SCALARS = ("aggregator.lambda_pose_logit", "aggregator.lambda_geo_logit")


def load_model(
    weights: str | Path | None = None,
    *,
    config: Config | None = None,
    options: Mapping[str, Any] | None = None,
    random_weights: bool = False,
    seed: int = 0,
    device: str | torch.device = "auto",
    progress: Callable[[str, int, int], None] | None = None,
) -> VGGTBase:
    """Build a model in evaluation mode, with float32 parameters on a device.

    Args:
        weights: a file, a folder, a shard index or a hub id, see ``vggt_mv.weights.open_weights``. It must fill the
            whole model and be used up, unless ``random_weights``.
        config: a name of ``vggt_mv.models.configs.CONFIGS``, a JSON file or a dict. By default what the weights are
            for, see ``choose_config``; without weights ``"vggt_mv_1b"``.
        options: arguments of the model that go before those of the configuration: ``{"enable_dual_stream": True}``. The
            streams of a new dual stream start as copies of the single stream that a file has.
        random_weights: let weights that no file fills have random values. The model's provenance is "random" then, and
            all that it makes is labelled.
        seed: of the random values; torch's own generator stays as it is.
        device: "auto" is a GPU if there is one.
        progress: called with (stage, bytes done, bytes in all) while a file is loaded.

    Raises:
        VggtMvError: no weights, weights of another model, an unknown configuration or device.

    Example:
        >>> model = load_model(config="vggt_mv_demo", random_weights=True, device="cpu")
        >>> sum(parameter.numel() for parameter in model.parameters()) < 6e6
        True
    """
    place = resolve_device(device)
    if weights is None:
        if not random_weights:
            raise VggtMvError(
                "no weights: name a file, folder or hub id with --weights (weights=...), or try the program out with "
                "--random-weights (random_weights=True), whose numbers mean nothing"
            )
        chosen = choose_config(None, config)
        kind = chosen if isinstance(chosen, str) else "custom"
        kind = " with ".join([kind, *([_shown_options(options)] if options else [])])
        wanted = with_options(chosen, options)
        model = _seeded(seed, place, lambda: build_model(wanted, device=place))
        set_provenance(model, WeightsProvenance("random", f"random weights, config {kind}, seed {seed}"))
        return model
    file = open_weights(weights)
    chosen = with_options(choose_config(file, config), options)
    new_streams = bool((options or {}).get("enable_dual_stream"))

    def build() -> VGGTBase:
        return build_model(chosen)

    model, report = _seeded(
        seed,
        place,
        lambda: build_from_weights(
            build,
            file,
            strict=not (random_weights or new_streams),
            device=place,
            dtype=torch.float32,
            progress=progress,
        ),
    )
    if not random_weights and new_streams:
        if {entry.target_key for entry in report.kept()} <= set(_NEW_SCALARS) and not report["unexpected"]:
            return model.eval()
        report.raise_unless_strict()
    left = report["model_tensors"] - report.filled()
    if left:
        text = f"{left} of {report['model_tensors']} tensors random (seed {seed}), the others from {weights}"
        set_provenance(model, WeightsProvenance("random", text, (str(weights),)))
    return model.eval()


def choose_config(weights: str | Path | WeightsFile | None, config: Config | None = None) -> Config:
    """The configuration that ``load_model`` builds: the one named, else that of the weights.

    That is the one of their family, with what a config.json beside them says.

    Raises:
        VggtMvError: an unknown name or option, or weights that cannot be opened.
    """
    if config is not None:
        load_config(config)  # raises
        return config
    if weights is None:
        return DEFAULT_CONFIG
    file = weights if isinstance(weights, WeightsFile) else open_weights(weights)
    family = detect(file.tensors, file.metadata).family
    if family is None:
        # Of another model altogether: the loader will say so, and name what it is nearest to.
        return DEFAULT_CONFIG
    of_family = CONFIGS[_CONFIG_OF_FAMILY[family]] if family in _CONFIG_OF_FAMILY else _VGGT_ON_GRIDS
    of_family = {**of_family, **_extra_parts(file)}
    beside = {path.parent / "config.json" for path in file.files}
    if len(beside) != 1 or not (path := beside.pop()).is_file():
        return of_family
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VggtMvError(f"{path} cannot be read ({error}); mend it, or name a configuration with --config") from error
    if not isinstance(values, dict):
        raise VggtMvError(f"{path} must hold a JSON object, got {type(values).__name__}; name one with --config")
    return {**of_family, **values}


def _extra_parts(file: WeightsFile) -> dict[str, Any]:
    """The options whose parts a file of weights holds: a dual stream, a memory bank."""
    parts = {"pose_frame_blocks": "enable_dual_stream", "memory_tokens": "enable_sparse_global"}
    return {
        option: True
        for part, option in parts.items()
        if any(name.split(".")[0] == part or f".{part}" in name for name in file.tensors)
    }


def with_options(config: Config, options: Mapping[str, Any] | None) -> Config:
    """A configuration with further arguments that go before its own.

    Raises:
        VggtMvError: an unknown name, or a configuration that cannot be read.

    Example:
        >>> with_options("vggt_mv_1b", {"enable_dual_stream": True})["enable_dual_stream"]
        True
    """
    if not options:
        return config
    model_class, arguments = load_config(config)
    merged = {"class": model_class.__name__, **arguments, **options}
    load_config(merged)  # raises
    return merged


def _shown_options(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items())


def _seeded(seed: int, device: torch.device, make: Callable[[], Any]) -> Any:
    """What ``make`` returns, with torch's generators seeded meanwhile."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        return make()
