"""Versions of models: `models` keeps them (a home of MLflow), `gate` decides which may be champion."""
