"""Presets: a run's settings by method, each a file with get_config(arg)."""
