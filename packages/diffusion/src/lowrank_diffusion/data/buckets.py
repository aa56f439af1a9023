"""Shapes that pictures are cut to: near their own, with the same number of pixels."""

import math

from lowrank_core.errors import UsageError
from lowrank_diffusion.data.picture import Size


def bucket_sizes(resolution: int, step: int, max_aspect: float) -> list[Size]:
    """Heights and widths in multiples of `step`, of at most `resolution` squared pixels, from tall to wide.

    Of the shapes within `max_aspect` those that fit into no other, and always the square.

    Raises:
        UsageError: not even a square of one step fits.
    """
    if step > resolution:
        raise UsageError(
            f"data.bucket_step is {step} and data.resolution {resolution}, so that no side is a multiple of the step; "
            "set data.bucket_step to at most data.resolution"
        )

    allowed: list[Size] = []
    for height in range(step, int(resolution * math.sqrt(max_aspect)) + 1, step):
        width = int(min(resolution**2 // height, max_aspect * height)) // step * step
        if width and height <= max_aspect * width:
            allowed.append((height, width))

    def fits_into_another(size: Size) -> bool:
        return any(size != other and size[0] <= other[0] and size[1] <= other[1] for other in allowed)

    square = resolution // step * step
    sizes = {size for size in allowed if not fits_into_another(size)} | {(square, square)}
    return sorted(sizes, key=lambda size: size[1] / size[0])


def nearest_bucket(size: Size, buckets: list[Size]) -> Size:
    """The bucket whose aspect has the smallest ratio to the picture's; of equals the one with more pixels."""

    def distance(bucket: Size) -> tuple[float, int]:
        apart = abs(math.log(bucket[1] * size[0] / (bucket[0] * size[1])))
        return round(apart, 12), -bucket[0] * bucket[1]

    return min(buckets, key=distance)
