"""Pages of the site that lie outside of docs/: a hook of MkDocs, see mkdocs.yml.

The site is laid out as the repository is, so that links between pages are right in both.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"\]\(([^)#\s]+)")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """All pages of the repository under their paths there, with the files that they link to."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.md"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    pages = [name for name in listed.split("\0") if (ROOT / name).is_file()]
    linked = {
        str((page.parent / link).resolve().relative_to(ROOT))
        for page in (ROOT / name for name in pages)
        for link in _LINK.findall(page.read_text())
        if (page.parent / link).is_file()
    }
    of_theme = [file for file in files if not file.is_documentation_page()]
    return Files(
        [
            *of_theme,
            *(
                File(name, str(ROOT), config.site_dir, config.use_directory_urls)
                for name in sorted({*pages, *linked})
            ),
        ]
    )
