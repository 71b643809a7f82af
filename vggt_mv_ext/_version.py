"""The version of both packages, `vggt_mv_ext` and `vggt_mv`; the build reads it from here."""

__version__ = "0.1.0"
