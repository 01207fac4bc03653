"""Eight virtual CPU devices for all tests, and a compile cache of their own."""

import os
import tempfile

# Set, not proposed: with fewer devices half of the tests would prove nothing.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# Not the user's cache: a test must not depend on what ran before it.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="bvl_test_cache_")
)
