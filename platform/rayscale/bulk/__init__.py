"""Many pictures at once: a folder or bucket in, a folder or bucket out, by an endpoint or by the model itself."""
