"Sphinx's settings: everything that a page needs is copied beside it, so the site works offline and from file://."

import shutil
import sys
from configparser import ConfigParser
from pathlib import Path

import mathjax
import plotly

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS))
settings = ConfigParser(delimiters=["="])
settings.read(DOCS.parent / "settings.ini", encoding="utf-8")
meta = settings["DEFAULT"]

project = html_title = meta["title"]
author, copyright, release = meta["author"], meta["copyright"], meta["version"]
extensions = ["myst_nb", "sphinx_design", "sphinx_copybutton"]
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type"]

nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js = {}  # MyST-NB would load its widget manager from a CDN
myst_enable_extensions = ["dollarmath", "amsmath", "attrs_inline", "attrs_block", "deflist", "colon_fence", "html_image"]
myst_heading_anchors = 4
myst_heading_slug_func = "convert.slug"

mathjax_path = "mathjax/tex-chtml.js"
mathjax3_config = {
    "tex": {"inlineMath": [["\\(", "\\)"]], "displayMath": [["\\[", "\\]"]]},
    "options": {"enableMenu": False, "processHtmlClass": "tex2jax_process|mathjax_process|math|output_area"},
}

html_theme = "sphinx_book_theme"
html_theme_options = {
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "navbar_persistent": [],
    "collapse_navbar": True,  # each page carries the links of its own family only: half the time to render 150 pages
    "secondary_sidebar_items": {"**": ["page-toc"], "index": []},
    "pygments_dark_style": "github-dark",
    "article_header_start": ["toggle-primary-sidebar.html", "breadcrumbs.html"],
}
html_static_path = ["_static", str(Path(plotly.__file__).parent / "package_data" / "plotly.min.js")]
html_favicon = "_static/favicon.svg"
html_css_files = ["orl.css"]
html_js_files = ["orl.js", "explorer.js", "papers.js"]
html_context = {"default_mode": "auto"}
html_copy_source = html_show_sourcelink = False
html_show_sphinx = False
html_show_search_summary = False  # it would fetch the pages found, which no browser allows on file://


def copy_mathjax(app, error):
    "MathJax with its fonts, out of the Python package that carries it."
    if error is None and app.builder.format == "html":
        packaged = Path(mathjax.__file__).parent / "static" / "mathjax" / "es5"
        copied = Path(app.outdir) / "_static" / "mathjax"
        fonts = Path("output", "chtml", "fonts", "woff-v2")
        shutil.copytree(packaged / fonts, copied / fonts, dirs_exist_ok=True)
        shutil.copy(packaged / "tex-chtml.js", copied)


def setup(app):
    app.connect("build-finished", copy_mathjax)
