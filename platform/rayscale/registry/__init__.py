"""Versions of models: `models` keeps them, `gate` decides which may be champion, `journal` moves the aliases."""
