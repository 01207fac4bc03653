"""Eight virtual CPU devices for all tests, how they compile, and counts."""

import importlib.metadata
import importlib.util
import os
import pathlib

import compiling
import pytest

# Set, not proposed: with fewer devices half of the tests would prove nothing.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# Most of the time of most tests is compilation.
os.environ[compiling.QUICKLY] = "1"
# Not the user's cache. Programs are found again by all that decides what they become,
# so that a test does not depend on what ran before it.
CACHE = f".pytest_cache/xla-{importlib.metadata.version('jax')}"
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / CACHE)
)
# The small programs, too: there are thousands of them.
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# As in every program: the package says how large an image may be before OpenCV starts.
importlib.import_module("big_vision_lite.data")


@pytest.fixture
def optimised():
    """Compiles as users do, here and in the processes that the test starts."""
    with compiling.well():
        yield


@pytest.fixture(scope="module")
def module_optimised():
    """Compiles as users do in all of a file."""
    with compiling.well():
        yield


@pytest.fixture(autouse=True)
def compiled_anew(request):
    """Keeps nothing for devices that are not there: it could not be read again."""
    if "compilers" not in request.keywords:
        yield
        return
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


def pytest_addoption(parser):
    parser.addoption(
        "--at_least",
        type=int,
        default=0,
        metavar="N",
        help="fail where fewer tests passed: what is not collected fails nowhere",
    )


def pytest_configure(config):
    # xdist would begin with the files that have most tests, and end with a few long
    # tests on one worker while the other has nothing left to do.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    if hasattr(session.config, "workerinput"):
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    passed = len(reporter.stats.get("passed", ()))
    complaints = []
    if passed < session.config.getoption("at_least"):
        wanted = session.config.getoption("at_least")
        complaints.append(f"{passed} tests passed, --at_least={wanted} were to")
    if importlib.util.find_spec("torch"):
        skipped = reporter.stats.get("skipped", ())
        missed = [r.nodeid for r in skipped if "parity" in r.keywords]
        if missed:
            complaints.append(f"torch is there, but these were skipped: {missed}")
    for complaint in complaints:
        print(f"\nerror: {complaint}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
