"""Folders of encoded prompts, and the conditions that they are. Nothing here needs a text encoder."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.cache.pairs import Header, Pairs, differing
from distill.cache.writer import recorded
from distill.data.prompts import Prompts as PromptFile
from distill.data.rng import noise_checksum
from distill.files import sha256_file, write_json, write_safetensors
from distill.models.build import build_conditions
from distill.models.decoder import Pixels
from distill.models.families.family import Encoded
from distill.models.prompts import EXPORTED, Prompts, PromptSource, TextEncoders, write_table
from distill.stages.generate import Generate

PROMPTS = ["a", "b", "a", "d"]
NOISE = noise_checksum(0, "pairs", (1, 8, 8))
HEADER = Header((1, 8, 8), 1, 0, "pairs", NOISE, "", "euler", 1, 1.0, {}, Pixels().config())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return table(tmp_path / "prompts", PROMPTS)


def table(folder: Path, prompts: list[str]) -> Path:
    folder.mkdir()
    values = {"context": torch.arange(len(prompts) * 6.0).reshape(-1, 3, 2)}
    encoded = Encoded(values, {"context": torch.full((1, 3, 2), -1.0)}, truncated=1)
    write_table(folder, prompts, TextEncoders("gone", "0" * 64), encoded, (1, 8, 8))
    return folder


def test_prompts_go_round(folder: Path) -> None:
    prompts = Prompts.of_folder(folder)
    cond = prompts.of(torch.tensor([1, 5]))
    assert torch.equal(cond.values["context"][0], cond.values["context"][1])
    assert float(cond.null().values["context"].mean()) == -1
    assert (prompts.period, prompts.has_null, len(PromptSource(folder))) == (4, True, 4)
    ids = torch.tensor([2, 7])
    stored = prompts.columns(ids)
    prompts.check(stored)
    assert torch.equal(prompts.stored(stored).values["context"], prompts.of(ids).values["context"])
    with pytest.raises(ValueError, match=r"prompt: found 2 \.\. 4, expected 0 \.\. 3"):
        prompts.check({"prompt": torch.tensor([2, 4])})


def test_known_prompts_need_no_encoder(folder: Path) -> None:
    prompts = Prompts.of_folder(folder)
    asked = prompts.ask(count=2, prompt="d").values["context"]
    assert torch.equal(asked, prompts.of(torch.tensor([3, 3])).values["context"])
    with pytest.raises(ValueError, match="its text encoders are gone"):
        prompts.ask(count=1, prompt="new")
    with pytest.raises(ValueError, match="found 2 prompts, expected one or 3"):
        prompts.ask(count=3, prompt=["a", "b"])


def test_the_same_prompts_elsewhere_are_equal(folder: Path, tmp_path: Path) -> None:
    here = Prompts.of_folder(folder)
    shutil.copytree(folder, tmp_path / "copy")
    there = Prompts.of_folder(tmp_path / "copy")
    other = Prompts.of_folder(table(tmp_path / "other", ["x"]))
    assert here == there != other
    assert build_conditions(here.config()) == here
    assert here.beside(tmp_path / "copy").folder == str(tmp_path / "copy")
    assert here.beside(tmp_path / "new") is here
    header = replace(HEADER, conditions=here.config())
    generate = Generate(teacher="teacher", count=1, path="pairs")
    generate._check_header(header, replace(header, conditions=there.config()))
    with pytest.raises(ValueError, match="conditions: found"):
        generate._check_header(header, replace(header, conditions=other.config()))


def test_a_moved_run_reads_its_own_prompts(folder: Path, tmp_path: Path) -> None:
    """Models, their best/ and pairs read the stage's folder of the run that they lie in now."""
    prompts, run = Prompts.of_folder(folder), tmp_path / "moved"
    header = replace(HEADER, conditions=prompts.config())
    run.mkdir()
    shutil.move(folder, run / "prompts")
    for place in (run / "teacher" / "best", run / "teacher" / "nodes" / "000", run / "teacher"):
        place.mkdir(parents=True, exist_ok=True)
        found = prompts.beside(place)
        assert found.folder == str(run / "prompts")
        assert found.of(torch.tensor([1])).values["context"].shape == (1, 3, 2)
    table(run / "others", ["x"])
    (run / "prompts").rename(run / "away")
    (run / "others").rename(run / "prompts")
    assert prompts.beside(run / "teacher") is prompts, "other prompts of that name are not these"
    (run / "prompts").rename(run / "others")
    (run / "away").rename(run / "prompts")
    written(run / "pairs", header)
    assert Pairs(run / "pairs").fetch(torch.tensor([0]), torch.arange(1)).cond.values["context"][0, 0, 0] == 6
    moved = replace(header, conditions=prompts.beside(run / "pairs").config())
    assert differing(header, moved) == []
    (run / "pairs" / "manifest.json").unlink()
    write_json(run / "pairs" / "shards.json", {"header": header.to_dict(), "sha256": {"a": "b"}})
    assert recorded(run / "pairs", moved) == {"a": "b"}, "a moved writer continues"


def test_adopted_prompts_are_copied_unless_the_run_has_them(folder: Path, tmp_path: Path) -> None:
    prompts = Prompts.of_folder(folder)
    own, other = tmp_path / "run" / "pairs", tmp_path / "other" / "pairs"
    own.mkdir(parents=True)
    other.mkdir(parents=True)
    shutil.copytree(folder, tmp_path / "run" / "prompts")
    prompts.copy_to(own)
    assert not list(own.iterdir())
    prompts.copy_to(other)
    shutil.rmtree(folder)
    assert prompts.beside(other).of(torch.tensor([1])).values["context"][0, 0, 0] == 6


def written(folder: Path, header: Header) -> None:
    """A cache of one pair, of prompt 1."""
    z, columns = (
        torch.randn(1, 1, 8, 8),
        {"ids": torch.tensor([1]), "prompt": torch.tensor([1], dtype=torch.int32)},
    )
    write_safetensors(folder / "pairs-00000.safetensors", {"x0": z, **columns})
    shard = {
        "file": "pairs-00000.safetensors",
        "count": 1,
        "sha256": sha256_file(folder / "pairs-00000.safetensors"),
    }
    write_json(folder / "manifest.json", {"header": header.to_dict(), "shards": [shard]})


def test_an_export_holds_the_first_prompts(tmp_path: Path) -> None:
    prompts = Prompts.of_folder(table(tmp_path / "many", [str(n) for n in range(EXPORTED + 9)]))
    (tmp_path / "export").mkdir()
    exported = prompts.exported(tmp_path / "export")
    prompts_1 = prompts.of(torch.tensor([1])).values["context"]
    shutil.rmtree(tmp_path / "many")
    ids = torch.arange(EXPORTED)
    assert torch.equal(exported.of(ids).values["context"], prompts.of(ids).values["context"])
    assert (exported.period, exported) == (EXPORTED + 9, prompts), (
        "the same prompts, of which it holds the first"
    )
    assert exported.ask(count=EXPORTED).values["context"].shape == (EXPORTED, 3, 2)
    for ask in (lambda: exported.ask(count=EXPORTED + 1), lambda: exported.of(torch.tensor([EXPORTED + 1]))):
        with pytest.raises(ValueError, match=r"holds the first 64 prompts alone; .* type prompt=TEXT"):
            ask()
    assert torch.equal(exported.of(torch.tensor([EXPORTED + 10])).values["context"], prompts_1)
    (tmp_path / "again").mkdir()
    again = build_conditions(exported.exported(tmp_path / "again").config()).beside(tmp_path / "again")
    assert (again, again.period) == (prompts, EXPORTED + 9)


def test_changed_folders_are_refused(folder: Path) -> None:
    prompts = Prompts.of_folder(folder)
    path = folder / "prompts.json"
    described = json.loads(path.read_text())
    path.write_text(json.dumps(described | {"prompts": ["c", *PROMPTS[1:]]}))
    with pytest.raises(ValueError, match=r"prompts.json: found prompts of digest"):
        prompts.of(torch.tensor([0]))
    path.write_text(json.dumps(described | {"tensors": "0" * 64}))
    with pytest.raises(ValueError, match=r"prompts.safetensors: sha256: found"):
        Prompts.of_folder(folder).of(torch.tensor([0]))
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"prompts.json: missing"):
        PromptSource(folder)


def test_files_of_prompts(tmp_path: Path) -> None:
    def read(content: bytes, name: str = "a.txt", **options: Any) -> list[str]:
        (tmp_path / name).write_bytes(content)
        return PromptFile(str(tmp_path / name), **options).prompts

    text = b"\xef\xbb\xbfa dog\r\n\r\n caf\xc3\xa9 \rold\ta\xe2\x80\xa8b\n"
    assert read(text) == ["a dog", "café", "old\ta\u2028b"]
    assert read(text, limit=1) == ["a dog"]
    lines = b'{"text": "x"}\r\n\r\n{"text": "y\\n\\ud83d\\ude00", "score": NaN}'
    assert read(lines, "b.JSONL", key="text") == ["x", "y\n\U0001f600"]
    surrogate = b'{"prompt": "\\ud83d"}'
    for content, name, words in (
        (b"x", "b.jsonl", "line 1: is not JSON"),
        (b'{"prompt": "a", "prompt": "b"}', "b.jsonl", "line 1: is not JSON: found the key 'prompt' twice"),
        (b'{"prompt": "a"}\n' + b"[" * 10**5, "b.jsonl", "line 2: is not JSON: nested too deeply"),
        (b'["a"]', "b.jsonl", r"line 1: prompt: found \['a'\], expected a prompt"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", "b.jsonl", "line 1: is not JSON"),
        (surrogate, "b.jsonl", "line 1: found half of a surrogate pair at position 0"),
        (b'{"prompt": "a\\u0000"}', "b.jsonl", "line 1: found a NUL character at position 1"),
        (b"a\r\rb\0", "a.txt", "line 3: found a NUL character at position 1"),
        (b"a\r\ncaf\xe9", "a.txt", "line 2: is not UTF-8: byte 6"),
        ("a dog".encode("utf-16"), "a.txt", "line 1: is not UTF-8"),
        (b"a\n" + b"b" * (2**20 + 1), "a.txt", "line 2: has 1048577 characters, expected at most 1048576"),
        (b'["a"]', "a.json", r"a.json: found a .json file, expected text .* or JSON lines"),
        (b"id,prompt", "a.csv", r"a.csv: found a .csv file"),
    ):
        with pytest.raises(ValueError, match=words) as found:
            read(content, name)
        assert str(found.value).startswith(f"path: {tmp_path / name}: ")
    for options, words in (({"limit": True}, "limit: found True"), ({"key": 3}, "key: found 3")):
        with pytest.raises(ValueError, match=words):
            read(b"a", **options)
