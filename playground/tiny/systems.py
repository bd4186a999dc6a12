"""What the tiny world asks of each system: its stages, the template of its questions, and the figures to reach."""

from typing import NamedTuple

LLAVA = "llava"


class System(NamedTuple):
    """A system on the digits; figures are fractions of 1."""

    stages: tuple[str, ...]
    template: str
    min_image: float  # of direct questions together
    min_kind: float = 0.0  # of each direct kind
    min_sound: float | None = None  # of questions about a sound
    has_experts: bool = False


SYSTEMS = {
    LLAVA: System(("stage1", "stage2", "stage3"), "v1", min_image=0.90, min_kind=0.80, has_experts=True),
    "adapter": System(("stage1", "stage2"), "alpaca", min_image=0.80),
    "imagebind": System(("stage1", "stage2"), "alpaca", min_image=0.85, min_sound=0.60),
    "accessory": System(("stage1", "stage2"), "alpaca", min_image=0.90, min_kind=0.80),
}
