"""Hosting promoted models over HTTP. Imports no torch, no model family, no recipe and no ray.train."""
