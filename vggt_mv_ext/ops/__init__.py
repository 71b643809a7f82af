"""The operators, one a file: public function, checks, registration with `torch.library`, autograd, autocast."""

from . import alternating_attention as _alternating_attention
from . import qk_norm_rope as _qk_norm_rope
from . import residual_scale_norm as _residual_scale_norm
from .alternating_attention import alternating_attention
from .qk_norm_rope import qk_norm_rope
from .residual_scale_norm import residual_scale_norm

OPERATORS = {
    module.OPERATOR.name: module.OPERATOR for module in (_alternating_attention, _qk_norm_rope, _residual_scale_norm)
}

__all__ = ["OPERATORS", "alternating_attention", "qk_norm_rope", "residual_scale_norm"]
