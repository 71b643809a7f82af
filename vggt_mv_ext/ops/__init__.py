"""The operators, one a file: public function, checks, registration with `torch.library`, autograd, autocast."""

from . import alternating_attention as _alternating_attention
from . import block_dilated_attention as _block_dilated_attention
from . import conv3x3 as _conv3x3
from . import dual_stream_attention as _dual_stream_attention
from . import landmark_attention as _landmark_attention
from . import memory_read as _memory_read
from . import memory_write as _memory_write
from . import packed_linear as _packed_linear
from . import qk_norm_rope as _qk_norm_rope
from . import residual_scale_norm as _residual_scale_norm
from .alternating_attention import alternating_attention
from .block_dilated_attention import block_dilated_attention
from .conv3x3 import conv3x3
from .dual_stream_attention import dual_stream_attention
from .landmark_attention import landmark_attention
from .memory_read import memory_read
from .memory_write import memory_write
from .packed_linear import cannot_pack_linear_weight, linear_product_dtype, pack_linear_weight, packed_linear
from .qk_norm_rope import qk_norm_rope
from .residual_scale_norm import residual_scale_norm

OPERATORS = {
    module.OPERATOR.name: module.OPERATOR
    for module in (
        _alternating_attention,
        _block_dilated_attention,
        _conv3x3,
        _dual_stream_attention,
        _landmark_attention,
        _memory_read,
        _memory_write,
        _packed_linear,
        _qk_norm_rope,
        _residual_scale_norm,
    )
}

__all__ = [
    "OPERATORS",
    "alternating_attention",
    "block_dilated_attention",
    "cannot_pack_linear_weight",
    "conv3x3",
    "dual_stream_attention",
    "landmark_attention",
    "linear_product_dtype",
    "memory_read",
    "memory_write",
    "pack_linear_weight",
    "packed_linear",
    "qk_norm_rope",
    "residual_scale_norm",
]
