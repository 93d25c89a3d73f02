"""The coordinator daemon: rounds, aggregation, store and WebSocket server. NumPy, never torch."""
