"""Sources, ops and the pipeline that turns them into global batches."""

import os

# 600 MB as RGB: above any camera, below what eight threads could not hold.
MAX_PIXELS = 200_000_000
# Set before any file of this package imports OpenCV, which reads its limit only then.
os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"] = str(MAX_PIXELS)
