"""A store in the formats of other tools: a data set of Hugging Face's `datasets`, and parquet."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loopscope.interp.common.precision import widened
from loopscope.interp.store.reading import ActivationStore, StoredReads
from loopscope.models.basis.files import atomic_path, usual_mode
from loopscope.models.basis.numbers import checked_count, checked_integer

_NUMPY = {torch.float16: "float16", torch.float64: "float64"}  # all else is widened to float32


def export_dataset(
    store: ActivationStore,
    folder: str | Path,
    context: int,
    site: str | None = None,
    *,
    loop: int | None = None,
    layer: int | None = None,
) -> Path:
    """Export the activations of one visit as a Hugging Face data set, in the layout of SAELens's
    cached activations.

    One column has the name of the hook and holds "context d_model" activations per row. Another
    column holds the token ids.

    Args:
        store: The store to export.
        folder: The folder to make.
        context: How many tokens a row has. The tokens of all examples follow each other in order;
            an incomplete last row is not written.
        site: The label of the site, as in `store.sites`; None if there is only one.
        loop, layer: The iteration and the block, from 0; None if the site has only one.

    Returns:
        The folder, which `datasets.load_from_disk` opens.

    Raises:
        FileExistsError: The folder exists already.
        ImportError: `datasets` is not installed (the extra `[data]`).
        ValueError: The store has fewer tokens than one row needs.

    Source:
        SAELens, `CacheActivationsRunner`.
    """
    from datasets import Array2D, Dataset, Features, Value
    from datasets import Sequence as Several

    target, group = Path(folder), store.group(site)
    if target.exists():
        raise FileExistsError(f"{target} is there already; name another folder")
    context = checked_count(context, "context")
    if len(store) < context:
        raise ValueError(
            f"a row has from 1 to all {len(store)} tokens of this store, got context={context}"
        )
    name = group.names[_at(loop, group.loops, "loop")][_at(layer, group.layers, "layer")]
    width = torch.Size(group.shape).numel()
    kind = _NUMPY.get(store.dtype, "float32")
    features = Features(
        {
            name: Array2D(shape=(context, width), dtype=kind),
            "token_ids": Several(Value("int32"), length=context),
        }
    )

    def rows() -> Iterator[dict[str, Any]]:
        for part in _contexts(store, context, site, loop, layer):
            yield {
                name: part.values.reshape(context, width).numpy(),
                "token_ids": part.tokens.numpy(),
            }

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
        made = Dataset.from_generator(
            rows, features=features, cache_dir=f"{temporary}/cache", keep_in_memory=False
        )
        made.save_to_disk(f"{temporary}/made")
        usual_mode(Path(temporary, "made"))
        os.replace(f"{temporary}/made", target)
        shutil.rmtree(f"{temporary}/cache", ignore_errors=True)
    return target


def export_parquet(store: ActivationStore, path: str | Path, site: str | None = None) -> Path:
    """Export the activations of one site as a parquet file, one row per token, iteration and block.

    The columns are example, position, token, loop, layer and activation (a list of numbers).

    Args:
        store: The store to export.
        path: The file to write.
        site: The label of the site, as in `store.sites`; None if there is only one.

    Returns:
        The path of the file.

    Raises:
        ImportError: `pyarrow` is not installed (the extra `[data]`).
        ValueError: The store holds no file.
    """
    import pyarrow as arrow
    from pyarrow import parquet

    group, writer = store.group(site), None
    width = torch.Size(group.shape).numel()
    with atomic_path(path) as temporary:
        for part in store.files(site):
            values = _plain(part.values).reshape(-1, width)
            loops, layers = len(group.loops), len(group.layers)
            reads = {"example": part.example, "position": part.position, "token": part.tokens}
            activations = arrow.FixedSizeListArray.from_arrays(values.flatten().numpy(), width)
            table = arrow.table(
                {
                    **{
                        name: column.repeat_interleave(loops * layers).numpy()
                        for name, column in reads.items()
                    },
                    "loop": [loop for loop in group.loops for _ in range(layers)] * len(part),
                    "layer": list(group.layers) * loops * len(part),
                    "activation": activations,
                }
            )
            if writer is None:
                writer = parquet.ParquetWriter(temporary, table.schema)
            writer.write_table(table)
        if writer is not None:
            writer.close()
    return Path(path)


def _contexts(
    store: ActivationStore, context: int, site: str | None, loop: int | None, layer: int | None
) -> Iterator[StoredReads]:
    """The tokens of all examples, so many at a time."""
    for part in store.batches(context, site, loops=loop, layers=layer):
        if len(part) == context:
            yield StoredReads(_plain(part.values), part.tokens, part.example, part.position)


def _plain(values: Tensor) -> Tensor:
    """Values in a format that numpy has."""
    return values if values.dtype in _NUMPY else widened(values)


def _at(wanted: int | None, has: tuple[int | None, ...], what: str) -> int:
    """The index of one coordinate on an axis."""
    found = has[0] if wanted is None and len(has) == 1 else wanted
    found = None if found is None else checked_integer(found, what)
    if found not in has:
        raise ValueError(f"{what}= must be one of {list(has)} at this site, got {wanted}")
    return has.index(found)
