"""The cases of every format, a family a file: what tests/conversion/ compares.

A family is its file here, which nothing else names: `CASES` of models in a format, and
where there is more to try than they say, `OURS` that go out as folders. No file imports
another library before a model of it is built.
"""

import importlib
import pkgutil

from conversion_cases.case import Case, Ours

CASES: dict[str, Case] = {}
OURS: dict[str, Ours] = {}
for _, name, _ in pkgutil.iter_modules(__path__, f"{__name__}."):
    family = vars(importlib.import_module(name))
    for known, new in (
        (CASES, family.get("CASES", {})),
        (OURS, family.get("OURS", {})),
    ):
        assert not known.keys() & new.keys(), f"{name}: {known.keys() & new.keys()}"
        known.update(new)

# Models that come in, and those of each format whose weights are damaged.
THEIRS = {name: case for name, case in CASES.items() if case.build is not None}
WRITTEN = {case.form: case for case in CASES.values() if case.ours is not None}
# What runs by default: one of each way in which a format differs.
FEW_THEIRS = [name for name, case in THEIRS.items() if not case.slow]
FEW_OURS = [name for name, case in OURS.items() if not case.slow]
