"""What a user has (folders, images, videos, tensors) as one thing: a Scene of T times x N views."""

from vggt_mv.scene.sources.opening import open_scene
from vggt_mv.scene.sources.scene import Scene

__all__ = ["Scene", "open_scene"]
