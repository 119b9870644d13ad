"""Rayscale: from a bucket of high-resolution photos to quality-gated image endpoints, on Ray end to end."""

__version__ = "0.1.0"
