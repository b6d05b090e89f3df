"""Starts the real thing for tests: gateways, databases, hubs, kernels. Everything ends what it started."""
