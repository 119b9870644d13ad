"""Shards of photos, the plan of a run over them, and how low resolution is made from high."""
