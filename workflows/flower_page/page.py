"""The request handlers: the two pages, what they poll, and the same for programs.

    /migrations                     the page                       ?plan= &status= &actor= &limit=
    /migrations/data                what it polls: JSON, and its live part as HTML
    /migration/<move id>            one move with its actors
    /migration/<move id>/data       what that polls
    /migrations/assets/<file>       script and style
    /api/migrations                 for programs: the list that `ferry migrations --json` prints, same filters

Pages and their data ask for Flower's login where there is one. /api follows Flower's rules for its API: no login
configured means 401, unless FLOWER_UNAUTHENTICATED_API is set. So the pages never poll it.

Redis is down: pages and data answer 503 and say so in words, and Flower goes on.
"""

from __future__ import annotations

import gzip
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson
from flower.api import BaseApiHandler
from flower.utils import template
from flower.utils.tasks import get_task_by_id
from flower.views import BaseHandler
from tornado import web

from routing.errors import InvalidInput, Unavailable
from workflows.flower_page import view
from workflows.flower_page.reading import IN_FLIGHT_FILTER, Filters, Reader
from workflows.flower_page.view import MoveView, Overview
from workflows.records import STEPS, ActorMigration, MigrationStatus, to_document

ASSETS = Path(__file__).parent / "assets"
# Where moves stay long enough to be looked for; the other statuses may be asked for in the address.
STATUS_PILLS = (
    "", IN_FLIGHT_FILTER, MigrationStatus.PLANNED, MigrationStatus.COMPLETED, MigrationStatus.ROLLED_BACK,
    MigrationStatus.FAILED, MigrationStatus.CANCELLED,
)  # fmt: skip
ACTORS_SHOWN = 1_000  # of one move; the others are counted, and `ferry migrations` lists them


def _filters(handler: BaseHandler) -> Filters:
    """Raises InvalidInput. Not by Flower's `get_argument`, which escapes what is only compared."""
    return Filters.parse({name: handler.get_query_argument(name) for name in handler.request.query_arguments})


class MigrationsHandler(BaseHandler):
    """What the handlers of pages and of their data share: reading, and words for what went wrong."""

    def initialize(self, reader: Reader) -> None:
        self.reader = reader

    def task_state(self, task_id: str) -> str | None:
        task = get_task_by_id(self.application.events, task_id)
        return task.state if task is not None else None

    def time_text(self, at: float | None, form: str = "%H:%M:%S") -> str:
        """In the time zone of the Celery app, as everywhere in Flower."""
        return datetime.fromtimestamp(at, tz=self.capp.timezone).strftime(form) if at is not None else "—"

    def get_template_namespace(self) -> dict[str, Any]:
        """What every template may use; `render_string` knows Flower's functions from here only."""
        namespace: dict[str, Any] = super().get_template_namespace()
        return namespace | {
            "humanize": template.humanize, "format_count": template.format_count, "task_link": template.task_link,
            "milliseconds": view.milliseconds, "size": view.size, "time_text": self.time_text, "step_names": STEPS,
            "status_badges": view.STATUS_BADGES, "task_badges": view.TASK_BADGES,
            "other_task_badge": view.OTHER_TASK_BADGE,
        }  # fmt: skip

    def overview_html(self, overview: Overview, filters: Filters) -> str:
        """The part of the page that is kept current; so is the next."""
        return self._rendered("migrations_live.html", overview=overview, filters=filters)

    def move_html(self, shown: MoveView, migrations: list[ActorMigration]) -> str:
        return self._rendered(
            "migration_live.html", shown=shown, move=shown.move, migrations=migrations[:ACTORS_SHOWN],
            hidden=max(0, len(migrations) - ACTORS_SHOWN),
        )  # fmt: skip

    def _rendered(self, template_name: str, **shown: Any) -> str:
        html: bytes = self.render_string(template_name, **shown)
        return html.decode()

    def write_document(self, document: dict[str, Any]) -> None:
        """As JSON. Tornado adds an ETag, so a poll that finds nothing new costs the browser 200 bytes; one that does
        is 360 kB for a hundred moves, or 25 kB compressed.
        """
        body = orjson.dumps(document)
        self.set_header("Content-Type", "application/json; charset=UTF-8")
        self.set_header("Cache-Control", "no-cache")
        self.set_header("Vary", "Accept-Encoding")
        if "gzip" in self.request.headers.get("Accept-Encoding", ""):
            self.set_header("Content-Encoding", "gzip")
            body = gzip.compress(body, compresslevel=1, mtime=0)
        self.write(body)

    def refuse(self, status: int, words: str) -> None:
        self.set_status(status)
        self.write_document({"error": words})


class MigrationsView(MigrationsHandler):
    """The page."""

    @web.authenticated
    async def get(self) -> None:
        trouble, live, filters = None, "", Filters()
        try:
            filters = _filters(self)
            live = self.overview_html(await self.reader.overview(filters, self.task_state), filters)
        except InvalidInput as error:
            self.set_status(400)
            trouble = str(error)
        except Unavailable as error:
            self.set_status(503)
            trouble = str(error)
        self.render(
            "migrations.html", live=live, trouble=trouble, filters=filters,
            source=f"{self.reverse_url('migrations-data')}?{self.request.query}",
            statuses=dict.fromkeys((*STATUS_PILLS, filters.status_text)),
        )  # fmt: skip


class MigrationsData(MigrationsHandler):
    """`{"plan", "blackout_ms": {"p50", "p99"}, "moves": [...], "html"}`: the values, and the same as the page shows
    them, so that nothing is rendered in two places.
    """

    @web.authenticated
    async def get(self) -> None:
        try:
            filters = _filters(self)
            overview = await self.reader.overview(filters, self.task_state)
        except InvalidInput as error:
            self.refuse(400, str(error))
        except Unavailable as error:
            self.refuse(503, str(error))
        else:
            self.write_document(overview.to_document() | {"html": self.overview_html(overview, filters)})


class MigrationView(MigrationsHandler):
    """The page of one move."""

    @web.authenticated
    async def get(self, move_id: str) -> None:
        trouble, live = None, ""
        try:
            found = await self.reader.move(move_id, self.task_state)
        except Unavailable as error:
            self.set_status(503)
            trouble = str(error)
        else:
            if found is None:
                raise web.HTTPError(404, "Unknown move '%s'", move_id)
            live = self.move_html(*found)
        self.render(
            "migration.html", live=live, trouble=trouble, move_id=move_id,
            source=self.reverse_url("migration-data", move_id),
        )  # fmt: skip


class MigrationData(MigrationsHandler):
    """`{"move", "migrations": [...], "html"}`."""

    @web.authenticated
    async def get(self, move_id: str) -> None:
        try:
            found = await self.reader.move(move_id, self.task_state)
        except Unavailable as error:
            self.refuse(503, str(error))
            return
        if found is None:
            self.refuse(404, f"move {move_id} is not stored (any more)")
            return
        shown, migrations = found
        self.write_document(
            {
                "move": shown.to_document(),
                "migrations": [to_document(migration) for migration in migrations[:ACTORS_SHOWN]],
                "html": self.move_html(shown, migrations),
            }
        )


class MigrationsApi(BaseApiHandler):
    """For programs."""

    def initialize(self, reader: Reader) -> None:
        self.reader = reader

    @web.authenticated
    async def get(self) -> None:
        try:
            migrations = await self.reader.migrations(_filters(self))
        except InvalidInput as error:
            raise web.HTTPError(400, "%s", error) from error
        except Unavailable as error:
            raise web.HTTPError(503, "%s", error) from error
        self.set_header("Content-Type", "application/json; charset=UTF-8")
        self.write(orjson.dumps([to_document(migration) for migration in migrations]))


class MigrationsAsset(web.StaticFileHandler):
    """Script and style. The browser asks each time whether they changed, so an upgrade never mixes versions."""

    def set_extra_headers(self, path: str) -> None:
        self.set_header("Cache-Control", "no-cache")
        self.set_header("X-Content-Type-Options", "nosniff")
