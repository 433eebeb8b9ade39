"""Whether the counts and widths of a GGUF file fit together."""

from __future__ import annotations

from typing import Any

from loopscope.checkpoints.errors import CheckpointError, shown
from loopscope.checkpoints.gguf.reader import GgufFile


def check_sizes(file: GgufFile) -> None:
    """Refuse counts and widths that do not fit together.

    Raises:
        CheckpointError: A count that is absent or no whole number above 0, heads that do not divide
            what they share, or a turn of some channels of a head only.
    """
    sizes: dict[str, Any] = {
        name: file.fields.get(name) for name in ("embedding_length", "attention.head_count")
    }
    sizes["attention.head_count_kv"] = file.fields.get(
        "attention.head_count_kv", sizes["attention.head_count"]
    )
    for name, value in sizes.items():
        if type(value) is not int or value < 1:
            raise CheckpointError(
                f"{file.path}: {file.architecture}.{name} must be a whole number above 0, got"
                f" {shown(value)}"
            )
    width, heads, kv_heads = sizes.values()
    own = file.fields.get("attention.key_length")
    turned = file.fields.get("rope.dimension_count")
    if heads % kv_heads or (own is None and width % heads):
        raise CheckpointError(
            f"{file.path}: {kv_heads} heads of keys must divide {heads} heads, and these the"
            f" {width} channels"
        )
    head = own or width // heads
    if turned not in (None, head):
        raise CheckpointError(
            f"{file.path}: {file.architecture}.rope.dimension_count must be the width of a head,"
            f" {head}, got {shown(turned)}; a turn of some channels only is not read here"
        )
