"""Checkpoint folders with one thing wrong: bytes, headers, JSON fields, tensors, links, sizes.

A folder is a mapping of file names to bytes. A mutation takes a folder and a generator of random
numbers, and returns the changed folder with a label, or None where it does not apply.
"""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor

Files = dict[str, bytes]


@dataclass(frozen=True)
class Mutant:
    """A changed folder.

    Attributes:
        label: The change in words.
        files: The content of each file.
        links: Names that are links, and their targets.
        same: Whether a model that loads must be the model of the unchanged folder.
    """

    label: str
    files: Files
    links: Mapping[str, str] = field(default_factory=dict)
    same: bool = False

    def write(self, folder: Path) -> None:
        """Write the folder."""
        folder.mkdir(parents=True)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        for name, target in self.links.items():
            (folder / name).symlink_to(target)


Mutation = Callable[[Files, random.Random], Mutant | None]
MARK = "@@a nasty value@@"
NASTY = (
    "null", "true", "false", "0", "-1", "1", "2", "3", "7", "10000", "1000000000", "1" + "0" * 19,
    "9" * 5000, "1e308", "1e400", "-1e400", "1e-320", "0.0", "-1.5", "0.5", "NaN", "Infinity",
    "-Infinity", '""', '"x"', '"0"', '"1e5"', '"\\ud800"', '"../../etc/passwd"', '"\\u0000"', "[]",
    "{}", "[[]]", '{"a": 1}', '[null, 1, "x"]', "[" * 100_000 + "]" * 100_000,
    '"' + "x" * 10**6 + '"', "[" + "0," * 10**5 + "0]", '"default"', '"llama3"',
    '"column:99999999999999999999"',
)  # fmt: skip
SIZES = (0, -1, 1, 5, 63, 4096, 20_000, 10**6, 10**9, 2**31, 2**62, 10**19)


def weights_of(files: Files) -> str:
    """The name of the file with the weights."""
    return next(name for name in files if name.endswith((".safetensors", ".pt")))


# Bytes


def flipped(files: Files, rng: random.Random) -> Mutant:
    """Some bytes of a file replaced, taken away, or put in."""
    name = rng.choice(sorted(files))
    data = bytearray(files[name])
    at = rng.choice(
        [rng.randrange(300), rng.randrange(1 + len(data)), len(data) - rng.randrange(400)]
    )
    at, n = max(0, min(at, len(data) - 1)), rng.choice([1, 1, 2, 8, 64, 1000])
    kind = rng.choice(["bit", "random", "zero", "delete", "insert", "repeat"])
    if kind == "bit" and data:
        data[at] ^= 1 << rng.randrange(8)
    elif kind in ("random", "zero"):
        data[at : at + n] = bytes(n) if kind == "zero" else rng.randbytes(n)
    elif kind == "delete":
        del data[at : at + n]
    else:
        data[at:at] = rng.randbytes(n) if kind == "insert" else bytes(data[at : at + n])
    return Mutant(f"{kind} {n} bytes at {at} of {name}", {**files, name: bytes(data)})


def cut(files: Files, rng: random.Random) -> Mutant:
    """A file cut short, or with something behind its end."""
    name = rng.choice(sorted(files))
    keep = rng.randrange(len(files[name])) if files[name] else 0
    if rng.random() < 0.2:
        more = rng.choice([b"\0", b"\n", b"}", rng.randbytes(100)])
        return Mutant(f"{len(more)} bytes behind {name}", {**files, name: files[name] + more})
    return Mutant(f"{name} cut to {keep} bytes", {**files, name: files[name][:keep]})


# JSON


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every value inside a JSON value."""
    items = value.items() if isinstance(value, dict) else ()
    items = list(enumerate(value))[:20] if isinstance(value, list) else items
    for key, inner in items:
        yield (*above, key)
        yield from places(inner, (*above, key))


def nasty_json(files: Files, rng: random.Random) -> Mutant | None:
    """One value of a JSON file replaced by a nasty one, taken away, renamed, or written twice."""
    names = [name for name in files if name.endswith(".json")]
    if not names:
        return None
    name = rng.choice(sorted(names, key=lambda each: (each != "config.json", each))[:3] + names)
    content = json.loads(files[name])
    found = list(places(content))
    if not found or rng.random() < 0.03:
        raw = rng.choice(NASTY)
        return Mutant(f"{name} is {raw[:30]}", {**files, name: raw.encode()})
    *way, last = rng.choice(found)
    inner = content
    for key in way:
        inner = inner[key]
    where, kind = ".".join(map(str, [*way, last])), rng.random()
    raw = rng.choice(NASTY)
    if kind < 0.08:
        del inner[last]
        label = f"{name}: no {where}"
    elif kind < 0.12 and isinstance(inner, dict):
        inner[f"{last}_2"] = inner.pop(last)
        label = f"{name}: {where} is called {last}_2"
    elif kind < 0.16 and isinstance(inner, dict):
        inner["stray"], label = MARK, f"{name}: stray {where} = {raw[:30]}"
    else:
        inner[last], label = MARK, f"{name}: {where} = {raw[:30]}"
    text = json.dumps(content).replace(json.dumps(MARK), raw)
    return Mutant(label, {**files, name: text.encode(errors="surrogatepass")})


def wrong_sizes(files: Files, rng: random.Random) -> Mutant | None:
    """Whole numbers of the config replaced by another size."""
    if "config.json" not in files:
        return None
    content = json.loads(files["config.json"])
    numbers = [key for key, value in content.items() if type(value) is int]
    if not numbers:
        return None
    chosen = {
        key: rng.choice(SIZES)
        for key in rng.sample(numbers, rng.choice([1, 1, 1, 2]) % (1 + len(numbers)))
    }
    text = json.dumps({**content, **chosen})
    return Mutant(f"sizes {chosen}", {**files, "config.json": text.encode()})


def another_number(files: Files, rng: random.Random) -> Mutant | None:
    """One number of the config replaced by one that a model could have too."""
    if "config.json" not in files:
        return None
    content = json.loads(files["config.json"])
    numbers = [key for key, value in content.items() if type(value) in (int, float)]
    if not numbers:
        return None
    key = rng.choice(numbers)
    number = content[key]
    other = number + rng.choice([-1, 1]) if type(number) is int else number * rng.choice([0.5, 3])
    text = json.dumps({**content, key: other})
    return Mutant(f"{key} = {other}", {**files, "config.json": text.encode()})


# Weights


def tensors_of(files: Files) -> dict[str, Tensor]:
    """The tensors of the weights; of a pickle those of the model."""
    name = weights_of(files)
    if name.endswith(".safetensors"):
        return load_bytes(files[name])
    content = torch.load(io.BytesIO(files[name]), weights_only=False)
    return dict(content.get("model_state_dict") or content["model"])


def with_tensors(files: Files, tensors: Mapping[Any, Any], **saving: Any) -> Files:
    """The folder with other tensors."""
    name = weights_of(files)
    if name.endswith(".safetensors"):
        return {**files, name: save_bytes({k: v.contiguous().clone() for k, v in tensors.items()})}
    content = torch.load(io.BytesIO(files[name]), weights_only=False)
    content["model_state_dict" if "model_state_dict" in content else "model"] = dict(tensors)
    buffer = io.BytesIO()
    torch.save(content, buffer, **saving)
    return {**files, name: buffer.getvalue()}


def with_first(value: float) -> Callable[[Tensor], Tensor]:
    """A tensor whose first number is another one."""
    return lambda t: torch.cat([torch.full_like(t.flatten()[:1], value), t.flatten()[1:]]).view(
        t.shape
    )


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.mT if t.ndim > 1 else t[None],
    "one axis more": lambda t: t[None],
    "flat": lambda t: t.flatten(),
    "one row less": lambda t: t[:-1] if t.ndim else t[None],
    "one row more": lambda t: torch.cat([t, t[:1]]) if t.ndim else t[None],
    "nothing in it": lambda t: t[:0] if t.ndim else t[None][:0],
    "scalar": lambda t: t.flatten()[0],
    "a NaN": with_first(torch.nan),
    "an inf": with_first(torch.inf),
    "huge": with_first(1e30),
    "float64": lambda t: t.double(),
    "float16": lambda t: t.half(),
    "bfloat16": lambda t: t.bfloat16(),
    "float32": lambda t: t.float(),
    "float8": lambda t: t.float().to(torch.float8_e4m3fn),
    "int64": lambda t: t.long(),
    "bool": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex64),
}  # fmt: skip
ONLY_PICKLED: dict[str, Callable[[Tensor], Any]] = {
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "expanded": lambda t: t.flatten()[:1].expand(10**6, 10**6),
    "expanded to its shape": lambda t: t.flatten()[:1].view([1] * t.ndim).expand(t.shape),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "a list": lambda t: t.tolist(),
    "None": lambda t: None,
    "a parameter": lambda t: torch.nn.Parameter(t),
}
STRAY = (
    "extra", "blocks.20000.ln_1.weight", "blocks.20000.ln1.w",
    "model.layers.99999.mlp.up_proj.weight", "blocks.-1.ln1.w", "", "\n", "x" * 10**5,
    "_orig_mod.", "module.x", "blocks.0", "blocks.\N{ARABIC-INDIC DIGIT THREE}.ln_1.weight",
)  # fmt: skip
NO_MODELS: tuple[Any, ...] = (
    [1, 2], {}, None, "text", {"model_state_dict": None}, {"model_state_dict": {}},
    {"model_state_dict": {"a": 3}}, {1: 2}, {"config": 3, "model": {}}, torch.zeros(3),
)  # fmt: skip


def changed_tensor(files: Files, rng: random.Random) -> Mutant:
    """One tensor with another shape, type or value."""
    tensors = tensors_of(files)
    key = rng.choice(sorted(tensors))
    changes = CHANGES if weights_of(files).endswith(".safetensors") else CHANGES | ONLY_PICKLED
    kind = rng.choice(sorted(changes))
    if key == "lm_head.weight" or tensors[key].is_complex() or not tensors[key].is_floating_point():
        key = next(k for k in sorted(tensors) if tensors[k].is_floating_point())
    other = {**tensors, key: changes[kind](tensors[key])}
    return Mutant(f"{key} is {kind}", with_tensors(files, other))


def changed_keys(files: Files, rng: random.Random) -> Mutant:
    """A key more, less, or of another name; or all keys behind a wrapper's prefix."""
    tensors: dict[Any, Tensor] = dict(tensors_of(files))
    key, kind = rng.choice(sorted(tensors)), rng.randrange(5)
    if kind == 0:
        stray = rng.choice(STRAY)
        return Mutant(
            f"stray key {stray[:30]!r}", with_tensors(files, {**tensors, stray: tensors[key]})
        )
    if kind == 1:
        del tensors[key]
        return Mutant(f"no {key}", with_tensors(files, tensors))
    if kind == 2:
        other = rng.choice(sorted(tensors))
        tensors[key], tensors[other] = tensors[other], tensors[key]
        return Mutant(f"{key} and {other} swapped", with_tensors(files, tensors))
    if kind == 3 and not weights_of(files).endswith(".safetensors"):
        odd = rng.choice([3, None, ("a", 1), b"x", 2.5])
        return Mutant(f"key {odd!r}", with_tensors(files, {**tensors, odd: tensors[key]}))
    prefix = rng.choice(["_orig_mod.", "module.", "module._orig_mod.", "model.", "x."])
    wrapped = {prefix + name: tensor for name, tensor in tensors.items()}
    return Mutant(f"all keys begin with {prefix}", with_tensors(files, wrapped), same=True)


def changed_header(files: Files, rng: random.Random) -> Mutant | None:
    """A safetensors header with a wrong type, shape, offset, key or length."""
    name = weights_of(files)
    if not name.endswith(".safetensors"):
        return None
    (length,) = struct.unpack("<Q", files[name][:8])
    header, data = json.loads(files[name][8 : 8 + length]), files[name][8 + length :]
    key, kind = rng.choice(sorted(set(header) - {"__metadata__"})), rng.randrange(6)
    raw, said = rng.choice(NASTY), length
    if kind == 0:
        header[key]["dtype"] = rng.choice(
            ["F64", "F16", "BF16", "I32", "F8_E4M3", "F4", "BOOL", "U8", "C64"]
        )
    elif kind == 1:
        header[key]["shape"] = rng.choice(
            [
                [],
                [0],
                [-1],
                [10**9, 10**9],
                [2**63],
                [*header[key]["shape"], 1],
                header[key]["shape"][::-1],
            ]
        )
    elif kind == 2:
        header[key]["data_offsets"] = rng.choice(
            [[0, 0], [0, 10**12], [8, 4], [-4, 0], [0, len(data)], [2**64, 2**64]]
        )
    elif kind == 3:
        header[key][rng.choice(["dtype", "shape", "data_offsets"])] = MARK
    elif kind == 4:
        header["__metadata__"] = MARK
    text = json.dumps(header).replace(json.dumps(MARK), raw).encode(errors="surrogatepass")
    said = (
        rng.choice([0, 1, length - 1, length + 1, 10**9, 2**63, 2**64 - 1])
        if kind == 5
        else len(text)
    )
    return Mutant(
        f"header of {key}, kind {kind}, {raw[:20]}",
        {**files, name: struct.pack("<Q", said) + text + data},
    )


# Files


def sharded(files: Files, rng: random.Random) -> Mutant | None:
    """The weights in two shards with an index, in which one thing may be wrong."""
    name = weights_of(files)
    if not name.endswith(".safetensors") or '"family"' in files.get("config.json", b"").decode():
        return None
    tensors = tensors_of(files)
    keys = sorted(tensors)
    halves = {"one.safetensors": keys[::2], "two.safetensors": keys[1::2]}
    where: Any = {key: shard for shard, half in halves.items() for key in half}
    shards = {shard: save_bytes({k: tensors[k] for k in half}) for shard, half in halves.items()}
    key, raw = rng.choice(keys), rng.choice(NASTY)
    wrong = (
        {**where, key: MARK},
        MARK,
        {**where, "stray": "one.safetensors"},
        {**where, key: "../two.safetensors"},
        {**where, key: "absent"},
        dict.fromkeys(where, "one.safetensors"),
    )
    where = rng.choice(wrong) if rng.random() < 0.7 else where
    text = json.dumps({"weight_map": where}).replace(json.dumps(MARK), raw)
    rest = {other: content for other, content in files.items() if other != name}
    return Mutant(
        f"shards, {raw[:30]}",
        {**rest, **shards, "model.safetensors.index.json": text.encode()},
        same=True,
    )


def moved(files: Files, rng: random.Random) -> Mutant:
    """A file that is absent, empty, a link to itself or to nothing, or the content of another."""
    name, kind = rng.choice(sorted(files)), rng.randrange(6)
    rest = {other: content for other, content in files.items() if other != name}
    if kind == 0:
        return Mutant(f"no {name}", rest)
    if kind == 1:
        return Mutant(f"{name} is empty", {**files, name: b""})
    if kind == 2:
        return Mutant(f"{name} is a link to itself", rest, {name: name}, same=True)
    if kind == 3:
        return Mutant(f"{name} is a link to nothing", rest, {name: "nowhere"})
    if kind == 4:
        return Mutant(
            f"{name} is a link", {**rest, "elsewhere": files[name]}, {name: "elsewhere"}, same=True
        )
    other = rng.choice(sorted(files))
    return Mutant(f"{name} holds {other}", {**files, name: files[other]})


class Bomb:
    """Unpickling it would run code."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return print, ("code was run",)


def repacked(files: Files, rng: random.Random) -> Mutant | None:
    """A pickle that was zipped again, is of the old format, or holds something else."""
    name = weights_of(files)
    if not name.endswith(".pt"):
        return None
    kind = rng.randrange(6)
    if kind == 0:
        old = with_tensors(files, tensors_of(files), _use_new_zipfile_serialization=False)
        return Mutant("the old format", old, same=True)
    if kind in (1, 2):
        buffer = io.BytesIO()
        with (
            zipfile.ZipFile(io.BytesIO(files[name])) as source,
            zipfile.ZipFile(buffer, "w") as target,
        ):
            for each in source.infolist():
                big = (
                    bytes(10**9)
                    if kind == 2 and each.filename.endswith("data.pkl") and rng.random() < 0.2
                    else source.read(each)
                )
                target.writestr(each.filename, big, zipfile.ZIP_DEFLATED)
        return Mutant(
            "zipped again with compression", {**files, name: buffer.getvalue()}, same=True
        )
    buffer = io.BytesIO()
    deep: Any = []
    for _ in range(150):
        deep = [deep]
    odd = rng.choice([*NO_MODELS, {"model_state_dict": Bomb()}, {"model_state_dict": deep}, deep])
    if kind == 3:
        return Mutant(
            f"a bare pickle of {str(odd)[:30]}", {**files, name: pickle.dumps(odd, protocol=2)}
        )
    torch.save(odd, buffer)
    return Mutant(f"a torch file of {str(odd)[:30]}", {**files, name: buffer.getvalue()})


MUTATIONS: tuple[tuple[float, Mutation], ...] = (
    (2, flipped), (1, cut), (4, nasty_json), (2, wrong_sizes), (2, another_number),
    (3, changed_tensor), (1.5, changed_keys), (1.5, changed_header), (1, sharded), (0.7, moved),
    (1.5, repacked),
)  # fmt: skip


def draw(files: Files, rng: random.Random) -> Mutant:
    """A random mutant of a folder."""
    shares, kinds = zip(*MUTATIONS, strict=True)
    while True:
        (kind,) = rng.choices(kinds, shares)
        found = kind(files, rng)
        if found is not None:
            return found
