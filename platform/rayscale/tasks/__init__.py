"""One file per model family, pure torch."""
