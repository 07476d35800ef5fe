"""What the heads of `base_ear` are told of a clip's frames: columns of int16 [T, 8].

    HEARD    phones of the user, one in each half of a frame
    SPOKEN   phones of the agent
    LOOKED   the places that read the first and the one behind the last of the pieces that sound
    ASKED    what the user has just done by what was said (`ask/price`, `greet` …)
    TOLD     the question that the prompt has just answered

`IGNORED` where there is nothing to tell. Shapes: T frames, those of the prompt included.
"""

from __future__ import annotations

import numpy as np

from training.pocket.codec_labels import HALVES, IGNORED

HEARD = slice(0, HALVES)
SPOKEN = slice(HEARD.stop, HEARD.stop + HALVES)
LOOKED = slice(SPOKEN.stop, SPOKEN.stop + 2)
ASKED = slice(LOOKED.stop, LOOKED.stop + 1)
TOLD = slice(ASKED.stop, ASKED.stop + 1)
COLUMNS = {"phones": HEARD, "spoken": SPOKEN, "looked": LOOKED, "asked": ASKED, "told": TOLD}
NUM_COLUMNS = TOLD.stop


def no_labels(num_frames: int) -> np.ndarray:
    """int16 [T, 8] of frames of which nothing is told."""
    return np.full((num_frames, NUM_COLUMNS), IGNORED, dtype=np.int16)
