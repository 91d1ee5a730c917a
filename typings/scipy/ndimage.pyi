# The functions of scipy.ndimage that are used; scipy ships no types.
from typing import Any

import numpy as np
from numpy.typing import NDArray

def binary_dilation(input: NDArray[np.bool_]) -> NDArray[np.bool_]: ...
def label(
    input: NDArray[np.bool_], structure: NDArray[Any] | None = None
) -> tuple[NDArray[np.int32], int]: ...
def maximum_filter(input: NDArray[np.float32], size: int) -> NDArray[np.float32]: ...
