"""Streams of a split: order, buffers filled ahead, splits that grow or are held in memory."""
