"""Training methods: which state a pair is compared at, which errors, which loss, which diagnostics."""
