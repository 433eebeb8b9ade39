"""The console script: `loopscope` or `python -m loopscope`."""

from __future__ import annotations

import sys

from loopscope import __version__


def main() -> None:
    """Print the version, or run the command line of `loopscope.analyses.cli`."""
    if sys.argv[1:] == ["--version"]:
        print(f"loopscope {__version__}")
        return
    from loopscope.analyses.cli import main as run

    run()


if __name__ == "__main__":
    main()
