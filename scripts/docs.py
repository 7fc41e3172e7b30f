"""Generates pages of the documentation site for `mkdocs build --strict` (a hook in mkdocs.yml).

The front page is README.md. Every method has a page with its module docstring and config, every package of distill an API
reference, and all recipes and configs are on one page. All are found on disk, so a new method, recipe or module needs no edit
here. `pages` needs only the standard library; the hooks need mkdocs.

    pip install 'distill[docs]' && mkdocs build --strict      # into build/docs
"""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Pages of docs/ in the order of the menu; other pages follow, sorted by name.
WRITTEN = (
    "which_method.md",
    "recipes.md",
    "teachers.md",
    "data.md",
    "score_distillation.md",
    "mmd.md",
    "distilled_decoding.md",
    "evaluation.md",
    "tracking.md",
    "python.md",
    "reliability.md",
    "scaling.md",
    "formats.md",
    "architecture.md",
)
# Packages in the order of the reference, the lowest first; others follow.
PACKAGES = (
    "process",
    "samplers",
    "nets",
    "models",
    "data",
    "cache",
    "engine",
    "methods",
    "evaluation",
    "exporters",
    "stages",
    "recipe",
    "cluster",
)
# Paragraphs of a method's docstring that become sections of its page.
HEADINGS = {
    "What the loss should look like": "What the loss should look like",
    "Deviations": "Deviations from the papers",
}
ARXIV = re.compile(r"\(arXiv (\d{4}\.\d{4,5})((?:, [^()]*)?)\)|\barXiv (\d{4}\.\d{4,5})")
LINK = re.compile(r"(\]\()([^)\s#]*)(#[^)\s]*)?(\))")
SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
RULE = r"=+(?: +=+)+"
TABLE = re.compile(rf"^({RULE}\n.*\n{RULE}\n(?:.*\n)*?{RULE})$", re.MULTILINE)
SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):\s*$")
ITEM = re.compile(r"\s*[-*] ")
MARK = re.compile(r"(?<!\S)(\*\w+\*)(?!\w)|\*|(?<![\\\w])_(?=\w)")


# ---- text ----


def plain(text: str) -> str:
    """Convert a docstring to Markdown.

    Outside of code, `*`, `_` and `<` are escaped (except `*word*`), arXiv numbers become links, a blank line is added before
    lists, and tables ruled with `===` become code blocks."""
    pieces = TABLE.split(text)  # text, table, text, ...
    pieces[0::2] = [_prose(piece) for piece in pieces[0::2]]
    pieces[1::2] = [f"\n```text\n{table}\n```\n" for table in pieces[1::2]]
    return "".join(pieces)


def _prose(text: str) -> str:
    lines: list[str] = []
    in_section = False  # in a section such as Args, where indented lines are not code
    for line in text.splitlines():
        if line.strip() and not line.startswith(" "):
            in_section = SECTION.match(line) is not None
        listed = lines and (ITEM.match(lines[-1]) or lines[-1].startswith("  "))
        if ITEM.match(line) and lines and lines[-1].strip() and not listed:
            lines.append("")
        code = line.startswith("    ") and not in_section
        lines.append(line if code else _escaped(line))
    return "\n".join(lines)


def _escaped(line: str) -> str:
    """Escape the markup in a line, except in code and at the start of a list item."""
    item = ITEM.match(line)
    start = item.end() if item else 0
    parts, last = [line[:start]], start
    for span in SPAN.finditer(line, start):
        parts += [_marks(line[last : span.start()]), span.group()]
        last = span.end()
    return "".join([*parts, _marks(line[last:])])


def _marks(text: str) -> str:
    return cited(MARK.sub(lambda m: m.group(1) or "\\" + m.group(), text).replace("<", "&lt;"))


def cited(text: str) -> str:
    """Convert arXiv numbers to links."""

    def link(match: re.Match[str]) -> str:
        number, rest, bare = match.groups()
        shown = f"[arXiv {number or bare}](https://arxiv.org/abs/{number or bare})"
        return shown if bare else f"({shown}{rest})"

    return ARXIV.sub(link, text)


def docstring(path: Path) -> str:
    """Return the docstring of a module without importing it."""
    return ast.get_docstring(ast.parse(path.read_text())) or ""


def parts(text: str) -> tuple[str, str, dict[str, str]]:
    """Split a method's docstring into (first paragraph, body, {heading: text}).

    A section starts with a paragraph that begins with a heading of `HEADINGS` and a colon, and ends at the next one."""
    paragraphs = text.split("\n\n")
    body: list[str] = []
    sections: dict[str, list[str]] = {}
    current = body
    for paragraph in paragraphs[1:]:
        name, colon, rest = paragraph.partition(":")
        if colon and name in HEADINGS:
            current = sections.setdefault(name, [])
            paragraph = rest.strip()
            paragraph = paragraph[:1].upper() + paragraph[1:]
        current.append(paragraph)
    return paragraphs[0], "\n\n".join(body), {name: "\n\n".join(found) for name, found in sections.items()}


# ---- links ----


def site_path(path: str) -> str | None:
    """Return the path of a repository file on the site (with an anchor for configs), or None if it is not on the site."""
    if path == "README.md":
        return "index.md"
    if path == "CONTRIBUTING.md":
        return "contributing.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if method := re.fullmatch(r"distill/methods/(\w+)\.py", path):
        return f"methods/{method[1]}.md"
    if config := re.fullmatch(r"(?:configs/)?((?:recipes/)?[\w/]+)\.yaml", path):
        return f"configs.md#{config[1].replace('/', '-')}"
    return None


def relink(text: str, source: str, page: str) -> str:
    """Convert links in `source` (a path in the repository) to links in `page` (a path on the site); other links stay."""

    def link(match: re.Match[str]) -> str:
        opening, target, anchor, closing = match.groups()
        if not target or "://" in target or target.startswith("mailto:"):
            return match.group()
        there = site_path(posixpath.normpath(posixpath.join(posixpath.dirname(source), target)))
        if there is None:
            return match.group()
        path, _, own = there.partition("#")
        path = posixpath.relpath(path, posixpath.dirname(page) or ".")
        return f"{opening}{path}{'#' + own if own else anchor or ''}{closing}"

    return LINK.sub(link, text)


# ---- pages ----


def methods(root: Path = ROOT) -> list[str]:
    """Return the names of all methods."""
    return sorted(p.stem for p in (root / "distill/methods").glob("*.py") if not p.stem.startswith("_"))


def users(root: Path, method: str) -> list[str]:
    """Return the recipes and teachers (paths in the repository) that use a method."""
    chosen = re.compile(rf"^\s*- (?:override )?/method@[\w.]+: {re.escape(method)}\s*$", re.MULTILINE)
    files = [*sorted((root / "recipes").glob("*.yaml")), *sorted((root / "configs/teacher").glob("*.yaml"))]
    return [str(file.relative_to(root)) for file in files if chosen.search(file.read_text())]


def method_page(root: Path, method: str) -> str:
    """Return the page of a method: docstring, recipes that use it, options, API reference."""
    source, page = f"distill/methods/{method}.py", f"methods/{method}.md"
    lead, body, sections = parts(docstring(root / source))
    found = [f"# {method}", f"**{_joined(lead)}**", plain(body)]
    for name, heading in HEADINGS.items():
        if name in sections:
            found += [f"## {heading}", plain(sections[name])]
    links = [relink(f"[`{Path(file).stem}`]({file})", "README.md", page) for file in users(root, method)]
    if links:
        found += ["## Used by", f"The stages of {', '.join(links)}."]
    if (config := root / "configs/method" / f"{method}.yaml").is_file():
        found += [
            "## Options",
            f"`configs/method/{method}.yaml`:",
            f"```yaml\n{config.read_text().strip()}\n```",
        ]
    found += ["## Reference", *(f"::: distill.methods.{method}.{name}" for name in _classes(root / source))]
    return "\n\n".join(part for part in found if part) + "\n"


def methods_page(root: Path) -> str:
    """Return the page that lists all methods with the first paragraphs of their docstrings."""
    lines = ["# Methods", "", "Requirements and comparison: [Which method?](../which_method.md)", ""]
    for method in methods(root):
        lead = _joined(parts(docstring(root / "distill/methods" / f"{method}.py"))[0])
        lines.append(f"- [`{method}`]({method}.md): {lead}")
    return "\n".join(lines) + "\n"


def _joined(paragraph: str) -> str:
    return " ".join(plain(paragraph).split())


def modules(root: Path = ROOT) -> dict[str, list[str]]:
    """Return package -> dotted names of its modules, for every package of distill."""
    found: dict[str, list[str]] = {}
    for path in sorted((root / "distill").rglob("*.py")):
        parts_of = path.relative_to(root).with_suffix("").parts
        if len(parts_of) > 2 and not any(part.startswith("_") for part in parts_of):
            found.setdefault(parts_of[1], []).append(".".join(parts_of))
    first = {package: i for i, package in enumerate(PACKAGES)}
    return dict(sorted(found.items(), key=lambda item: (first.get(item[0], len(PACKAGES)), item[0])))


def _classes(path: Path) -> list[str]:
    """Return the public classes of a module without importing it."""
    body = ast.parse(path.read_text()).body
    return [node.name for node in body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]


def configs_page(root: Path) -> str:
    """Return the page with the files of all recipes and configs."""
    found = [
        "# All recipes and configs",
        "Choose an option of a group with `group=option`, and set a key with `key=value`.",
    ]
    files = [*sorted((root / "recipes").glob("*.yaml")), *sorted((root / "configs").glob("*.yaml"))]
    groups = sorted(folder for folder in (root / "configs").iterdir() if folder.is_dir())
    headed = [("Recipes and roots", files)] + [
        (f"Group `{g.name}`", sorted(g.glob("*.yaml"))) for g in groups
    ]
    for heading, members in headed:
        found.append(f"## {heading}")
        for file in members:
            path = file.relative_to(root).as_posix()
            anchor = (site_path(path) or "").partition("#")[2]
            found += [f"### {path} {{#{anchor}}}", f"```yaml\n{file.read_text().strip()}\n```"]
    return "\n\n".join(found) + "\n"


def pages(root: Path = ROOT) -> dict[str, str]:
    """Return path on the site -> Markdown of all generated pages."""
    made = {
        "index.md": relink((root / "README.md").read_text(), "README.md", "index.md"),
        "contributing.md": relink(
            (root / "CONTRIBUTING.md").read_text(), "CONTRIBUTING.md", "contributing.md"
        ),
        "methods/index.md": methods_page(root),
        "configs.md": configs_page(root),
    }
    made |= {f"methods/{method}.md": method_page(root, method) for method in methods(root)}
    for package, names in modules(root).items():
        made[f"api/{package}.md"] = (
            "\n\n".join([f"# distill.{package}", *(f"::: {name}" for name in names)]) + "\n"
        )
    return made


def menu(root: Path = ROOT) -> list[dict[str, Any]]:
    """Return the menu of the site."""
    on_disk = sorted(p.name for p in (root / "docs").glob("*.md"))
    written = [*(p for p in WRITTEN if p in on_disk), *(p for p in on_disk if p not in WRITTEN)]
    return [
        {"Start": "index.md"},
        *({_title(root / "docs" / page): page} for page in written),
        {"Recipes and configs": "configs.md"},
        {"Contributing": "contributing.md"},
        {"Methods": ["methods/index.md", *({m: f"methods/{m}.md"} for m in methods(root))]},
        {"Reference": [{f"distill.{package}": f"api/{package}.md"} for package in modules(root)]},
    ]


def _title(path: Path) -> str:
    return path.read_text().partition("\n")[0].removeprefix("# ").strip()


# ---- hooks of mkdocs and mkdocstrings ----


def on_config(config: Any) -> Any:
    """Set the menu."""
    config["nav"] = menu()
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Convert links to files of the repository to links of the site."""
    path: str = page.file.src_uri
    return markdown if page.file.generated_by else relink(markdown, f"docs/{path}", path)


try:
    from griffe import Extension
except ImportError:  # mkdocstrings is not installed
    pass
else:

    class Docstrings(Extension):
        """Converts docstrings to Markdown with `plain`."""

        def on_instance(self, *, obj: Any, **_: Mapping[str, Any]) -> None:
            """Convert one docstring."""
            if obj.docstring is not None:
                obj.docstring.value = plain(obj.docstring.value)
