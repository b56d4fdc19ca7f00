"""From Kafka into the lake: the sink, the sealing of windows, the audit."""
