"""The one error about bytes that are no usable picture."""

from big_vision_lite.data import MAX_PIXELS


class UndecodableImage(ValueError):
    """These bytes are complete as stored, but no usable image; `reason` says why.

    The one error that the pipeline answers by skipping the example and counting it.
    """

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason

    def __reduce__(self):  # Survives the way back from a worker process.
        return type(self), (self.reason,)


def check_pixels(height: int, width: int, what: str) -> None:
    """Raises UndecodableImage for a picture that would not fit into memory."""
    if height < 1 or width < 1:
        raise UndecodableImage(f"{what} has no pixels: {height} x {width}")
    if height * width > MAX_PIXELS:
        raise UndecodableImage(
            f"{what} has {height} x {width} = {height * width:,} pixels, above the "
            f"limit of {MAX_PIXELS:,}; store it smaller"
        )
