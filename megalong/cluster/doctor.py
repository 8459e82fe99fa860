"""`megalong doctor`: what is installed here, and which implementations a run would use."""

from megalong.model.implementations import of_this_machine
from megalong.runtime.doctor import report


def doctor() -> None:
    """Print one line for each package, device and choice; nothing missing or broken makes it fail."""
    for name, text in [*report(), *of_this_machine()]:
        print(f"{name:<20}{text}")
