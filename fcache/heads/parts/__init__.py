"""Parts that several heads share."""

from fcache.heads.parts.adaptors import SimpleAdaptors as SimpleAdaptors
from fcache.heads.parts.adaptors import adapted_levels as adapted_levels
from fcache.heads.parts.bifpn import BiFPN as BiFPN
from fcache.heads.parts.conv import ConvNormAct as ConvNormAct
from fcache.heads.parts.conv import classifier as classifier
from fcache.heads.parts.conv import resize as resize
from fcache.heads.parts.fcn import FCN as FCN
from fcache.heads.parts.fpn import TopDown as TopDown
from fcache.heads.parts.levels import find_level as find_level
from fcache.heads.parts.norm import ChannelNorm as ChannelNorm
from fcache.heads.parts.ppm import PyramidPooling as PyramidPooling
from fcache.heads.parts.upernet import UPERNET_OPTIONS as UPERNET_OPTIONS
from fcache.heads.parts.upernet import UPerNet as UPerNet
