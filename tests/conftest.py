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


def pytest_configure(config):
    # xdist would begin with the files that have most tests, and end with a few long
    # tests on one worker while the other has nothing left to do.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False
