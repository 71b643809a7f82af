"""The one base of every error that bad user input causes."""


class VggtMvError(ValueError):
    """Bad input: the message is one line that names the thing, the rule, what was given, and the remedy.

    The command line prints the message and exits with code 2; nothing has been written by then.
    """


class SceneError(VggtMvError):
    """Bad input to a scene: images, videos, folders of them, and the sizes that the network takes."""
