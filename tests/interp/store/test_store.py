"""A store holds what a run passes through its visits, whoever wrote which part of it."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from benchmarks.scale import collection
from loopscope import (
    ActivationStore,
    Batch,
    collect,
    export_dataset,
    export_parquet,
    gradients,
    logit_margin,
)
from loopscope.interp.store.reading import StoredReads
from loopscope.interp.store.texts import source_of
from loopscope.models.basis.tokens import Readout, Vocabulary
from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import (
    BATCH,
    D_MODEL,
    D_VOCAB,
    HEADS,
    LAYERS,
    LENGTHS,
    LOOPS,
    BatchCentred,
    assert_close,
    odd_one,
    padded,
    toy,
)

NAME = "loops.2.blocks.1.hook_resid_post"
TEXTS = ["<a3><a5><a7>", "<a2>", "<a11><a1>", "<a4><a4><a4><a9>", "<a6><a8>"]


@pytest.fixture(scope="module")
def model() -> RecurrentDepth:
    made = toy(injection=True)
    made.vocab = Vocabulary([f"<a{i}>" for i in range(1, D_VOCAB)])
    made.read_at = Readout("last_real")
    return made


@pytest.fixture(scope="module")
def store(model: RecurrentDepth, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    return collect(model, padded(), n_loops=LOOPS, to=tmp_path_factory.mktemp("store"), per_file=2)


def stored_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_every_visit_is_that_of_a_run(model: RecurrentDepth, store: ActivationStore) -> None:
    batch = padded()
    _, cache = model.run_with_cache(batch.tokens, n_loops=LOOPS, mask=batch.mask)
    expected = cache.stack("resid_post").movedim((2, 3), (0, 1))[batch.mask.bool()]
    found = store.read()
    assert found.values.shape == (sum(LENGTHS), LOOPS, LAYERS, D_MODEL)
    assert len(store) == sum(LENGTHS)
    assert_close(found.values, expected)
    assert_close(store.visit(NAME), expected[:, 2, 1])
    assert torch.equal(store.tokens, batch.tokens[batch.mask.bool()].int())
    frame = store.frame()
    assert frame.example.tolist() == [i for i, n in enumerate(LENGTHS) for _ in range(n)]
    assert frame.position.tolist() == [p for n in LENGTHS for p in range(n)]


def test_batches_hold_every_token_once_with_all_its_iterations(store: ActivationStore) -> None:
    whole, places = (
        store.read(),
        list(zip(store.example.tolist(), store.position.tolist(), strict=True)),
    )
    orders = []
    for seed in (None, 0, 0, 1):
        parts = list(
            store.batches(5, loops=[3, 1], layers=0, seed=seed, buffer=7 * 2 * D_MODEL * 8)
        )
        assert [len(part) for part in parts] == [5, 5, 5, 1]
        seen = [
            place
            for part in parts
            for place in zip(part.example.tolist(), part.position.tolist(), strict=True)
        ]
        assert sorted(seen) == places
        values = torch.cat([part.values for part in parts])
        assert torch.equal(
            values, whole.values[[places.index(p) for p in seen]][:, [3, 1]][:, :, :1]
        )
        orders.append(seen)
    assert orders[0] == places
    assert orders[1] == orders[2] != orders[3] != places


def test_batches_hold_the_buffer_in_bytes_and_share_no_memory(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def counted(self: ActivationStore, turn: int, *given: Any) -> StoredReads:
        opened.append(turn)
        return read(self, turn, *given)

    read, opened = ActivationStore._file, list[int]()
    monkeypatch.setattr(ActivationStore, "_file", counted)
    per_read = LOOPS * LAYERS * D_MODEL * 8
    for buffer, seed, files in (
        (per_read * 3, 0, 1),
        (per_read * 12, 0, 2),
        (1 << 28, None, 1),
    ):
        opened.clear()
        part = next(store.batches(2, seed=seed, buffer=buffer))
        assert (len(part), len(opened)) == (2, files)
        assert part.values.untyped_storage().nbytes() == 2 * per_read


def test_shards_an_interruption_and_a_restart_give_the_files_of_one_run(
    model: RecurrentDepth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"n_loops": 3, "per_file": 2, "batch_size": 1}
    collect(model, TEXTS, to=tmp_path / "one", **options)
    part = collect(model, TEXTS, to=tmp_path / "two", shard=(1, 2), **options)
    assert sorted(set(part.example.tolist())) == [2, 3, 4]  # the last of two, the first of two
    with pytest.raises(ValueError, match="1 of 3 ranges of examples are missing"):
        ActivationStore(tmp_path / "two")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("loopscope.interp.store.collect.write_tensors", stop)
        with pytest.raises(KeyboardInterrupt):
            collect(model, TEXTS, to=tmp_path / "two", shard=(0, 2), **options)
    for name in ("0000000.resid_post", "0000000.tokens"):  # as a kill leaves them
        (tmp_path / "two" / f".{name}.safetensors.x8_y").write_bytes(b"half")
    written = (tmp_path / "two" / "0000001.tokens.safetensors").stat().st_mtime_ns
    whole = collect(model, TEXTS, to=tmp_path / "two", **options)
    assert (tmp_path / "two" / "0000001.tokens.safetensors").stat().st_mtime_ns == written
    assert stored_bytes(tmp_path / "two") == stored_bytes(tmp_path / "one")
    assert len(whole) == 12
    assert not list((tmp_path / "two").glob(".0*"))


@pytest.mark.parametrize("kind", ["jsonl", "txt", "ids", "dataset"])
def test_texts_of_every_source_are_the_same_examples(
    model: RecurrentDepth, tmp_path: Path, kind: str
) -> None:
    source: Any
    column = None
    if kind == "jsonl":
        source, column = tmp_path / "texts.jsonl", "text"
        source.write_text("".join(json.dumps({"id": 1, "text": text}) + "\n" for text in TEXTS))
    elif kind == "txt":
        source = tmp_path / "texts.txt"
        source.write_text("\n\n".join(TEXTS))
    elif kind == "ids":
        source = [model.vocab.ids(text) for text in TEXTS]  # type: ignore[union-attr]
    else:
        from datasets import Dataset

        source = Dataset.from_dict({"text": TEXTS})
    expected = collect(model, TEXTS, n_loops=2, to=tmp_path / "a", context=3)
    found = collect(model, source, n_loops=2, to=tmp_path / "b", column=column, context=3)
    assert torch.equal(found.read().values, expected.read().values)
    assert expected.example.bincount().tolist() == [3, 1, 2, 3, 2]


def test_sites_positions_and_number_formats(model: RecurrentDepth, tmp_path: Path) -> None:
    batch = padded()
    options: dict[str, Any] = {"sites": ["z", "state_out"], "positions": None}
    store = collect(
        model, batch, n_loops=3, to=tmp_path, dtype=torch.bfloat16, loops=[0, 2], **options
    )
    _, cache = model.run_with_cache(batch.tokens, n_loops=3, mask=batch.mask, names_filter="**")
    rows = torch.arange(BATCH)
    assert store.sites == ("attn.z", "state_out")
    z = store.read("attn.z", loops=2, layers=1)
    assert z.values.shape == (BATCH, 1, 1, HEADS, D_MODEL // HEADS)
    assert torch.equal(z.values[:, 0, 0], cache["z", 2, 1][rows, batch.readout].bfloat16())
    assert store.group("state_out").layers == (None,)
    assert torch.equal(z.position.long(), batch.readout)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_picked_column_is_stored_for_the_examples_that_have_it(
    model: RecurrentDepth, tmp_path: Path, batch_size: int
) -> None:
    options: dict[str, Any] = {"positions": [3, 1], "per_file": 2, "batch_size": batch_size}
    store = collect(model, TEXTS, n_loops=2, to=tmp_path / "some", **options)
    every = collect(model, TEXTS, n_loops=2, to=tmp_path / "all")
    kept = (every.position == 1) | (every.position == 3)
    assert store.example.tolist() == [0, 2, 3, 3, 4]
    assert store.position.tolist() == [1, 1, 1, 3, 1]
    assert_close(store.read().values, every.read().values[kept])
    last = collect(model, TEXTS, n_loops=2, to=tmp_path / "last", **{**options, "positions": 3})
    assert last.counts == [0, 1, 0]
    assert_close(last.read().values, store.read().values[3:4])


def test_no_iteration_is_no_choice(store: ActivationStore) -> None:
    for seed in (None, 0):
        with pytest.raises(ValueError, match=r"loops must be 'all' or name at least one of \[0, 1"):
            next(store.batches(5, loops=[], seed=seed))
    with pytest.raises(ValueError, match=r"layers must be 'all' or name at least one of"):
        store.read(layers=[])


def test_a_site_is_called_as_it_was_and_columns_are_in_any_order(
    model: RecurrentDepth, tmp_path: Path
) -> None:
    given: Any = {"sites": ["resid_post", "z"], "n_loops": LOOPS, "to": tmp_path}
    store = collect(model, padded(), **given, positions=[2, 0])
    assert torch.equal(store.read("z").values, store.read("attn.z").values)
    assert collect(model, padded(), **given, positions=[0, 2]).position.tolist() == [0, 2] * BATCH
    with pytest.raises(KeyError, match="this store has the sites"):
        store.read("post")


def test_exports_hold_the_same_numbers(store: ActivationStore, tmp_path: Path) -> None:
    from datasets import load_from_disk

    folder = export_dataset(store, tmp_path / "set", 4, loop=2, layer=1)
    rows = load_from_disk(str(folder))
    assert rows.column_names == [NAME, "token_ids"]
    found = torch.tensor(rows[:][NAME], dtype=torch.float64).flatten(0, 1)
    assert torch.equal(found, store.visit(NAME))
    assert torch.tensor(rows[:]["token_ids"]).flatten().tolist() == store.tokens.tolist()
    frame = pd.read_parquet(export_parquet(store, tmp_path / "all.parquet"))
    here = frame[frame.loop.eq(2) & frame.layer.eq(1)]
    assert torch.equal(torch.tensor(np.stack(here.activation)), store.visit(NAME))
    assert here.position.tolist() == store.position.tolist()


def test_a_store_leaves_the_model_able_to_give_gradients(
    model: RecurrentDepth, store: ActivationStore
) -> None:
    store.check(model)
    found = gradients(model, padded(), logit_margin(torch.tensor([1, 2, 3])), [NAME], LOOPS)[1]
    assert found[NAME].abs().sum() > 0


# Bad input


def test_a_folder_of_another_call_is_refused(model: RecurrentDepth, tmp_path: Path) -> None:
    collect(model, TEXTS, n_loops=2, to=tmp_path)
    before = stored_bytes(tmp_path)
    for differs, other in (
        ("n_loops", {"n_loops": 3}),
        ("dtype", {"n_loops": 2, "dtype": torch.float32}),
        ("positions", {"n_loops": 2, "positions": [0]}),
    ):
        with pytest.raises(ValueError, match=rf"results of another call.*{differs}"):
            collect(model, TEXTS, to=tmp_path, **other)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"results of another call.*weights"):
        collect(toy(), padded(), n_loops=2, to=tmp_path)
    assert stored_bytes(tmp_path) == before


def test_another_tokenizer_or_readout_rule_is_another_call(
    model: RecurrentDepth, tmp_path: Path
) -> None:
    other = toy(injection=True)
    for words, read_at, differs in (
        (model.vocab.words[:0:-1], model.read_at, "vocabulary"),  # type: ignore[union-attr]
        (model.vocab.words, Readout("first_pad"), "read_at"),  # type: ignore[union-attr]
    ):
        other.vocab, other.read_at = Vocabulary(words), read_at
        collect(model, TEXTS, n_loops=1, to=tmp_path, positions=None)
        with pytest.raises(ValueError, match=rf"results of another call.*{differs}\)"):
            collect(other, TEXTS, n_loops=1, to=tmp_path, positions=None)


def test_the_hash_of_rows_of_ids_takes_in_every_id(model: RecurrentDepth) -> None:
    ids = np.arange(3001) % 7
    other = ids.copy()
    other[1500] += 1
    kinds = (ids, torch.tensor(ids), ids.tolist())
    assert len({source_of(model, [kind]).digest for kind in kinds}) == 1  # type: ignore[list-item]
    digests = {source_of(model, [row]).digest for row in (ids, other)}  # type: ignore[list-item]
    digests.add(source_of(model, [str(ids.tolist())]).digest)
    assert len(digests) == 3


def test_a_store_of_another_model_or_tokenizer_is_refused(
    model: RecurrentDepth, store: ActivationStore
) -> None:
    with pytest.raises(ValueError, match="made with another tokenizer"):
        store.check(toy(injection=True))
    other = toy()
    other.vocab = model.vocab
    with pytest.raises(ValueError, match="made with another model"):
        store.check(other)


def test_a_truncated_file_and_a_full_disk_are_one_sentence(
    model: RecurrentDepth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("loopscope.interp.store.files.Slab.write", full_disk)
        with pytest.raises(OSError, match="the disk is full; what was finished before is kept"):
            collect(model, TEXTS, n_loops=2, to=tmp_path)
    assert not stored_bytes(tmp_path)
    assert not list(tmp_path.glob(".0*"))
    store = collect(model, TEXTS, n_loops=2, to=tmp_path)
    path = tmp_path / "0000000.resid_post.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="is cut off or damaged"):
        store.read()


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"max_bytes": 100}, ValueError, "max_bytes must hold the activations of one example"),
        ({"sites": "pattern"}, ValueError, "one entry per key"),
        ({"sites": "nothing"}, KeyError, "no site 'nothing'"),
        ({"visits": ["loops.0.blocks.0", "loops.1.blocks.1"]}, ValueError, "must be a grid"),
        ({"dtype": torch.int32}, ValueError, "dtype must be one of"),
        ({"shard": (2, 2)}, ValueError, "one of n shards"),
        ({"shard": 2}, TypeError, "two integers"),
        ({"positions": [1, 4]}, ValueError, r"positions must be in 0\.\.3, .* got 4"),
        ({"positions": "readout"}, TypeError, "positions must be 'all', an integer or several"),
        ({"per_file": 0}, ValueError, "per_file must be at least 1, got 0"),
        ({"context": 0}, ValueError, "context must be at least 1, got 0"),
        ({"context": -1}, ValueError, "context must be at least 1, got -1"),
        ({"readout": 0}, ValueError, "goes with a tensor of tokens only"),
        ({"column": "text"}, ValueError, "these inputs are of the type list; leave column out"),
    ],
)
def test_bad_arguments_write_nothing(
    model: RecurrentDepth,
    tmp_path: Path,
    options: dict[str, Any],
    error: type[Exception],
    sentence: str,
) -> None:
    with pytest.raises(error, match=sentence):
        collect(model, TEXTS, n_loops=2, to=tmp_path / "new", **options)
    assert not list(tmp_path.glob("new/*.safetensors"))


@pytest.mark.parametrize(
    ("inputs", "word"), [(padded(), "a Batch"), (padded().tokens, "a tensor of tokens")]
)
def test_a_context_of_inputs_that_are_not_cut_is_refused(
    model: RecurrentDepth, tmp_path: Path, inputs: Any, word: str
) -> None:
    with pytest.raises(ValueError, match=f"{word} is not cut; leave context out"):
        collect(model, inputs, n_loops=2, to=tmp_path / "new", context=3)
    assert not list(tmp_path.iterdir())


def test_rows_that_depend_on_each_other_are_run_at_once(tmp_path: Path) -> None:
    model, batch = odd_one(BatchCentred), padded()
    store = collect(model, batch, n_loops=2, to=tmp_path / "whole")
    _, cache = model.run_with_cache(batch.tokens, n_loops=2, mask=batch.mask)
    assert_close(store.read().values[:, 1, 1], cache["resid_post", 1, 1][batch.mask.bool()])
    for options in ({"per_file": 2}, {"batch_size": 2}, {"max_bytes": 10_000}):
        with pytest.raises(ValueError, match="rows of this model depend on each other"):
            collect(model, batch, n_loops=2, to=tmp_path / "cut", **options)  # type: ignore[arg-type]
    assert not list(tmp_path.glob("cut/*.safetensors"))


def test_rows_that_a_hook_may_tell_apart_are_not_cut(model: RecurrentDepth, tmp_path: Path) -> None:
    def first_row(value: Tensor, hook: object) -> None:
        value[0] = 0

    with model.hooks([("loops.0.blocks.0.hook_resid_pre", first_row)], n_loops=2):
        with pytest.raises(ValueError, match="a hook that is attached now may tell rows apart"):
            collect(model, padded(), n_loops=2, to=tmp_path / "cut", batch_size=2)
        store = collect(model, padded(), n_loops=2, to=tmp_path / "whole")
        _, cache = model.run_with_cache(padded().tokens, n_loops=2, mask=padded().mask)
    assert_close(store.read().values[:, 1, 1], cache["resid_post", 1, 1][padded().mask.bool()])


def test_a_store_without_files_and_a_files_name_are_refused(
    model: RecurrentDepth, tmp_path: Path
) -> None:
    store = collect(model, TEXTS, n_loops=2, to=tmp_path / "store", shard=(7, 8))
    for call in (
        store.read,
        lambda: store.visit("loops.0.blocks.0.hook_resid_post"),
        lambda: list(store.batches(2)),
        lambda: export_parquet(store, tmp_path / "all.parquet"),
    ):
        with pytest.raises(ValueError, match="store holds no activations yet"):
            call()
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    (tmp_path / "texts.jsonl").write_text('"<a1>"')
    with pytest.raises(ValueError, match=r"names a file; pass Path\('.*texts\.jsonl'\)"):
        collect(model, str(tmp_path / "texts.jsonl"), n_loops=2, to=tmp_path / "other")


def test_two_writers_of_one_shard_and_a_foreign_folder_are_refused(
    model: RecurrentDepth, tmp_path: Path
) -> None:
    from loopscope.interp.shards.work import locked

    collect(model, TEXTS, n_loops=2, to=tmp_path / "store")
    with (
        locked(tmp_path / "store", (0, 1)),
        pytest.raises(ValueError, match="being written by another process"),
    ):
        collect(model, TEXTS, n_loops=2, to=tmp_path / "store")
    with pytest.raises(ValueError, match="holds other files and no manifest"):
        collect(model, TEXTS, n_loops=2, to=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no manifest\.json"):
        ActivationStore(tmp_path)
    from datasets import Dataset

    table = Dataset.from_dict({"a": TEXTS, "b": TEXTS})
    with pytest.raises(KeyError, match="column= names the column"):
        collect(model, table, n_loops=2, to=tmp_path / "other")


def test_padding_of_a_batch_is_not_stored(model: RecurrentDepth, tmp_path: Path) -> None:
    batch = model.encode(TEXTS)
    wide = Batch(
        *(torch.nn.functional.pad(x, (0, 3)) for x in (batch.tokens, batch.mask)), batch.readout
    )

    def values(inputs: Batch, name: str) -> Tensor:
        return collect(model, inputs, n_loops=2, to=tmp_path / name).read().values

    assert_close(values(wide, "wide"), values(batch, "narrow"))


@pytest.mark.slow
def test_a_collection_holds_no_more_than_max_bytes() -> None:
    """160 MB of activations, of which 8 MiB may be held."""
    found = collection(0.16, max_bytes=8 << 20)
    assert found["bytes"] > 150e6
    assert found["over"] < 60
