"""Each module has one name: `loopscope.models...`, never `models...`."""

from __future__ import annotations


def refuse_second_name(package: str) -> None:
    """Raise if a folder of a checkout is being imported as a package of its own, which would be a
    second copy of the code.

    Args:
        package: `__name__` of the package that asks.

    Raises:
        ImportError: It was not imported as `loopscope.<folder>`.
    """
    if not package.startswith("loopscope."):
        raise ImportError(
            f"the code of {package!r} is imported as 'loopscope.{package}', so that there is one"
            f" copy of it; write 'from loopscope.{package} import ...'"
        )
