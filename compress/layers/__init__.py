"""What passes leave in the model: layers whose forward is written in ops that every exporter can lower."""

from compress.layers.absent import Absent
from compress.layers.attention import SplitAttention, split_attention
from compress.layers.binary import BinaryActivation, BinaryCodes, BinaryConv2d, BinaryLinear
from compress.layers.binary_products import BinaryProducts
from compress.layers.cast import CastConv2d, CastEmbedding, CastLinear
from compress.layers.channel_affine import ChannelAffine
from compress.layers.faded_activation import FadedActivation
from compress.layers.hash_attention import HashedAttention
from compress.layers.linear_attention import LinearAttention
from compress.layers.packed import Packed, PackedPart
from compress.layers.plain import Conv2d, Identity, Linear, PlainNorm, Sequence
from compress.layers.quantized import ActivationGrid, Codes, QuantConv2d, QuantEmbedding, QuantLinear, is_quantized
from compress.layers.token_reducer import TokenIds, TokenReducer
from compress.layers.topk_attention import TopKAttention

__all__ = [
    "Absent",
    "ActivationGrid",
    "BinaryActivation",
    "BinaryCodes",
    "BinaryConv2d",
    "BinaryLinear",
    "BinaryProducts",
    "CastConv2d",
    "CastEmbedding",
    "CastLinear",
    "ChannelAffine",
    "Codes",
    "Conv2d",
    "FadedActivation",
    "HashedAttention",
    "Identity",
    "Linear",
    "LinearAttention",
    "Packed",
    "PackedPart",
    "PlainNorm",
    "QuantConv2d",
    "QuantEmbedding",
    "QuantLinear",
    "Sequence",
    "SplitAttention",
    "TokenIds",
    "TokenReducer",
    "TopKAttention",
    "is_quantized",
    "split_attention",
]
