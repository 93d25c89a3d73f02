"""How the schema came to be what it is, revision by revision."""
