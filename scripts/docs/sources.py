"""Links that work on GitHub and on the site: files outside docs/ that pages link to become pages of the site.

Markdown stays Markdown, other files are shown as code, and a folder is shown as its files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

LINK = re.compile(r"(?<=\]\()([^)#\s]+)((?:#[^)\s]*)?)(?=\))")
FENCE = re.compile(r"^( *)```.*?^\1```", re.MULTILINE | re.DOTALL)
LANGUAGES = {".py": "python", ".toml": "toml", ".yaml": "yaml", ".yml": "yaml", ".json": "json"}
SHELF = "source"


def site_uri(path: Path, root: Path) -> str:
    """Return where a file of the repository is on the site."""
    inside = path.relative_to(root)
    if inside.parts[0] == "docs":
        return Path(*inside.parts[1:]).as_posix()
    return f"{SHELF}/{inside.as_posix()}" + ("" if inside.suffix == ".md" else ".md")


def targets(markdown: str, page: Path, root: Path) -> Iterator[Path]:
    """Yield the files and folders of the repository that a page links to."""
    for link in LINK.finditer(FENCE.sub("", markdown)):
        if target := _resolve(link[1], page, root):
            yield target


def rewrite(markdown: str, page: Path, root: Path) -> str:
    """Rewrite the links of a page so that they lead to pages of the site."""
    here = os.path.dirname(site_uri(page, root))

    def replace(link: re.Match[str]) -> str:
        target = _resolve(link[1], page, root)
        if target is None or (_is_docs(page, root) and _is_docs(target, root)):
            return link[0]
        return os.path.relpath(site_uri(target, root), here or ".") + link[2]

    pieces, end = [], 0
    for fence in FENCE.finditer(markdown):
        pieces += [LINK.sub(replace, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*pieces, LINK.sub(replace, markdown[end:])])


def outside(pages: list[Path], root: Path) -> dict[str, str]:
    """Return the pages to add to the site, by their place there: everything outside docs/ reachable by links."""
    texts: dict[str, str] = {}
    waiting = list(pages)
    while waiting:
        page = waiting.pop()
        for target in targets(page.read_text(encoding="utf-8"), page, root):
            uri = site_uri(target, root)
            if _is_docs(target, root) or uri in texts:
                continue
            texts[uri] = as_page(target, root)
            if target.suffix == ".md":
                waiting.append(target)
    return texts


def as_page(path: Path, root: Path) -> str:
    """Return a file or a folder of the repository as Markdown."""
    if path.suffix == ".md":
        return rewrite(path.read_text(encoding="utf-8"), path, root)
    title = f"# {path.relative_to(root).as_posix()}\n\n"
    if path.is_file():
        return title + _as_code(path)
    kept = sorted(file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    texts = [file for file in kept if file.suffix in (*LANGUAGES, ".md")]
    return title + "\n\n".join(f"## {file.relative_to(path).as_posix()}\n\n{_as_code(file)}" for file in texts)


def _as_code(path: Path) -> str:
    return f"````{LANGUAGES.get(path.suffix, 'text')}\n{path.read_text(encoding='utf-8').rstrip()}\n````"


def _resolve(link: str, page: Path, root: Path) -> Path | None:
    """Return the file a link means, or None for an external address or a missing file (mkdocs reports it)."""
    if re.match(r"[a-z]+:", link):
        return None
    target = Path(os.path.normpath(page.parent / link))
    return target if target.is_relative_to(root) and target.exists() else None


def _is_docs(path: Path, root: Path) -> bool:
    return path.relative_to(root).parts[0] == "docs"
