"""The SDK that an app embeds: `from edge_client.client import EdgeClient`."""
