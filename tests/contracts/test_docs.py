"""The documentation holds: its Python runs, its commands and configs compose, its links lead somewhere, and it knows what is on
disk. Nothing here needs mkdocs."""

from __future__ import annotations

import importlib
import importlib.util
import posixpath
import re
import shlex
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from distill.cluster.submit import asked, cluster_of
from distill.data.digits import Digits
from distill.evaluation.gates import Gate
from distill.methods.one_step import OneStep
from distill.models.decoder import Pixels
from distill.models.denoiser import SOLVERS, Denoiser
from distill.models.native import save_model
from distill.nets.unet import UNet
from distill.process.flow import Flow
from distill.recipe.arguments import arguments
from distill.recipe.compose import CONFIGS, register_recipes
from distill.recipe.expand import expand
from distill.recipe.halving import halve
from distill.recipe.plan import build_stages
from distill.stages.monitor import Options
from distill.stages.request import Request

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in PAGES} | {
    name: (ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md")
}
MENTIONED = "\n".join(text for name, text in TEXTS.items() if name != "CONTRIBUTING.md")
# Blocks that begin with the name of a file are new parts of the package: tests/pipeline/test_readme.py runs them.
WITH_PYTHON = [
    name
    for name, text in TEXTS.items()
    if name.startswith("docs/") and re.search("```python\n(?!# distill/)", text)
]
LONGEST = 10  # lines of a block, imports not counted


def blocks(text: str, language: str = "") -> list[str]:
    """The fenced blocks of one language, each line for line."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def yaml_block(page: str, first_word: str) -> str:
    """The YAML block that begins with a word."""
    return next(b for b in blocks(TEXTS[page], "yaml") if b.startswith(first_word))


@cache
def site() -> ModuleType:
    """scripts/docs.py, which makes the pages that are not written."""
    spec = importlib.util.spec_from_file_location("docs_pages", ROOT / "scripts/docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def made() -> dict[str, str]:
    """path on the site -> text of the pages that are made."""
    return site().pages()


# ---- Python ----


def leave_an_export(folder: Path) -> None:
    """A one-step student of the digits as `recipe=instaflow` exports it, untrained."""
    student = Denoiser(
        UNet(width=8, embedding=16, groups=4),
        Flow(),
        "velocity",
        (1, 8, 8),
        coupling="endpoint",
        decoder=Pixels(),
    )
    spec = replace(OneStep(student.with_(coupling="independent")).result().sampler, guidance_baked=1.0)
    save_model(folder, student, spec)


def leave_images(folder: Path) -> None:
    """60 grey pictures of 8x8."""
    folder.mkdir()
    for number, image in enumerate(Digits().images[:60, 0]):
        Image.fromarray(((image + 1) * 127.5).round().byte().numpy()).save(folder / f"{number}.png")


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_the_python_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    leave_an_export(tmp_path / "runs/instaflow/export")
    leave_images(tmp_path / "samples")
    names: dict[str, Any] = {"__name__": "notebook"}
    for block in blocks(TEXTS[page], "python"):
        exec(compile(block, page, "exec"), names)
    if page == "docs/python.md":
        assert names["images"].shape == (8, 1, 8, 8)
        assert names["states"].shape == (17, 1000, 2)
        assert names["pictures"].shape == (4, 3, 16, 16)
        assert names["row"]["fd"] > 0
        assert names["protocol"].names()["fd"] == "fd_digits64@60"
        error = (names["one_step"] - names["x0"]).square().sum(1).mean()
        assert error < 0.2, "the page says 0.1; the teacher is at 2.3"


def test_blocks_of_python_are_short():
    assert WITH_PYTHON == ["docs/python.md"]
    for block in blocks(TEXTS["docs/python.md"], "python"):
        lines = [
            line for line in block.splitlines() if line.strip() and not line.startswith(("import ", "from "))
        ]
        assert 1 <= len(lines) <= LONGEST, block


# ---- commands and configs ----


def commands() -> list[list[str]]:
    """Every command of the written pages that starts a verb, split as a shell would."""
    found = []
    for name, text in TEXTS.items():
        for block in blocks(text) if name.startswith("docs/") else ():
            lines = block.replace("\\\n", " ").splitlines()
            found += [shlex.split(line) for line in lines if line.startswith("python -m distill.")]
    return found


def composed(root: str, overrides: list[str]) -> dict[str, Any]:
    """A config as a verb would compose it, in plain containers."""
    register_recipes()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        plain = OmegaConf.to_container(compose(root, overrides), resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def test_commands_compose():
    found = commands()
    assert {command[2] for command in found} >= {"distill.train", "distill.evaluate", "distill.compare"}
    assert len(found) >= 9
    for command in found:
        verb, given = command[2].removeprefix("distill."), command[3:]
        if verb == "train":
            assert build_stages(expand(composed("config", given))), command
        elif verb == "evaluate":
            Request(**composed("evaluate", arguments(given)))
        elif verb == "submit":
            wanted = asked(arguments(given))
            assert cluster_of(wanted).processes >= 1
            runs = [option for option in wanted.runs if "," not in option]
            assert build_stages(expand(composed("config", runs))), command
        else:
            importlib.import_module(f"distill.{verb}").parse(given)


def test_the_recipe_of_the_page_is_a_recipe(tmp_path: Path):
    # The verb needs no header, Hydra alone does.
    text = "# @package _global_\n" + yaml_block("docs/recipes.md", "# FOLDER/recipe/mine.yaml")
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe/mine.yaml").write_text(text)
    plain = composed("config", [f"hydra.searchpath=[file://{tmp_path}]", "recipe=mine"])
    stages = build_stages(expand(plain))
    assert list(stages) == ["teacher", "pairs", "distill", "evaluate", "export"]
    assert stages["pairs"].sampler == {"solver": "heun", "steps": 12}
    assert stages["distill"].steps == 550
    without = expand(composed("config", ["recipe=instaflow", "stages.export=null"]))
    assert "export" not in without, "the page says that null leaves a stage out"


def test_the_halving_of_the_page():
    text = TEXTS["docs/recipes.md"]
    block = yaml.safe_load(yaml_block("docs/recipes.md", "halve:"))["halve"]
    template = yaml.safe_load((ROOT / "configs/stage/train.yaml").read_text())
    template |= {"init": "teacher", "teacher": "teacher", "data": None, "method": {}}
    load = {"_target_": "distill.stages.load.Load", "path": "runs/other/teacher"}
    stages = halve({"teacher": load, block["stage"]: template}, block)
    named = re.findall(r"`(distill_\d+)`", text)
    assert list(stages) == ["teacher", *named]
    assert stages[named[-1]]["steps"] == 600
    assert stages[named[-1]]["teacher"] == named[-2]


def test_the_gates_of_the_page_are_gates():
    gates = [Gate(**gate) for gate in yaml.safe_load(yaml_block("docs/evaluation.md", "gates:"))["gates"]]
    assert len(gates) == 4


# ---- links ----


def slug(heading: str) -> str:
    """The anchor that GitHub (and the site) gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(text: str) -> set[str]:
    """Anchors of all headings, outside of code."""
    bare = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", bare, flags=re.MULTILINE)
    named = {name for heading in headings for name in re.findall(r"\{#([^}]+)\}", heading)}
    return named | {slug(heading) for heading in headings}


def links(text: str) -> list[tuple[str, str]]:
    """(path, anchor) of every link that stays inside, outside of code."""
    bare = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(([^)\s]+)\)", bare)
    return [t.partition("#")[::2] for t in targets if "://" not in t and not t.startswith("mailto:")]


@pytest.mark.parametrize("page", TEXTS)
def test_links_of_written_pages(page: str):
    for path, anchor in links(TEXTS[page]):
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.is_file(), f"{page}: {path}"
        if anchor:
            assert anchor in anchors(target.read_text()), f"{page}: {path}#{anchor}"


def test_links_of_the_site():
    """As `mkdocs build --strict` checks them, written pages included."""
    pages = dict(made())
    for path in PAGES:
        pages[path.name] = site().relink(path.read_text(), f"docs/{path.name}", path.name)
    count = 0
    for page, text in pages.items():
        for path, anchor in links(text):
            target = posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else page
            assert target in pages or (ROOT / "docs" / target).is_file(), f"{page}: {path}"
            if anchor:
                assert anchor in anchors(pages[target]), f"{page}: {path}#{anchor}"
            count += 1
    assert count > 30


# ---- what is on disk ----


def test_everything_is_mentioned():
    verbs = [p.stem for p in (ROOT / "distill").glob("*.py") if "__main__" in p.read_text()]
    recipes = [p.stem for p in (ROOT / "recipes").glob("*.yaml")]
    methods = [p.stem for p in (ROOT / "configs/method").glob("*.yaml")]
    stages = [p.stem for p in (ROOT / "configs/stage").glob("*.yaml")]
    features = [p.stem for p in (ROOT / "configs/features").glob("*.yaml")]
    assert len(verbs) >= 4
    assert len(recipes) >= 2
    assert len(methods) >= 3
    assert len(stages) >= 3
    assert len(features) >= 5
    wanted = [f"distill.{verb}" for verb in verbs] + [f"recipe={recipe}" for recipe in recipes]
    wanted += [f"`{method}`" for method in methods] + [f"configs/stage/{stage}.yaml" for stage in stages]
    wanted += [f"`{name}`" for name in features]
    missing = [what for what in wanted if not re.search(rf"(?<!\w){re.escape(what)}(?!\w)", MENTIONED)]
    assert not missing, f"README.md or a page of docs/ has to mention {missing}"


def test_states_of_methods():
    """docs/which_method.md says of every method on disk that it works, and of no other."""
    text = TEXTS["docs/which_method.md"].partition("## What each needs")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (\*\*works\*\*|planned) \|", text, flags=re.MULTILINE))
    working = sorted(name for name, state in rows.items() if state == "**works**")
    assert len(rows) >= 14
    assert working == site().methods(), "what has come has to be marked **works** in docs/which_method.md"
    start = TEXTS["docs/which_method.md"].partition("## By teacher and data")[2].partition("\n## ")[0]
    for row in (line for line in start.splitlines() if line.startswith("| ") and "| planned |" in line):
        taken = re.findall(r"`(\w+)`", row.split(" | ")[3])
        assert taken, row
        assert not set(taken) <= set(working), f"this row works now: {row}"


def test_options_are_explained():
    text = TEXTS["docs/recipes.md"]
    for name in ("train", "generate", "export"):
        section = text.partition(f"configs/stage/{name}.yaml)")[2].split("\n\n")[1]  # the table below
        cells = {
            word for row in re.findall(r"^\| (.*?) \|", section, re.M) for word in re.findall(r"`(\w+)`", row)
        }
        options = yaml.safe_load((ROOT / f"configs/stage/{name}.yaml").read_text())
        assert cells == set(options) - {"_target_"}, name
    trainer = yaml.safe_load((ROOT / "configs/trainer/auto.yaml").read_text())
    assert all(f"`{option}`" in text for option in trainer)
    assert all(f"`{solver}`" in text for solver in SOLVERS)
    monitored = TEXTS["docs/evaluation.md"].partition("## While training")[2].partition("\n## ")[0]
    assert all(f"`{option}`" in monitored for option in Options.__dataclass_fields__)


# ---- pages that are made ----


def test_every_method_has_a_page():
    names = site().methods()
    assert names == sorted(p.stem for p in (ROOT / "configs/method").glob("*.yaml"))
    for name in names:
        page, source = (
            made()[f"methods/{name}.md"],
            site().docstring(ROOT / "distill/methods" / f"{name}.py"),
        )
        assert ("## Used by" in page) == bool(site().users(ROOT, name))
        assert "## Deviations from the papers" in page
        assert ("## What the loss should look like" in page) == (
            "\n\nWhat the loss should look like:" in source
        )
        assert (ROOT / "configs/method" / f"{name}.yaml").read_text().strip() in page
        assert f"::: distill.methods.{name}." in page
        assert f"({name}.md)" in made()["methods/index.md"]
    assert "configs.md#recipes-instaflow" in made()["methods/reflow.md"]
    assert "configs.md#teacher-flow_unet" in made()["methods/flow_matching.md"]


def test_every_module_has_its_reference():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "distill").rglob("*.py")
        if path.parent != ROOT / "distill" and path.stem != "__init__"
    ]
    shown = re.findall(
        r"^::: (\S+)$", "".join(t for p, t in made().items() if p.startswith("api/")), re.MULTILINE
    )
    assert sorted(shown) == sorted(modules)
    assert len(shown) > 80


def test_the_menu_holds_every_page():
    def leaves(node: Any) -> list[str]:
        if isinstance(node, str):
            return [node]
        children = node.values() if isinstance(node, dict) else node
        return [leaf for child in children for leaf in leaves(child)]

    assert sorted(leaves(site().menu())) == sorted([*made(), *(path.name for path in PAGES)])
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert settings["strict"] is True
    assert all((ROOT / hook).is_file() for hook in settings["hooks"])


def test_a_docstring_in_sections():
    text = (
        "One line.\n\nMore.\n\nWhat the loss should look like: it falls.\n\nAnd stays.\n\nDeviations: none."
    )
    assert site().parts(text) == (
        "One line.",
        "More.",
        {"What the loss should look like": "It falls.\n\nAnd stays.", "Deviations": "None."},
    )


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("[B,*S] noise -> [B,*S]", r"[B,\*S] noise -> [B,\*S]"),
        ("`[B,*S]` and ``a<b``, but <name>", "`[B,*S]` and ``a<b``, but &lt;name>"),
        ("a *word* of x_t", "a *word* of x_t"),
        ("Two:\n- one * two\n- three", "Two:\n\n- one \\* two\n- three"),
        ("As\n\n    a * b < c", "As\n\n    a * b < c"),
        ("Args:\n    x: [B,*S]", "Args:\n    x: [B,\\*S]"),
        ("(arXiv 2303.01469, eq. 1)", "([arXiv 2303.01469](https://arxiv.org/abs/2303.01469), eq. 1)"),
        ("see arXiv 2303.01469.", "see [arXiv 2303.01469](https://arxiv.org/abs/2303.01469)."),
        ("=  ==\na  b*\n=  ==\nc  d\n=  ==", "\n```text\n=  ==\na  b*\n=  ==\nc  d\n=  ==\n```\n"),
    ],
)
def test_docstrings_show_what_they_say(given: str, shown: str):
    assert site().plain(given) == shown


def test_links_move_with_their_page():
    relink = site().relink
    assert relink("[a](docs/formats.md#x)", "README.md", "index.md") == "[a](formats.md#x)"
    assert relink("[a](../recipes/instaflow.yaml)", "docs/recipes.md", "recipes.md") == (
        "[a](configs.md#recipes-instaflow)"
    )
    assert relink("[a](README.md)", "CONTRIBUTING.md", "methods/x.md") == "[a](../index.md)"
    assert relink("[a](https://x.org/docs/a.md) [b](#c)", "README.md", "index.md") == (
        "[a](https://x.org/docs/a.md) [b](#c)"
    )
