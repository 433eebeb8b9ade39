"""Bringing public releases onto this machine: from the Hugging Face hub, or from the Google Drive
folder of arXiv 2604.07822.

Slow libraries are imported when they are first needed. Caching, access tokens, proxies, HF_ENDPOINT
and HF_HOME are the hub library's own.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NoReturn

from loopscope.checkpoints.remote import DRIVE_FOLDER, find_release

_BESIDE_WEIGHTS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
_TRAINING_STATE = ("*optimizer*", "*scheduler*", "*rng_state*", "*training_args*")
_BELOW_ROOT = "*/*"
_CHOICES: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("*.safetensors",), (_BELOW_ROOT,)),
    (("*.safetensors",), ()),
    (("*.pt", "*.bin"), ()),
)
_INDEX, _PICKLE_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"
_LOGIN = "log in with `hf auth login` or set HF_TOKEN"
_DRIVE_TIMEOUT, _DRIVE_RETRIES = 60.0, 3


def fetch(name: str, *, revision: str | None = None, folder: str | Path | None = None) -> Path:
    """Bring a public release onto this machine, unless it is there already.

    From the hub come configs, tokenizer files and safetensors; pickles only where a repository has
    no safetensors. A folder is returned only when everything in it is whole. The folder that is
    returned can be given to `load`. Where the folder holds several pickles (one per training
    stage), `load` asks for one of the files. The download from Google Drive has not been tried
    against the real folder.

    Args:
        name: A name that `available()` lists, or a Hugging Face repository id "owner/name".
        revision: A branch, tag or commit of a Hugging Face repository; None means the main branch.
        folder: Where downloads are kept, in place of the hub's own cache or, for Google Drive, of
            $LOOPSCOPE_HOME or loopscope in $XDG_CACHE_HOME or ~/.cache.

    Raises:
        ValueError: No such name, with the nearest ones; or a revision of a release on Google Drive.
        FileNotFoundError: No such repository, revision or run, or one without weights.
        PermissionError: A repository that is not open to everyone.
        ConnectionError: No network, or a connection that broke off; half a file is removed.
        FileExistsError: A folder with other content where a release on Google Drive would go.
    """
    release = find_release(name)
    if not release.on_drive:
        return _from_hub(release.at, revision, folder)
    if revision is not None:
        raise ValueError(
            f"{name!r} lies on Google Drive, which has no revisions, got revision={revision!r};"
            " leave it out"
        )
    return _from_drive(name, _cache_home() if folder is None else Path(folder).expanduser())


def _cache_home() -> Path:
    """The folder for releases from Google Drive; the XDG rules ignore a relative cache folder."""
    if os.environ.get("LOOPSCOPE_HOME"):
        return Path(os.environ["LOOPSCOPE_HOME"]).expanduser()
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (cache if cache.is_absolute() else Path.home() / ".cache") / "loopscope"


# Hugging Face


def _from_hub(repository: str, revision: str | None, cache: str | Path | None) -> Path:
    from huggingface_hub import constants, snapshot_download

    where = f"{constants.ENDPOINT}/{repository}" + (
        "" if revision is None else f" at revision {revision!r}"
    )
    for weights, ignored in _CHOICES:
        try:
            folder = Path(
                snapshot_download(
                    repository,
                    revision=revision,
                    cache_dir=cache,
                    allow_patterns=[*_BESIDE_WEIGHTS, *weights],
                    ignore_patterns=[*_TRAINING_STATE, *ignored],
                )
            )
        except (
            Exception
        ) as error:  # the library's and its transport's; whatever is neither goes on as it is
            sentence = _hub_sentence(error, where)
            if sentence is None:
                raise
            raise sentence from error
        search = folder.glob if ignored else folder.rglob
        if any(True for pattern in weights for _ in search(pattern)):
            _check_shards(folder / (_INDEX if "*.safetensors" in weights else _PICKLE_INDEX), where)
            return folder
    raise FileNotFoundError(
        f"{where} holds no weights: neither .safetensors nor .pt nor .bin; name a repository that"
        " does"
    )


def _check_shards(index: Path, where: str) -> None:
    """Refuse weights of which a shard did not come."""
    if not index.is_file():
        return
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, TypeError, KeyError, AttributeError):
        return  # such an index lies there like that; `load` says what is wrong with it
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{where} is not whole: {index.name} names {len(shards)} files, of which {len(missing)}"
            f" did not come, first {missing[0]!r}; try another revision, or call fetch again with a"
            " network"
        )


def _hub_sentence(error: Exception, where: str) -> Exception | None:
    """The sentence for an error of the hub library; None where the error is not of the download."""
    from huggingface_hub import errors

    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
    if isinstance(cause, errors.HFValidationError):
        return ValueError(
            f"{where} cannot be a repository: {_first_line(cause)}; write it as 'owner/name'"
        )
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return ConnectionError(
            f"{where} is not whole in the cache, and HF_HUB_OFFLINE is set; unset it and call fetch"
            " again"
        )
    if isinstance(cause, errors.HfHubHTTPError):
        return _refusal(cause, where)
    if isinstance(error, errors.LocalEntryNotFoundError) or _is_broken_connection(error):
        return _unreachable(
            cause or error, where, "the network, the proxy settings and HF_ENDPOINT"
        )
    return None


def _refusal(error: Exception, where: str) -> OSError:
    """The sentence for an answer of the hub that is not the file."""
    from huggingface_hub import errors

    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 0
    if isinstance(error, errors.RevisionNotFoundError):
        return FileNotFoundError(
            f"{where} was not found: the repository has no such branch, tag or commit; name another"
            " revision"
        )
    if isinstance(error, errors.RepositoryNotFoundError) and not isinstance(
        error, errors.GatedRepoError
    ):
        return FileNotFoundError(
            f"{where} was not found ({status}): check the spelling of owner/name, or, if it is"
            f" private, {_LOGIN}"
        )
    if status in (401, 403):
        return PermissionError(
            f"{where} is not open to everyone ({status}): accept its terms on its page, and"
            f" {_LOGIN}"
        )
    return ConnectionError(
        f"{where} could not be read: the hub answered {status}; call fetch again later"
    )


def _unreachable(error: BaseException, where: str, check: str) -> ConnectionError:
    return ConnectionError(
        f"{where} could not be reached, or the connection broke off ({type(error).__name__}:"
        f" {_first_line(error)}); check {check}, then call fetch again"
    )


def _is_broken_connection(error: Exception) -> bool:
    """Whether an error is of the network; an error about this machine's files has an errno.

    The hub library changed its transport library between its versions 1 and 2, hence the comparison
    by name.
    """
    by_transport = any(base.__name__ == "TransportError" for base in type(error).__mro__)
    return (
        by_transport
        or isinstance(error, ConnectionError | TimeoutError)
        or (isinstance(error, OSError) and error.errno is None)
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no reason given").splitlines()[0].rstrip(".")


# Google Drive


def _from_drive(name: str, home: Path) -> Path:
    """The folder of one run. A hidden draft beside the folder takes its place when whole; a killed
    process leaves the draft.
    """
    from loopscope.models.basis.files import usual_mode  # late, because it brings torch

    target = home / name
    if _holds_weights(target):
        return target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(
            f"{target} exists and holds no .pt file; remove it, or choose another place with"
            " folder="
        )
    made = [parent for parent in target.parents if not parent.exists()]
    draft = None
    try:
        files = _drive_files(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        usual_mode(draft)
        _download_from_drive(files, draft)
        if not _holds_weights(target):  # another process may have been faster
            draft.replace(target)
    finally:
        if draft is not None:
            shutil.rmtree(draft, ignore_errors=True)
        if not target.exists():
            _remove_empty(made)
    return target


def _holds_weights(folder: Path) -> bool:
    return any(path.is_file() for path in folder.glob("*.pt"))


def _remove_empty(made: Sequence[Path]) -> None:
    for parent in made:
        if parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()


def _drive_files(name: str) -> dict[PurePosixPath, str]:
    """The Drive id of each file of a run, by its path in the run's folder.

    Raises:
        FileNotFoundError: The Drive folder has no such run.
        ConnectionError: The Drive folder could not be listed.
    """
    import gdown

    try:
        listed = gdown.download_folder(
            DRIVE_FOLDER, quiet=True, skip_download=True, timeout=_DRIVE_TIMEOUT
        )
    except Exception as error:
        _raise_from_drive(error)
    wanted, found, folders = PurePosixPath(name).parts, {}, set()
    for entry in listed:
        assert not isinstance(entry, str), "a listing without a download has no local paths"
        parts = PurePosixPath(entry.path.replace(os.sep, "/")).parts
        folders.add("/".join(parts[:-1]))
        starts = [
            i for i in range(len(parts) - len(wanted)) if parts[i : i + len(wanted)] == wanted
        ]
        if starts:
            found[PurePosixPath(*parts[starts[0] + len(wanted) :])] = entry.id
    if not any(path.suffix == ".pt" and len(path.parts) == 1 for path in found):
        there = ", ".join(sorted(folders)[:20]) or "nothing"
        raise FileNotFoundError(
            f"{DRIVE_FOLDER} has no folder {name!r} with .pt files; it has {there}"
        )
    return found


def _download_from_drive(files: dict[PurePosixPath, str], draft: Path) -> None:
    import gdown

    for path, identity in files.items():
        local = draft / path
        local.parent.mkdir(parents=True, exist_ok=True)
        try:
            gdown.download(
                id=identity, output=str(local), timeout=_DRIVE_TIMEOUT, retries=_DRIVE_RETRIES
            )
        except Exception as error:
            _raise_from_drive(error)


def _raise_from_drive(error: Exception) -> NoReturn:
    import gdown

    if isinstance(error, gdown.DownloadError) or _is_broken_connection(error):
        raise _unreachable(
            error, DRIVE_FOLDER, "the network, and in a browser whether the folder is still public"
        ) from error
    raise error
