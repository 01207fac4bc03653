"""Eight virtual CPU devices for all tests, and a compile cache of their own."""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# Not the user's cache: a test must not depend on what ran before it.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="bvl_test_cache_")
)
