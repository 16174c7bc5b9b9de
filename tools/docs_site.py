"""MkDocs hooks: the documentation's links work on a code host and in the site alike.

Pages link to files of the repository outside docs/, as a code host wants it. The site has no code host, so it carries
what is linked to: the README is its first page, other Markdown files are pages, code is shown with line numbers.
"""

from __future__ import annotations

import posixpath
import re
from html import escape
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!\w+:)([^)#\s]+)(#[^)\s]*)?\)")
_IMAGE = re.compile(r"(!\[[^\]]*\]\()(?!\w+:)([^)#\s]+)(\))")
_LANGUAGES = {".py": "python", ".sh": "bash", ".sbatch": "bash", ".json": "json", ".yaml": "yaml", ".cfg": "ini"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for every file outside docs/ that a page links to."""
    waiting = ["README.md", *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    seen: set[str] = set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        if path.endswith(".md"):
            text = (ROOT / path).read_text(encoding="utf-8")
            waiting += [_in_repository(path, target) for _, target, _ in _LINK.findall(text)]
        if path.startswith("docs/"):
            continue
        content = text if path.endswith(".md") else _source(path)
        files.append(File.generated(config, _in_site(path), content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links of the repository into links of the site."""
    path = _from_site(page.file.src_uri)
    if not path.endswith(".md"):
        return markdown

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match[1], _in_repository(path, match[2]), match[3] or ""
        if target.endswith(".md") or target.startswith("docs/"):
            return f"[{text}]({_relative(page, target)}{anchor})"
        source = files.get_file_from_path(_in_site(target))
        assert source is not None  # `on_files` has made it
        # Not as Markdown: MkDocs knows no anchors of code lines, and would warn.
        line = re.sub(r"#L(\d+)", r"#__codelineno-0-\1", anchor)
        shown = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False))
        return f'<a href="{source.url_relative_to(page.file)}{line}">{shown}</a>'

    markdown = _LINK.sub(link, markdown)
    return _IMAGE.sub(lambda found: f"{found[1]}{_relative(page, _in_repository(path, found[2]))}{found[3]}", markdown)


def _in_repository(page: str, target: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), target))


def _in_site(path: str) -> str:
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"repository/{path}" if path.endswith(".md") else f"repository/{path}.md"


def _from_site(uri: str) -> str:
    if uri == "index.md":
        return "README.md"
    if not uri.startswith("repository/"):
        return f"docs/{uri}"
    path = uri.removeprefix("repository/")
    return path if (ROOT / path).is_file() else path.removesuffix(".md")


def _relative(page: Page, path: str) -> str:
    return posixpath.relpath(_in_site(path), posixpath.dirname(page.file.src_uri) or ".")


def _source(path: str) -> str:
    """A page of one file's text, or of a folder's names; the search leaves it out."""
    place = ROOT / path
    if place.is_dir():
        names = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in place.glob("[!_.]*"))
        body = "".join(f"- `{name}`\n" for name in names)
    else:
        language = _LANGUAGES.get(place.suffix, "text")
        body = f'``````{{ .{language} linenums="1" }}\n{place.read_text(encoding="utf-8")}\n``````\n'
    return f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n{body}"
