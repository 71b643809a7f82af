"""`from_pretrained` and `save_pretrained`: config.json and weights in a folder or on the Hugging Face Hub.

huggingface_hub's mixin reads and writes the configuration and talks to the Hub. Its own loading is not strict: a
checkpoint that matches nothing leaves a random model. So reading and writing tensors is `vggt_mv.weights`' part.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vggt_mv.errors import VggtMvError
from vggt_mv.weights.mixin import PretrainedWeightsMixin

if TYPE_CHECKING:
    from huggingface_hub import PyTorchModelHubMixin
else:
    try:
        from huggingface_hub import PyTorchModelHubMixin
    except ImportError:

        class PyTorchModelHubMixin:
            """Stands in where huggingface_hub is not installed, and says so when asked to load or save."""

            def __init_subclass__(cls, **kwargs: Any) -> None:
                super().__init_subclass__()

            @classmethod
            def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
                raise ImportError("from_pretrained needs huggingface_hub: pip install huggingface_hub")

            def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
                raise ImportError("save_pretrained needs huggingface_hub: pip install huggingface_hub")


__all__ = ["PretrainedModel"]


class PretrainedModel(PretrainedWeightsMixin, PyTorchModelHubMixin):
    """A module that can be saved to a folder and built from one, with an account of every tensor."""

    #: The options that the model was built with, as far as the class notes them; config.json has to hold them.
    _options: dict[str, Any]

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:
        """Writes config.json, model.safetensors and a model card; arguments as in huggingface_hub.

        Raises:
            VggtMvError: the model was built with an option that JSON cannot hold, so that it could not be built again.
        """
        for name, value in self._options.items():
            if not _is_json(value):
                raise VggtMvError(
                    f"save_pretrained: {name} must be a value that config.json can hold, got {type(value).__name__}; "
                    "save state_dict() instead"
                )
        url: str | None = super().save_pretrained(save_directory, **kwargs)
        return url


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
