"""How fast the gateway is, beside a direct connection and beside Enterprise Gateway. Run: `python -m benchmarks`."""
