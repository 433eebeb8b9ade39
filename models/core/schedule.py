"""The schedules of a model: which visits a call makes, for as long as the blocks stay the same."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from loopscope.models.core.state import State, Visit


class BlockWatch:
    """Notices that a block was replaced, added or taken away.

    Looks at the lists that hold the blocks, so that a look costs a few comparisons.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._lists: dict[str, list[nn.Module | None]] = {}

    def watch(self, blocks: Sequence[nn.Module]) -> None:
        """Watch the places in the model where some blocks stand."""
        wanted = {id(block) for block in blocks}
        for path, module in self._root.named_modules(remove_duplicate=False):
            if id(module) in wanted:
                place = path.rpartition(".")[0] or path
                self._lists[place] = self._standing(place)

    def changed(self) -> bool:
        """Whether the blocks differ from those at the last look; the watch then begins anew."""
        if all(self._standing(path) == then for path, then in self._lists.items()):
            return False
        self._lists.clear()
        return True

    def _standing(self, path: str) -> list[nn.Module | None]:
        """The module at a path and its children."""
        module: nn.Module | None = self._root
        for step in path.split("."):
            module = None if module is None else module._modules.get(step)
        return [] if module is None else [module, *module._modules.values()]


def index_of(until: int | str | None, schedule: Sequence[Visit], state: State) -> int:
    """The index of the visit that a run stops before.

    Args:
        until: As `LoopedModel.advance` takes it.
        schedule: Of the state's call.
        state: Where the run stands.

    Raises:
        KeyError: A name that is no visit of the schedule.
        TypeError: No index, no name and not None.
        ValueError: A visit that lies before the state, or after the end.
    """
    if until is None:
        return len(schedule)
    if isinstance(until, str):
        found = [v.index for v in schedule if v.name == until or v.name.startswith(until + ".")]
        if not found:
            raise KeyError(
                f"{until!r} is no visit of a schedule with n_loops={state.n_loops}; it starts"
                f" with {schedule[0].name!r}"
            )
        until = found[0]
    if isinstance(until, bool):
        raise TypeError("until must be a visit's index, its name, or None, got a bool")
    if not state.visit <= until <= len(schedule):
        raise ValueError(
            f"the state stands before visit {state.visit} of {len(schedule)}, so it cannot be"
            f" run to visit {until}"
        )
    return until
