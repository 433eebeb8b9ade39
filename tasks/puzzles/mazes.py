"""Mazes on small grids: a random one with one way between any two cells, and its way."""

from __future__ import annotations

from collections import deque

import numpy as np

from loopscope.tasks.puzzles.boards import Puzzle

_WALL, _FREE, _START, _GOAL, _WAY = "# SGo"
_STEPS = ((-1, 0), (1, 0), (0, -1), (0, 1))


def make_maze(side: int, rng: np.random.Generator) -> Puzzle:
    """A random maze whose free cells are a tree, so that one way leads from "S" to "G".

    Args:
        side: Cells of a row, walls included; odd.

    Returns:
        The maze, rated by the cells of its way between start and goal.

    Raises:
        ValueError: An even side, or one below 5.
    """
    if side < 5 or side % 2 == 0:
        raise ValueError(f"a maze's side must be odd and at least 5, got {side}")
    grid = np.full((side, side), _WALL)
    rooms = [(row, column) for row in range(1, side, 2) for column in range(1, side, 2)]
    path = [rooms[int(rng.integers(len(rooms)))]]
    grid[path[0]] = _FREE
    while path:
        row, column = path[-1]
        doors = [
            (row + 2 * down, column + 2 * right, row + down, column + right)
            for down, right in _STEPS
            if 0 < row + 2 * down < side and 0 < column + 2 * right < side
        ]
        closed = [door for door in doors if grid[door[:2]] == _WALL]
        if not closed:
            path.pop()
            continue
        chosen = closed[int(rng.integers(len(closed)))]
        grid[chosen[:2]] = grid[chosen[2:]] = _FREE
        path.append(chosen[:2])
    start, goal = rng.choice(len(rooms), size=2, replace=False).tolist()
    grid[rooms[start]], grid[rooms[goal]] = _START, _GOAL
    question = "".join(grid.ravel())
    answer = solve_maze(question)
    return Puzzle(question, answer, answer.count(_WAY), f"maze{side}")


def solve_maze(question: str) -> str:
    """A square maze with one shortest way from "S" to "G" written into its free cells.

    Raises:
        ValueError: No square, not exactly one start and one goal, or no way between them.
    """
    side = round(len(question) ** 0.5)
    if side * side != len(question) or (question.count(_START), question.count(_GOAL)) != (1, 1):
        raise ValueError(
            f"a maze is a square with one S and one G, got {len(question)} cells with"
            f" {question.count(_START)} S and {question.count(_GOAL)} G"
        )
    start, goal = question.index(_START), question.index(_GOAL)
    came: dict[int, int] = {start: start}
    queue = deque([start])
    while queue and goal not in came:
        cell = queue.popleft()
        for down, right in _STEPS:
            row, column = cell // side + down, cell % side + right
            near = row * side + column
            inside = 0 <= row < side and 0 <= column < side
            if inside and question[near] != _WALL and near not in came:
                came[near] = cell
                queue.append(near)
    if goal not in came:
        raise ValueError("a maze must have a way from S to G, and this one has none")
    answer, cell = list(question), came[goal]
    while cell != start:
        answer[cell] = _WAY
        cell = came[cell]
    return "".join(answer)
