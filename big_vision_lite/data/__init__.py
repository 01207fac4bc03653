"""Sources, ops and the pipeline that turns them into global batches."""

import os

# 600 MB as RGB: above any camera, below what eight threads could not hold.
MAX_PIXELS = 200_000_000
# OpenCV reads its limit once, when it is imported: every file below comes later.
os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"] = str(MAX_PIXELS)
