"""The Migrations page inside stock Flower: `celery -A workflows flower`, then /migrations.

    install.py   puts the page into Flower: routes, templates, its tab in the navigation bar, safer defaults
    page.py      the request handlers: the two pages, what they poll, and /api/migrations
    reading.py   which moves a request asks for, and how they are read
    view.py      what the pages show, derived from records and from Flower's task states; pure
    templates/   the pages; `*_live.html` is the part that is kept current
    assets/      their script and style, served by Flower itself: no page asks another host

This module is imported by every Celery process and loads nothing of Flower.
"""

from __future__ import annotations

import click

from routing.errors import Incompatible
from routing.settings import Settings


def show_in_flower(settings: Settings) -> None:
    """Put the page into Flower when this process is `celery ... flower`; do nothing in any other.

    Celery loads the app while its command line is being read, before Flower reads its options and builds its web
    application: early enough for routes and defaults, and in whatever directory it was started. Who runs Flower in
    another way calls `install(settings)` from `workflows.flower_page.install` in a flowerconfig.py.

    Exits with one line when Flower is not one we know: a page that is silently missing would be looked for in vain.
    """
    context = click.get_current_context(silent=True)
    if context is None or context.invoked_subcommand != "flower":
        return
    from workflows.flower_page.install import install

    try:
        install(settings)
    except Incompatible as error:
        # Celery answers any Exception here with a traceback and "wrong usage"; this ends it with the line alone.
        raise SystemExit(f"ferry: {error}") from error
