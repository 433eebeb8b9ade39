"""Repositories of the Hugging Face hub: bringing them here, their size, and those that are here.

Caching, access tokens, proxies, HF_ENDPOINT and HF_HOME are the hub library's own, which is
imported when it is first needed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

INDEX, PICKLE_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"
_BESIDE_WEIGHTS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*all_config.yaml")
_OF_SOLVERS = ("checkpoint", "*/checkpoint", "step_*", "*/step_*")  # files without suffix
_TRAINING_STATE = ("*optimizer*", "*scheduler*", "*rng_state*", "*training_args*")
_BELOW_ROOT = "*/*"
_Choice = tuple[
    tuple[str, ...], tuple[str, ...]
]  # patterns of the weights, and of what is left out
_CHOICES: tuple[_Choice, ...] = (
    (("*.safetensors",), (_BELOW_ROOT,)),
    (("*.safetensors",), ()),
    (("*.pt", "*.bin"), ()),
    (_OF_SOLVERS, ()),
)
_LOGIN = "log in with `hf auth login` or set HF_TOKEN"


def from_hub(repository: str, revision: str | None, cache: str | Path | None) -> Path:
    """The folder of a repository, whole; the arguments and errors are those of `fetch`."""
    where = _address(repository, revision)
    for choice in _CHOICES:
        found = _snapshot(repository, revision, cache, choice)
        assert isinstance(found, str), "a snapshot that is not a dry run is a folder"
        folder = Path(found)
        if _has_weights([str(path.relative_to(folder)) for path in folder.rglob("*")], choice):
            _check_shards(folder / _index_of(choice), where)
            return folder
    raise FileNotFoundError(
        f"{where} holds no weights: neither .safetensors nor .pt nor .bin, nor a puzzle solver's"
        " step_<N> or checkpoint; name a repository that does"
    )


def size_on_hub(repository: str, revision: str | None, cache: str | Path | None) -> int:
    """The bytes that `from_hub` would bring now; 0 where everything is there already.

    Raises:
        ConnectionError, PermissionError, FileNotFoundError: As in `fetch`.
    """
    for choice in _CHOICES:
        files = _snapshot(repository, revision, cache, choice, dry_run=True)
        assert isinstance(files, list), "a dry run lists files"
        if _has_weights([file.filename for file in files], choice):
            return sum(file.file_size or 0 for file in files if file.will_download)
    return 0


def in_cache(repository: str) -> Path | None:
    """The folder of a repository whose main branch has been fetched whole; None for any other."""
    for choice in _CHOICES:
        try:
            found = _snapshot(repository, None, None, choice, local_files_only=True)
            folder = Path(str(found))
            if _has_weights([str(path.relative_to(folder)) for path in folder.rglob("*")], choice):
                _check_shards(folder / _index_of(choice), repository)
                return folder
        except (OSError, ValueError):
            return None
    return None


def _snapshot(
    repository: str,
    revision: str | None,
    cache: str | Path | None,
    choice: _Choice,
    **options: Any,
) -> Any:
    """The result of the hub library's own call for one choice of weights, with our errors."""
    from huggingface_hub import snapshot_download

    weights, ignored = choice
    try:
        return snapshot_download(
            repository,
            revision=revision,
            cache_dir=cache,
            allow_patterns=[*_BESIDE_WEIGHTS, *weights],
            ignore_patterns=[*_TRAINING_STATE, *ignored],
            **options,
        )
    except (
        Exception
    ) as error:  # the library's and its transport's; whatever is neither goes on as it is
        sentence = _hub_sentence(error, _address(repository, revision))
        if sentence is None:
            raise
        raise sentence from error


def _address(repository: str, revision: str | None) -> str:
    from huggingface_hub import constants

    at = "" if revision is None else f" at revision {revision!r}"
    return f"{constants.ENDPOINT}/{repository}{at}"


def _has_weights(names: Sequence[str], choice: _Choice) -> bool:
    """Whether some of the files of a snapshot are the weights that were chosen."""
    weights, ignored = choice
    return any(
        fnmatch(PurePosixPath(name).name, pattern)
        for name in names
        for pattern in weights
        if not (ignored and "/" in name)
    )


def _index_of(choice: _Choice) -> str:
    return INDEX if "*.safetensors" in choice[0] else PICKLE_INDEX


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
    if isinstance(error, errors.LocalEntryNotFoundError) or is_broken_connection(error):
        return unreachable(cause or error, where, "the network, the proxy settings and HF_ENDPOINT")
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


def unreachable(error: BaseException, where: str, check: str) -> ConnectionError:
    return ConnectionError(
        f"{where} could not be reached, or the connection broke off ({type(error).__name__}:"
        f" {_first_line(error)}); check {check}, then call fetch again"
    )


def is_broken_connection(error: Exception) -> bool:
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
