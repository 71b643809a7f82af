"""Pose encodings, rotations, geometry, and image loading."""
