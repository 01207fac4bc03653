"""The data of a model that was trained elsewhere: its classes are known, no image."""

import dataclasses
from typing import Any, NoReturn, SupportsIndex

from big_vision_lite.data.content_hash import content_hash


@dataclasses.dataclass(kw_only=True)
class NoImages:
    """Names the classes of weights that came from `origin`; holds nothing to train on.

    To train on images of your own, start a recipe from the weights: --config.init.path.
    """

    classes: tuple[str, ...]
    origin: str

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.classes

    @property
    def fingerprint(self) -> str:
        return content_hash((self.origin, *self.classes))

    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        self._refuse()

    def name(self, index: SupportsIndex) -> str:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ValueError(
            f"The weights of {self.origin} came without images. Give a recipe its own "
            f"data and --config.init.path={self.origin}"
        )
