"""A hook of mkdocs: the site's pages are the repository's, at their own paths, so that links are the same in both."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

FOLDERS = ("docs", "benchmarks", "hub_cards/example", "notebooks")
KINDS = (".md", ".png", ".json", ".jsonl", ".ipynb")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Return the theme's files and those of the repository."""
    root = Path(config.config_file_path).parent
    for file in files.documentation_pages() + files.media_files():
        if file.abs_src_path and Path(file.abs_src_path).is_relative_to(config.docs_dir):
            files.remove(file)
    found = [*root.glob("*.md"), *(path for folder in FOLDERS for path in (root / folder).rglob("*"))]
    for path in found:
        if path.suffix in KINDS:
            files.append(File.generated(config, path.relative_to(root).as_posix(), abs_src_path=str(path)))
    return files
