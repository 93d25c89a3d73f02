"""Compile a backbone into an artifact (extra `export`), for devices that train without torch."""
