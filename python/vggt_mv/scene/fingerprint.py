"""What the results of a run depend on: one that was stopped goes on only where all of it is the same."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
from torch import Tensor, nn

import vggt_mv_ext
from vggt_mv.scene.session import Session
from vggt_mv.weights import provenance_of

__all__ = ["fingerprint_of"]

# Values of each tensor that tell one model's weights from another's.
_WEIGHT_SAMPLES = 1024


def fingerprint_of(session: Session, plan: list[range], carry_memory: bool) -> dict[str, str]:
    """What the results of windows depend on, by name: input, options, weights, device, version.

    Of the images, the names, sizes, times and the first time's pixels; of the weights, some values of every tensor.
    """
    scene, run, model = session.scene, session.run, session.model
    first = hashlib.blake2b(digest_size=16)
    for image in itertools.islice(scene.images(), scene.num_views):
        first.update(image.tobytes())
    names = hashlib.blake2b(repr((scene.names, scene.view_names, scene.times)).encode(), digest_size=16)
    mask = session.dynamic_mask
    if isinstance(mask, Tensor | np.ndarray):
        values = np.ascontiguousarray(mask.detach().cpu().numpy() if isinstance(mask, Tensor) else mask)
        mask = hashlib.blake2b(values.data, digest_size=16).hexdigest()
    return {
        "input": f"{scene.source} ({scene.describe()}); names {names.hexdigest()}, first images {first.hexdigest()}",
        "masks": str(mask),
        "windows": repr([(times.start, times.stop) for times in plan]) if len(plan) < 3 else repr((plan[0], plan[1])),
        "memory carry": str(carry_memory),
        "attention": session.attention["used"],
        "preprocessing": f"{session.mode}, {list(session.network_size)}",
        "dtype": str(run.dtype),
        "device": str(run.device),
        "model": f"{type(model).__name__} {sorted(getattr(model, '_options', {}).items(), key=str)}",
        "weights": f"{provenance_of(model).description}; {_digest(model)}",
        "version": vggt_mv_ext.__version__,
    }


def _digest(model: nn.Module) -> str:
    """Of the names and shapes of all tensors and of some values of each: reading every value would take long."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _WEIGHT_SAMPLES)].float().cpu().numpy()
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(np.ascontiguousarray(sample).data)
    return digest.hexdigest()
