"""fcache caches the features of frozen vision backbones and trains heads from the cache."""

__version__ = "0.1.0"
