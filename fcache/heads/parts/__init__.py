"""Parts that several heads share."""

from fcache.heads.parts.conv import ConvNormAct as ConvNormAct
from fcache.heads.parts.conv import resize as resize
from fcache.heads.parts.fpn import TopDown as TopDown
from fcache.heads.parts.norm import ChannelNorm as ChannelNorm
from fcache.heads.parts.ppm import PyramidPooling as PyramidPooling
