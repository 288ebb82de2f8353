"""Where compiled programs are kept, so that a command that starts again compiles nothing twice."""

import os
from pathlib import Path

import jax


def keep_compiled() -> None:
    """From now on on disk: in JAX_COMPILATION_CACHE_DIR, or ~/.cache/gopd_jax/xla."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", Path.home() / ".cache/gopd_jax/xla")
    jax.config.update("jax_compilation_cache_dir", str(cache))
