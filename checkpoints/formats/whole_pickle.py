"""A pickle that holds the config and the weights, in the way of one of the known families."""

from __future__ import annotations

from loopscope.checkpoints.formats.base import Format, Located
from loopscope.checkpoints.formats.released_folder import family_of, open_release
from loopscope.checkpoints.table import Release
from loopscope.checkpoints.tables import TABLES
from loopscope.checkpoints.weight_files import plain_weights


def unpacked(located: Located) -> Release | None:
    """The config and the tensors in a pickle; None where the pickle does not hold both."""
    content = located.pickle
    if content is None:
        return None
    for table in TABLES:
        release = table.unpack(content)
        if release is not None:
            return release[0], plain_weights(release[1], located.files.weights)
    return None


def _release(located: Located) -> Release:
    release = unpacked(located)
    assert release is not None, "a format opens only what is its own"
    return release


WHOLE_PICKLE = Format(
    lambda located: unpacked(located) is not None,
    lambda located: family_of(located, _release(located)),
    lambda located, given: open_release(located, _release(located), given),
)
