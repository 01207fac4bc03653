"""What is printed beside the program's output: its own warnings, no library's talk."""

import logging
import os
import sys
import warnings

from absl import logging as absl_logging

OURS = "big_vision_lite"


class _PlainLines(logging.Handler):
    """Prints "warning: ..." without time, thread and line of code."""

    def emit(self, record: logging.LogRecord) -> None:
        # sys.stderr as it is now: a live progress line keeps such lines above itself.
        print(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)


_PLAIN = _PlainLines(logging.WARNING)


def _is_foreign(record: logging.LogRecord) -> bool:
    return record.name.partition(".")[0] != OURS


def quiet() -> None:
    """Keeps libraries from talking over our own lines; may be called again."""
    # Not their errors either: Orbax logs the stack of every thread that a full disk
    # stops, and raises what we say in one message; the stack goes to the trace file.
    absl_logging.set_verbosity(absl_logging.FATAL)
    absl_logging.use_absl_handler()
    absl_logging.get_absl_handler().addFilter(_is_foreign)
    ours = logging.getLogger(OURS)
    ours.setLevel(logging.WARNING)  # the root's is now that of silence
    ours.addHandler(_PLAIN)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    # A cut or unwritable entry of the compile cache costs one compilation, no more.
    warnings.filterwarnings("ignore", message="Error .* persistent compilation cache")
