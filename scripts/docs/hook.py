"""Functions that mkdocs calls while it builds the site (``hooks`` in mkdocs.yml)."""

from __future__ import annotations

import contextlib
import re
import shlex
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from posenc.cli._group import group
from scripts.docs.parts import ROOT, fill
from scripts.docs.sources import outside, rewrite

DOCS = ROOT / "docs"
PLOT = re.compile(r"^posenc plan .*--plot (\w+\.png)$", re.MULTILINE)
LOADED = re.compile(
    r"""<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)=["']?(?:https?:)?//[^>]*>"""
    r"""|@import[^;]+//|url\(["']?(?:https?:)?//"""
)
drawn = tempfile.TemporaryDirectory(prefix="posenc-docs-")


def on_files(files: Files, config: Any) -> Files:
    """Add the files outside docs/ that pages link to, and the pictures that their commands draw."""
    pages = [Path(file.abs_src_path) for file in files.documentation_pages() if file.abs_src_path]
    for uri, text in outside(pages, ROOT).items():
        files.append(File.generated(config, uri, content=text))
    for page in pages:
        for command in PLOT.finditer(page.read_text(encoding="utf-8")):
            place = page.parent.relative_to(DOCS) / command[1]
            files.append(File.generated(config, place.as_posix(), abs_src_path=str(draw(command[0], place.name))))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Fill in the generated parts, show what a command draws below it, and rewrite links that leave docs/."""
    source = page.file.abs_src_path
    if source is None or page.file.generated_by:
        return markdown
    text = re.sub(
        r"^```bash\n(.*?)^```$",
        lambda block: block[0] + "".join(f"\n\n![What this command draws]({name})" for name in PLOT.findall(block[1])),
        fill(markdown),
        flags=re.MULTILINE | re.DOTALL,
    )
    return rewrite(text, Path(source), ROOT)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Show cross-references of docstrings as plain names instead of Sphinx roles."""
    return re.sub(r":(?:class|func|meth|mod):<code>~?(?:[\w.]*\.)?(\w+)</code>", r"<code>\1</code>", html)


def on_post_build(config: Any) -> None:
    """Refuse a site that loads anything from another address."""
    for path in sorted(Path(config.site_dir).rglob("*")):
        if path.suffix in (".html", ".css") and (match := LOADED.search(path.read_text(encoding="utf-8"))):
            raise PluginError(f"{path.relative_to(config.site_dir)} loads something from another address: {match[0]}")


def draw(command: str, name: str) -> Path:
    """Run a ``posenc plan`` command of the page to draw its picture."""
    words = shlex.split(command)[1:]
    target = Path(drawn.name) / name
    words[words.index("--plot") + 1] = str(target)
    with contextlib.redirect_stdout(None):
        group.main(words, standalone_mode=False)
    return target
