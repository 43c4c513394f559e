"""Caches looked after: checked, copied, cleaned."""
