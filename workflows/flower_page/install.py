"""Puts the page into Flower, which has no plugins: routes before its catch-all, templates of ours beside its own, and
one more tab in its navigation bar.

Written for Flower 2.2, which pyproject.toml pins; tests/integration/test_flower_page.py fails when a new one differs.
"""

from __future__ import annotations

from pathlib import Path

import flower
import flower.urls
from tornado.options import options
from tornado.template import DictLoader
from tornado.web import url

from routing.errors import Incompatible
from routing.settings import Settings
from workflows.flower_page.page import (
    ASSETS,
    MigrationData,
    MigrationsApi,
    MigrationsAsset,
    MigrationsData,
    MigrationsView,
    MigrationView,
)
from workflows.flower_page.reading import Reader
from workflows.store import RecordStore

TEMPLATES = Path(__file__).parent / "templates"
READ_TIMEOUT_S = 2.0  # a page that is polled every 1.5 s must not wait longer for a Redis that hangs
MAX_TASKS = 5_000  # Flower's 100,000 take 470 MB; 5,000 are the steps of the latest 800 moves
ADDRESS = "127.0.0.1"  # Flower's default is every interface, and without a login it lets everybody shut workers down

_TAB = """
        <li class="nav-item">
          <a class="nav-link{% if active_tab == 'migrations' %} active{% end %}"
            href="{{ reverse_url('migrations') }}"
            {% if active_tab == 'migrations' %}aria-current="page"{% end %}>Migrations</a>
        </li>"""


def install(settings: Settings) -> None:
    """Show the page in the Flower that this process is about to start. Again is harmless.

    Raises Incompatible when Flower's navigation bar or routes are not where they were; then nothing was changed.
    Options from Flower's command line, environment and configuration file are read later and win over our defaults.
    """
    handlers = flower.urls.handlers
    if any(getattr(handler, "name", None) == "migrations" for handler in handlers):
        return
    if not isinstance(handlers[-1], tuple) or handlers[-1][0] != r".*":
        raise _changed("its list of routes")
    templates = _templates(Path(flower.urls.settings["template_path"]))

    store = RecordStore.connect(settings.redis_url, settings.cluster, timeout_s=READ_TIMEOUT_S)
    reader = {"reader": Reader(store, settings.shards)}
    handlers[-1:-1] = [
        url(r"/migrations", MigrationsView, reader, name="migrations"),
        url(r"/migrations/data", MigrationsData, reader, name="migrations-data"),
        url(r"/migrations/assets/(.+)", MigrationsAsset, {"path": str(ASSETS)}, name="migrations-asset"),
        url(r"/migration/([^/]+)", MigrationView, reader, name="migration"),
        url(r"/migration/([^/]+)/data", MigrationData, reader, name="migration-data"),
        url(r"/api/migrations", MigrationsApi, reader),
    ]
    flower.urls.settings["template_loader"] = DictLoader(templates)
    options.max_tasks = MAX_TASKS
    options.address = ADDRESS


def _templates(flowers: Path) -> dict[str, str]:
    """Flower's templates, its navigation bar with our tab, and our own."""
    pages = {page.name: page.read_text("utf-8") for folder in (flowers, TEMPLATES) for page in folder.glob("*.html")}
    return pages | {"navbar.html": with_tab(pages.get("navbar.html", ""))}


def with_tab(navbar: str) -> str:
    """The navigation bar with our tab after Flower's last one, Broker. Raises Incompatible when that is not there."""
    before, broker, after = navbar.partition("{{ reverse_url('broker') }}")
    rest_of_tab, end, others = after.partition("</li>")
    if not broker or not end or "active_tab == 'broker'" not in rest_of_tab:
        raise _changed("its navbar.html")
    return f"{before}{broker}{rest_of_tab}{end}{_TAB}{others}"


def _changed(what: str) -> Incompatible:
    return Incompatible(
        f"Flower {flower.__version__} has changed {what}, where the Migrations page goes: install flower>=2.2,<2.3"
    )
