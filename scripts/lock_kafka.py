"""Resolve Apache Kafka's jars anew and write accrual/kafka.lock: `python scripts/lock_kafka.py 4.3.1`.

The lock is what `accrual.broker` fetches by: one line a jar, `group:artifact:version sha256`. With it the set-up walks
no dependency graph (half a minute of small requests) and refuses a jar that is not the one that was tested.
"""

import hashlib
import sys
import tempfile
from pathlib import Path

from jgo.maven import MavenContext, PythonResolver
from jgo.parse import Endpoint

LOCK = Path(__file__).parent.parent / "accrual" / "kafka.lock"
# Kafka logs through SLF4J 1.7 and brings no backend to write it: the simplest one, so that failures leave a trace.
SLF4J_BACKEND = "org.slf4j:slf4j-simple:1.7.36"


def lock_lines(kafka_version: str) -> list[str]:
    """The lock's lines for the broker and its storage tool, sorted."""
    endpoint = (
        f"org.apache.kafka:kafka_2.13:{kafka_version}+org.apache.kafka:kafka-tools:{kafka_version}+{SLF4J_BACKEND}"
    )
    with tempfile.TemporaryDirectory() as folder:
        maven = MavenContext(resolver=PythonResolver(), repo_cache=Path(folder), timeout=60)
        wanted = [maven.create_dependency(coordinate) for coordinate in Endpoint.parse(endpoint).coordinates]
        direct, transitive = maven.resolver.resolve(wanted)
        artifacts = [d.artifact for d in [*direct, *transitive] if d.scope in (None, "compile", "runtime")]
        return sorted(
            f"{a.groupId}:{a.artifactId}:{a.version} {hashlib.sha256(a.resolve().read_bytes()).hexdigest()}"
            for a in artifacts
        )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/lock_kafka.py KAFKA_VERSION")
    lines = lock_lines(sys.argv[1])
    LOCK.write_text(
        "# Apache Kafka's jars and their SHA-256. Written by scripts/lock_kafka.py; not edited by hand.\n"
        + "\n".join(lines)
        + "\n",
        encoding="utf-8",
    )
    print(f"{LOCK.name}: {len(lines)} jars")
