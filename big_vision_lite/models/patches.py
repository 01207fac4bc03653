"""Images as sequences of patches."""

import flax.linen as nn
from jaxtyping import Array, Float, Num, Shaped

from big_vision_lite.models import flexi
from big_vision_lite.models.layers import Dtype, add_bias, product, scale_pixels


def grid_size(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """Returns (rows, columns) of patches; ValueError names sizes that divide."""
    if height % patch_size or width % patch_size or not (height and width):
        smaller, larger = (
            "x".join(
                str(
                    max(1, side // patch_size + more * bool(side % patch_size))
                    * patch_size
                )
                for side in (height, width)
            )
            for more in (0, 1)
        )
        raise ValueError(
            f"An image of {height}x{width} px does not divide into patches of "
            f"{patch_size} px; resize to {smaller} or {larger}, or change "
            "model.patch_size."
        )
    return height // patch_size, width // patch_size


def patchify(
    image: Shaped[Array, "B H W C"], patch_size: int
) -> Shaped[Array, "B h w P"]:
    """Cuts images into h x w patches of P = patch_size**2 * C values each."""
    batch, height, width, channels = image.shape
    rows, columns = grid_size(height, width, patch_size)
    x = image.reshape(batch, rows, patch_size, columns, patch_size, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, rows, columns, patch_size * patch_size * channels)


class PatchEmbedding(nn.Module, kw_only=True):
    """Projects every patch to a token: a convolution with stride = kernel size.

    The kernel has the layout of that convolution, [p, p, C, D]; the product is a
    matrix product, which every backend does best. With `kernel_patch_size` p is that,
    and the kernel is resized to `patch_size` at every use (FlexiViT). With `mean` and
    `std` it takes pixels, and scales them first.
    """

    patch_size: int
    width: int
    dtype: Dtype = Dtype.FLOAT32
    kernel_patch_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @nn.compact
    def __call__(self, image: Num[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        side = self.kernel_patch_size or self.patch_size
        shape = (side, side, image.shape[-1], self.width)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.width,))
        if self.mean is not None and self.std is not None:
            image = scale_pixels(image, self.mean, self.std)
        patches = patchify(image, self.patch_size).astype(self.dtype)
        kernel = flexi.resize_kernel(kernel, self.patch_size)
        kernel = kernel.reshape(-1, self.width).astype(self.dtype)
        return add_bias(product(patches, kernel), bias)
