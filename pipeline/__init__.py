"""The staged scripts, in the order in which data flows, and what they talk to."""
