"""The admin port: health, metrics, JSON API and the dashboard. Reads only."""
