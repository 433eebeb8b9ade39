"""The console script: `loopscope` or `python -m loopscope`."""

from __future__ import annotations


def main() -> None:
    """Run the command line of `analyses.cli`."""
    from analyses.cli import main as run

    run()


if __name__ == "__main__":
    main()
