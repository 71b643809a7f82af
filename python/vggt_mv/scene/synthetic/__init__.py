"""A small ray-cast world with exact ground truth: images to try everything on, and numbers to measure against."""

from vggt_mv.scene.synthetic.scene import SyntheticScene, synthetic_scene

__all__ = ["SyntheticScene", "synthetic_scene"]
