"""What the sink says of itself: counters for Prometheus, and a health page."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from accrual import metrics
from accrual.errors import ConfigError
from accrual.lake import Move
from consumers.rows import Skipped

# The loop turns several times a second; one that has not for so long hangs.
_HANGS_AFTER_S = 60.0

log = logging.getLogger("accrual.sink")


class Progress:
    """Counts what the sink does. Written by the sink's thread, read by the endpoint's."""

    def __init__(self) -> None:
        self.commits = 0
        self.doubles = 0
        self._last_turn = time.monotonic()
        self._last_commit: float | None = None
        self._trouble = ""

    def committed(
        self, tables: Mapping[str, pa.Table], skipped: Sequence[Skipped], moves: Sequence[Move], seconds: float
    ) -> None:
        """A batch is in the lake."""
        self.commits += 1
        self._last_commit = time.time()
        self.turned()
        for table, rows in tables.items():
            metrics.SINK_ROWS.labels(table).inc(len(rows))
        if doubles := tables.get("doubles"):
            self.doubles += len(doubles)
            for stream in doubles["stream"].to_pylist():
                metrics.SINK_DOUBLES.labels(stream).inc()
        for record in skipped:
            metrics.SINK_SKIPPED.labels(record.topic, record.reason).inc()
        for move in moves:
            metrics.SINK_NEXT_OFFSET.labels(move.topic, str(move.partition)).set(move.next)
        metrics.SINK_BATCH_SECONDS.observe(seconds)

    def sealed(self, stream: str) -> None:
        """A window of the stream was sealed."""
        metrics.SINK_WINDOWS_SEALED.labels(stream).inc()

    def turned(self) -> None:
        """The loop went round with nothing wrong."""
        self._last_turn = time.monotonic()
        self._trouble = ""

    def trouble(self, what: str) -> None:
        """Something is wrong that may heal."""
        self._last_turn = time.monotonic()
        self._trouble = what

    def health(self) -> dict[str, object]:
        """`status` is `ok`, `trouble` (waiting for broker or lake) or `hangs`."""
        hangs = time.monotonic() - self._last_turn > _HANGS_AFTER_S
        return {
            "status": "hangs" if hangs else "trouble" if self._trouble else "ok",
            "trouble": self._trouble,
            "commits": self.commits,
            "doubles": self.doubles,
            "last_commit": self._last_commit,
        }


@contextmanager
def serving(progress: Progress, port: int) -> Iterator[int]:
    """Serve `/health` and `/metrics` on `port` (0: a free one) while the block runs; yields the port.

    Raises ConfigError if the port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._answer(200, CONTENT_TYPE_LATEST, generate_latest())
            elif self.path == "/health":
                health = progress.health()
                self._answer(200 if health["status"] == "ok" else 503, "application/json", json.dumps(health).encode())
            else:
                self._answer(404, "text/plain", b"/health or /metrics\n")

        def _answer(self, code: int, kind: str, body: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """A probe every few seconds is no news."""

    try:
        server = ThreadingHTTPServer(("", port), Handler)
    except OSError as exc:
        raise ConfigError(f"port {port} for /health and /metrics: {exc.strerror}; choose with --port") from exc
    threading.Thread(target=server.serve_forever, name="endpoint", daemon=True).start()
    log.info("/health and /metrics on port %d", server.server_port)
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
