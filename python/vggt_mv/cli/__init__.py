"""The command `vggt-mv`: one file a command, each thin over a function of `vggt_mv` that does the same.

typer and rich are imported here only, and torch only by the commands that need it, so that `vggt-mv --help` is quick
and `import vggt_mv` needs neither typer nor rich.
"""
