"""Activations of a run, with the iteration as an axis."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from loopscope.models.basis.files import atomic_path
from loopscope.models.basis.numbers import checked_integer

Key = str | tuple[str | int, ...]
_PLACE_WORDS = ("loops", "blocks")


def position_axis(name: str) -> int:
    """The axis of a site's tensor that counts positions (query positions for scores and
    patterns).
    """
    return 2 if name.endswith(("hook_attn_scores", "hook_pattern")) else 1


class LoopCache(Mapping[str, Tensor]):
    """Activations of a run, by hook name, with the iteration as a part of the name.

    An activation is named in full or by (site, iteration or stage, block): `cache["resid_post", 3,
    0]` is `loops.3.blocks.0.hook_resid_post`, and `cache["resid_post", "prelude", 0]` is
    `prelude.0.hook_resid_post`. `cache["q", -1, 0]` counts iterations from the end.
    `cache["ln1.scale", 2, 1]` is the divisor of a norm.

    Args:
        activations: The tensors by full hook name.
        n_loops: The number of iterations of the run.
        has_batch_dim: False if the batch axis was removed (`remove_batch_dim`).
    """

    def __init__(
        self, activations: Mapping[str, Tensor], n_loops: int, has_batch_dim: bool = True
    ) -> None:
        self._tensors = dict(activations)
        self.n_loops = n_loops
        self.has_batch_dim = has_batch_dim

    def __getitem__(self, key: Key) -> Tensor:
        return self._tensors[self._full_name(key)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, key: object) -> bool:
        try:
            self._full_name(key)  # type: ignore[arg-type]  # anything that is no key is simply not in the cache
        except (KeyError, TypeError, AttributeError):
            return False
        return True

    def __repr__(self) -> str:
        return f"LoopCache({len(self)} activations of {self.n_loops} iterations)"

    def stack(self, site: str) -> Tensor:
        """Stack the activations of one site over iterations and blocks.

        Args:
            site: A site of the blocks, such as "resid_post", "q" or "ln1.scale", or of a whole
                iteration, such as "state_in".

        Returns:
            Float[Tensor, "loop layer batch pos ..."], or Float[Tensor, "loop batch pos ..."] for a
            site of a whole iteration.

        Raises:
            KeyError: The cache lacks the site at some iteration or block; the message names the
                first.
        """
        here = [name for name in self if is_site(name, site) and name.startswith("loops.")]
        if not here:
            raise KeyError(self._missing(site))
        places = {coordinate(name): name for name in here}
        if len(places) < len(here):
            raise KeyError(
                f"{site!r} could be {' or '.join(sorted({site_of(name) for name in here}))}; name"
                " the site in full"
            )
        layers = sorted({place[1:] for place in places}, key=_in_order)
        rows = []
        for loop in range(self.n_loops):
            absent = [layer for layer in layers if (loop, *layer) not in places]
            if absent:
                raise KeyError(
                    f"{site!r} was not cached at {(loop, *absent[0])} (iteration, layer); stack"
                    " needs every iteration"
                )
            tensors = [self._tensors[places[loop, *layer]] for layer in layers]
            rows.append(tensors[0] if layers == [()] else torch.stack(tensors))
        return torch.stack(rows)

    def to(self, device: torch.device | str) -> LoopCache:
        """The same cache with every tensor on a device."""
        return LoopCache(
            {k: v.to(device) for k, v in self.items()}, self.n_loops, self.has_batch_dim
        )

    def save(self, path: str | Path) -> None:
        """Write the cache into one safetensors file, whole or not at all."""
        separate = {
            name: tensor.detach().cpu().clone().contiguous() for name, tensor in self.items()
        }
        with atomic_path(path) as temporary:
            save_file(
                separate,
                temporary,
                {"n_loops": str(self.n_loops), "has_batch_dim": str(self.has_batch_dim)},
            )

    @classmethod
    def load(cls, path: str | Path) -> LoopCache:
        """Read a cache from a file that `save` wrote."""
        with safe_open(str(path), "pt") as file:
            about = file.metadata() or {}
            if "n_loops" not in about:
                raise ValueError(
                    f"{path} was not written by LoopCache.save: its metadata has no n_loops"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # a safetensors file is no mapping
        return cls(tensors, int(about["n_loops"]), about["has_batch_dim"] == "True")

    def _full_name(self, key: Key) -> str:
        if isinstance(key, str):
            if key in self._tensors:
                return key
            key = (key,)
        if not key:
            raise KeyError(self._missing(key))
        site, place = str(key[0]), tuple(map(_step, key[1:]))
        here = [name for name in self if is_site(name, site)]
        place = self._from_the_start(place, here)
        found = [name for name in here if coordinate(name) == place]
        if len(found) != 1:
            raise KeyError(
                self._missing(key)
                if not found
                else f"{key} could be {' or '.join(found)}; name the site in full"
            )
        return found[0]

    def _from_the_start(
        self, place: tuple[str | int, ...], here: list[str]
    ) -> tuple[str | int, ...]:
        """A place whose iteration and layer may count from the end, with both from 0."""
        if place and isinstance(place[0], int) and place[0] < 0:
            place = (self.n_loops + place[0], *place[1:])
        layers = [
            c[-1]
            for c in map(coordinate, here)
            if len(c) == len(place) > 1 and c[:-1] == place[:-1] and isinstance(c[-1], int)
        ]
        if layers and isinstance(place[-1], int) and place[-1] < 0:
            place = (*place[:-1], max(layers) + 1 + place[-1])
        return place

    def _missing(self, key: object) -> str:
        asked = ".".join(map(str, key)) if isinstance(key, tuple) else str(key)
        nearest = difflib.get_close_matches(asked, list(self), n=3, cutoff=0.2)
        return (
            f"{key!r} is not in this cache of {len(self)} activations; nearest:"
            f" {', '.join(nearest) or 'none'}; run_with_cache(names_filter=...) chooses what is"
            " kept"
        )


def _step(step: str | int) -> str | int:
    """A part of a key; TypeError where it is neither a word nor an integer."""
    return step if isinstance(step, str) else checked_integer(step, "a coordinate of a key")


def _in_order(place: tuple[str | int, ...]) -> list[tuple[bool, int, str]]:
    """Numbers in their order; nested cycles in the order in which they run, "low" before "high"."""
    return [
        (isinstance(step, int) or step == "high", step if isinstance(step, int) else 0, str(step))
        for step in place
    ]


def _parts(name: str) -> tuple[list[str], list[str]]:
    """The place and the site in a hook name: what stands up to its last number, and what
    follows.
    """
    segments = name.split(".")
    last = max((i for i, segment in enumerate(segments) if segment.isdigit()), default=-1)
    return segments[: last + 1], segments[last + 1 :]


def coordinate(name: str) -> tuple[str | int, ...]:
    """The place in a hook name: `loops.3.blocks.0.hook_z` is (3, 0), `prelude.1.hook_z` is
    ("prelude", 1).
    """
    return tuple(int(s) if s.isdigit() else s for s in _parts(name)[0] if s not in _PLACE_WORDS)


def site_of(name: str) -> str:
    """The site in a hook name: `loops.3.blocks.0.attn.hook_z` is `attn.hook_z`."""
    return ".".join(_parts(name)[1])


def is_site(name: str, site: str) -> bool:
    """Whether a hook name is at a site, given as "attn.hook_z", "attn.z", "hook_z" or "z"."""
    own = site_of(name)
    last = own.rpartition(".")[2]
    return site in (own, own.replace("hook_", ""), last, last.removeprefix("hook_"))
