"""How hard the embedded world is to read and how far its demonstrations drift."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Difficulty:
    """Settings of the world; the default leaves a model trained on references alone below the ceiling.

    Attributes:
      hard: share of pictures whose state is faint (drawn with a contrast of `faintness`).
      faintness: (lowest, highest) contrast of a faint state; 1 is the clear drawing.
      distractors: most small shapes scattered over a picture.
      second_object: share of pictures with a small grey second object, which has no state and no bearing on the risk.
      cue: share of questions opened by a phrase that plays the danger down.
      long_steps: every step repeats object and person in a second sentence; paths grow by about a half.
      drift: factor on every chance of the drift process of the demonstrations (0: demonstrations are references).
    """

    hard: float = 0.25
    faintness: tuple[float, float] = (0.22, 0.4)
    distractors: int = 2
    second_object: float = 0.15
    cue: float = 0.4
    long_steps: bool = False
    drift: float = 1.0

    def __post_init__(self) -> None:
        for name in ("hard", "second_object", "cue"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"Difficulty.{name} is a share between 0 and 1, not {getattr(self, name)!r}")
        low, high = self.faintness
        if not 0 < low <= high <= 1:
            raise ValueError(f"Difficulty.faintness needs 0 < lowest <= highest <= 1, not {self.faintness!r}")
        if self.distractors < 0:
            raise ValueError(f"Difficulty.distractors is a count of 0 or more, not {self.distractors!r}")
        if self.drift < 0:
            raise ValueError(f"Difficulty.drift is a factor of 0 or more, not {self.drift!r}")


EASY = Difficulty(hard=0.0, distractors=0, second_object=0.0, cue=0.0)
"""Clear pictures without clutter, questions without cues."""
