"""One record of all shards of a call."""

from __future__ import annotations

from pathlib import Path

from loopscope.interp.lens.kept import kept_lens
from loopscope.interp.lens.record import Lens
from loopscope.interp.lens.tuned_job import kept_tuned
from loopscope.interp.lens.tuned_lens import TunedLens
from loopscope.interp.patching.kept import kept_sweep
from loopscope.interp.patching.sweep import Sweep
from loopscope.interp.probes.fits import ProbeFit
from loopscope.interp.probes.kept import kept_sides
from loopscope.interp.probes.record import Probe
from loopscope.interp.probes.transfer import TransferFit, TransferMatrix
from loopscope.interp.shards.manifest import Manifest
from loopscope.interp.shards.work import Work
from loopscope.interp.store.reading import ActivationStore
from loopscope.models.core.base import LoopedModel

_FITS: dict[str, type[ProbeFit | TransferFit]] = {
    "probe": ProbeFit,
    "transfer_matrix": TransferFit,
}


def merge(
    folder: str | Path, model: LoopedModel | None = None
) -> Sweep | Lens | TunedLens | ActivationStore | Probe | TransferMatrix:
    """Join the results of all shards of a call, from the folder into which they wrote, to the
    record of the whole call.

    The record is the one that the undivided call returns, to the last bit on machines that compute
    alike. Probes are fitted here, on the states that the shards wrote. The tensors of a logit lens
    are on the model's device, all others on the CPU.

    Args:
        folder: The folder that was given to the call: `save_to=` of a sweep, a lens, a probe or the
            training of a tuned lens, or `to=` of `collect`.
        model: The model; needed only for a logit, readout or coda lens, which uses the model's
            unembedding.

    Returns:
        The record of the call.

    Raises:
        FileNotFoundError: The folder holds no results.
        ValueError: Some of the work is missing, a file is cut off, or a lens is given without its
            model.
    """
    manifest = Manifest.read(Path(folder))
    if manifest.method == "collect":
        return ActivationStore(folder)
    common, found = Work(folder, manifest).read()
    if manifest.method in ("activation_patch", "attribution_patch"):
        return kept_sweep(manifest, common, found)
    if manifest.method == "train_tuned_lens":
        return kept_tuned(manifest, found)
    if manifest.method in _FITS:
        fit = _FITS[manifest.method].kept(manifest.about, common)
        return fit.of(*kept_sides(manifest, common, found))
    if model is None:
        raise ValueError(
            f"the record of {manifest.method} reads through the model's head; pass the model, as in"
            " merge(folder, model)"
        )
    return kept_lens(model, manifest, common, found)
